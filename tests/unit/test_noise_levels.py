"""Levels, targets and weights against diffusers, which we did not write."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from matformer.config.schema import MediaObjective
from matformer.data.packing import Noise, Piece, Place, build_batch, pack_batch, with_noise
from matformer.layers.flow import noised_rows, target_rows
from matformer.layers.noise_levels import clean_scale, levels, loss_weights, on_index, target, time_of_log_snr
from matformer.parcels import MediaUnits
from tests.made import document, image, one_a_row, plain_host, tiny_run, with_media

OBJECTIVES: tuple[MediaObjective, ...] = ("flow", "ddpm_eps", "ddpm_v")
INDICES = torch.arange(1000)


def spans_at(times: torch.Tensor) -> MediaUnits:
    """One span of an image for each t."""
    batch = one_a_row([document(f"d{i}", b"x", image(i)) for i in range(len(times))], length=9)
    return replace(batch.media["image"], time_T=times.float())


def ddpm() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def test_ddpms_noised_patches_and_targets_are_those_of_diffusers() -> None:
    units = spans_at((INDICES.double() + 0.5) / 1000)
    step = INDICES[units.span_N]
    assert torch.equal(units.noised_row_Q, torch.arange(len(step)))
    noised, _ = noised_rows(units, objective="ddpm_eps")
    torch.testing.assert_close(noised, ddpm().add_noise(units.value_NF, units.noise_QF, step), rtol=0, atol=1e-6)
    assert torch.equal(target_rows(units, objective="ddpm_eps"), units.noise_QF)
    velocity = ddpm().get_velocity(units.value_NF, units.noise_QF, step)
    torch.testing.assert_close(target_rows(units, objective="ddpm_v"), velocity, rtol=0, atol=1e-6)


def test_a_level_of_the_neighbour_index_is_seen() -> None:
    units = spans_at((INDICES.double() + 1.5) / 1000)
    noised, _ = noised_rows(units, objective="ddpm_v")
    theirs = ddpm().add_noise(units.value_NF, units.noise_QF, INDICES[units.span_N])
    assert (noised - theirs).abs().max() > 1e-4


def test_flows_noised_patches_are_those_of_diffusers_and_one_step_goes_back() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(16)
    units = spans_at(torch.as_tensor(scheduler.sigmas)[:16])
    noised, time = noised_rows(units)
    for span, step in enumerate(torch.as_tensor(scheduler.timesteps)):
        rows = units.span_N == span
        theirs = scheduler.scale_noise(units.value_NF[rows], step[None], units.noise_QF[rows])
        torch.testing.assert_close(noised[rows], theirs, rtol=0, atol=1e-6)
    back = noised - time[:, None] * target_rows(units)
    torch.testing.assert_close(back, units.value_NF, rtol=0, atol=1e-5)


def test_an_index_is_the_thousandth_that_a_time_lies_in() -> None:
    assert [on_index(time) for time in (0.0, 0.0011, 0.4999, 0.99999, 1.0)] == [0.0005, 0.0015, 0.4995, 0.9995, 0.9995]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_span_that_no_noise_was_drawn_for_is_clean(objective: MediaObjective) -> None:
    model = with_media(tiny_run().model, objective=objective)
    units = build_batch([document("a", b"x", image(1))], model=model, sequence_latents=9).media["image"]
    assert torch.equal(noised_rows(units, objective=objective)[0], units.value_NF)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ends_are_clean_and_nothing_but_noise_and_log_snr_names_a_time(objective: MediaObjective) -> None:
    alpha, sigma = levels(torch.tensor([0.0, 1.0]), objective=objective)
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-7)
    torch.testing.assert_close(sigma, torch.tensor([0.0, 1.0]), rtol=0, atol=1e-7)
    for log_snr in (-4.0, -2.0, 0.0, 2.0, 4.0, 7.3):
        time = torch.tensor(time_of_log_snr(log_snr, objective=objective), dtype=torch.float64)
        alpha, sigma = levels(time, objective=objective)
        assert 2 * math.log(alpha / sigma) == pytest.approx(log_snr, abs=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_clean_latent_follows_from_the_target_and_so_does_its_error(objective: MediaObjective) -> None:
    units = spans_at(torch.tensor([0.11, 0.5, 0.83]))
    noised, time = noised_rows(units, objective=objective)
    at = levels(time.double()[:, None], objective=objective)
    wanted = target(at, objective=objective)

    def clean(predicted: torch.Tensor) -> torch.Tensor:
        return (wanted.of_noise * noised - at.sigma * predicted) / wanted.determinant

    aim = target_rows(units, objective=objective).double()
    torch.testing.assert_close(clean(aim), units.value_NF.double(), rtol=0, atol=1e-5)
    moved = (clean(aim + 0.1) - clean(aim)).abs() / 0.1
    torch.testing.assert_close(moved, clean_scale(time.double()[:, None], objective=objective).expand_as(moved))


def test_min_snr_weights_are_those_of_the_paper_over_diffusers_snr() -> None:
    times, snr = ((INDICES.double() + 0.5) / 1000).float(), compute_snr(ddpm(), INDICES)
    least = torch.minimum(snr, torch.tensor(5.0))
    for objective, expected in (("ddpm_eps", least / snr), ("ddpm_v", least / (snr + 1))):
        found = loss_weights(times, objective=objective, weighting="min_snr", gamma=5.0)
        torch.testing.assert_close(
            found, expected, rtol=2e-3, atol=1e-6
        )  # theirs is all float32: snr 2.4e-9 at the end
        torch.testing.assert_close(found[20:990], expected[20:990], rtol=1e-4, atol=0)
    flow = loss_weights(torch.tensor([0.2, 0.8]), objective="flow", weighting="min_snr", gamma=5.0)
    torch.testing.assert_close(flow, torch.tensor([5 * 0.2**2, 0.2**2]))  # snr 16 and 1/16, x = x_t - t v


def test_cosmap_weights_are_those_of_diffusers() -> None:
    times = torch.linspace(0.01, 0.99, 50)
    found = loss_weights(times, objective="flow", weighting="cosmap", gamma=5.0)
    torch.testing.assert_close(found, compute_loss_weighting_for_sd3("cosmap", times))
    assert np.array_equal(loss_weights(times, objective="flow", weighting="none", gamma=5.0), np.ones(50, np.float32))


def test_a_span_weighs_by_its_own_t_in_training_and_not_when_held_out() -> None:
    run = tiny_run()
    run = run.model_copy(update={"model": with_media(run.model, objective="ddpm_v", loss_weighting="min_snr")})
    documents, times = [document("a", b"x", image(1)), document("b", b"y", image(2))], iter((0.2, 0.91))

    def draw(key: str, span: int, shape: tuple[int, int]) -> Noise:
        return Noise(False, next(times), np.ones(shape, np.float32))

    pieces = [[Piece(one, Place(), Place(len(one.spans)))] for one in documents]
    weighted = pack_batch(pieces, [draw] * 2, model=run.model, sequence_latents=9)
    units = weighted.media["image"]
    assert units.time_T.tolist() == pytest.approx([0.2005, 0.9105])
    alpha, sigma = levels(units.time_T, objective="ddpm_v")
    expected = ((alpha / sigma).square().clamp(max=5) * sigma.square()).tolist()
    assert units.weight_T.tolist() == pytest.approx(expected, rel=1e-5)
    plain = replace(weighted, media={**weighted.media, "image": replace(units, weight_T=torch.ones(2))})
    model = plain_host(run).model.requires_grad_(False)
    torch.testing.assert_close(model(weighted)["image"], model(plain)["image"] * units.weight_T)
    assert with_noise(weighted, time=0.3, seed=0, index=1).media["image"].weight_T.tolist() == [1.0, 1.0]
