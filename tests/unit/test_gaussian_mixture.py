"""The optimal denoiser of a mixture of Gaussians, and the real modules and samplers held against it.

The whole measurement (`make oracle`, docs/results/gaussian_mixture.md) is marked slow; a tenth of it is not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from matformer.hosts.plain import PlainHost
from matformer.model import Matformer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "oracle"))  # tools are scripts, not a package

import gaussian_mixture as oracle
from gaussians import Mixture, three

MAX_EXCESS, MAX_ERROR = 0.02, 0.03


def test_the_mixture_has_mean_zero_mean_variance_one_and_draws_of_its_moments() -> None:
    mixture = three(4, seed=1)
    mean, covariance = mixture.moments()
    assert np.abs(mean).max() < 1e-12 and np.trace(covariance) == pytest.approx(4.0)
    drawn = mixture.draw(200_000, np.random.default_rng(0))
    assert max(oracle.errors(drawn, mixture)) < 0.01


def test_of_one_component_the_expectation_is_that_of_a_gaussian() -> None:
    mixture = Mixture(np.ones(1), np.array([[0.7, -0.2]]), np.array([[[0.5, 0.0], [0.0, 2.0]]]))
    seen, alpha, sigma = np.array([[1.0, 2.0], [-3.0, 0.5]]), np.array([0.8, 0.6]), np.array([0.6, 0.8])
    variance = np.array([0.5, 2.0])
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    np.testing.assert_allclose(
        mixture.expected(seen, alpha, sigma), mixture.mean + gain * (seen - alpha * mixture.mean)
    )


@pytest.mark.parametrize("alpha", [(0.9, 0.9, 0.9, 0.9), (1.0, 1.0, 0.4)])
def test_the_expectation_is_the_average_of_draws_weighed_by_how_likely_they_are(alpha: tuple[float, ...]) -> None:
    """Also where the first two scalars are seen (all but) clean."""
    mixture, levels = three(4, seed=1), np.array(alpha)
    sigma = np.where(levels == 1, 0.15, 0.6)
    draws = mixture.draw(400_000, np.random.default_rng(0))[:, : len(levels)]
    for number in range(3):
        seen = levels * draws[number] + sigma * np.random.default_rng(number).standard_normal(len(levels))
        surprise = ((seen - levels * draws) / sigma)[8:]
        weight = np.exp(-0.5 * np.square(surprise).sum(1))
        average = weight @ draws[8:] / weight.sum()
        np.testing.assert_allclose(mixture.expected(seen[None], levels, sigma)[0], average, atol=0.03)


def test_a_wrong_denoiser_and_wrong_samples_are_seen() -> None:
    """The best linear answer, where the model begins, and draws of another mixture fail the bars."""
    mixture = three(oracle.DIMS, seed=1)
    for name in ("flow", "next_latent (flow)"):
        run = oracle.run_of(oracle.ARMS[name], steps=1, seed=0)
        host = PlainHost(run)
        model = Matformer(run.model, trunk=host.build_trunk())
        host.prepare(model)
        assert oracle.excess(model, run, mixture, number=512)[0] > 5 * MAX_EXCESS
    mean, covariance = mixture.moments()
    gaussian = Mixture(np.ones(1), mean[None], covariance[None])
    drawn = gaussian.draw(50_000, np.random.default_rng(0))
    assert max(oracle.errors(1.03 * drawn, mixture)) > MAX_ERROR
    assert max(oracle.errors(drawn + 0.05, mixture)) > MAX_ERROR


@pytest.mark.parametrize("name", ["flow", "next_latent (flow)"])
def test_a_tenth_of_the_training_comes_most_of_the_way(name: str) -> None:
    torch.set_num_threads(1)
    mixture, run = three(oracle.DIMS, seed=1), oracle.run_of(oracle.ARMS[name], steps=60, seed=0)
    host = PlainHost(run)
    model = Matformer(run.model, trunk=host.build_trunk())
    host.prepare(model)
    first, _ = oracle.excess(model, run, mixture, number=512)
    oracle.train(host, run, mixture)
    last, _ = oracle.excess(model, run, mixture, number=512)
    assert last < first / 4


@pytest.mark.slow
@pytest.mark.parametrize("name", list(oracle.ARMS))
def test_the_modules_learn_the_optimal_denoiser_and_the_engine_samples_the_mixture(name: str) -> None:
    torch.set_num_threads(1)
    found = oracle.measure(name, steps=oracle.STEPS, samples=oracle.SAMPLES)
    assert found.excess < MAX_EXCESS < found.first_excess
    assert found.mean_error < MAX_ERROR and found.covariance_error < MAX_ERROR
