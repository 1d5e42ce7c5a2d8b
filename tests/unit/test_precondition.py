import json
from pathlib import Path

import numpy as np
import pytest
import torch

from matformer.config.schema import DataConfig, MediaObjective, SourceConfig
from matformer.data.statistics import with_statistics
from matformer.engine.baselines import gaussian_flow_loss
from matformer.errors import DataError
from matformer.layers.noise_levels import levels, target, time_of_log_snr
from matformer.layers.precondition import Precondition
from matformer.modalities import patch_variance
from tests.made import MODEL, tiny_run

OBJECTIVES: tuple[MediaObjective, ...] = ("flow", "ddpm_eps", "ddpm_v")


def test_a_network_that_says_nothing_is_the_best_linear_predictor() -> None:
    # the baseline of the reports, written for another purpose, in numpy, with noise of its own
    variance, draws = np.array([4.0, 0.25, 1e-3]), np.random.default_rng(0)
    data = (draws.standard_normal((200_000, 3)) * np.sqrt(variance)).astype(np.float32)
    clean = torch.from_numpy(data[100_000:])
    for time in (0.05, 0.5, 0.9):
        expected = gaussian_flow_loss(data[:100_000], data[100_000:], times=(time,), covariance="channel").value
        noise = torch.from_numpy(draws.standard_normal(clean.shape, dtype=np.float32))
        noised, times = (1 - time) * clean + time * noise, torch.full((len(clean),), time)
        velocity = Precondition(variance.tolist()).prediction(torch.zeros_like(clean), noised, times)
        assert float((velocity - (noise - clean)).square().mean()) == pytest.approx(expected, rel=0.01)


def test_input_and_target_of_the_network_have_unit_variance() -> None:
    draws, variance = torch.Generator().manual_seed(0), torch.tensor([9.0, 0.04])
    clean = torch.randn(100_000, 2, generator=draws) * variance.sqrt()
    noise = torch.randn(clean.shape, generator=draws)
    part = Precondition(variance.tolist())
    for time in (0.0, 0.3, 0.8):
        times = torch.full((len(clean),), time)
        noised = (1 - time) * clean + time * noise
        torch.testing.assert_close(part.network_input(noised, times).var(0), torch.ones(2), rtol=0.02, atol=0)
        linear = part.prediction(torch.zeros_like(clean), noised, times)
        gain = part.prediction(torch.ones_like(clean), noised, times) - linear
        torch.testing.assert_close(((noise - clean - linear) / gain).var(0), torch.ones(2), rtol=0.02, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_closed_form_is_the_least_squares_fit_of_every_target(objective: MediaObjective) -> None:
    variance = torch.tensor([4.0, 0.05], dtype=torch.float64)
    draws = torch.randn(2, 500, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    clean = draws[0] * (variance / draws[0].square().mean(0)).sqrt()
    noise = draws[1] - clean * (draws[1] * clean).mean(0) / variance  # exactly uncorrelated, of variance exactly 1
    noise = noise / noise.square().mean(0).sqrt()
    part = Precondition(variance.tolist(), objective=objective).double()
    for level in (0.1, 0.5, 0.9):
        times = torch.tensor([level], dtype=torch.float64)
        at = levels(times, objective=objective)
        wanted = target(at, objective=objective)
        x_t, aim = at.alpha * clean + at.sigma * noise, wanted.of_value * clean + wanted.of_noise * noise
        slope = (x_t * aim).sum(0) / x_t.square().sum(0)
        ones = torch.ones(1, 2, dtype=torch.float64)
        linear = part.prediction(torch.zeros_like(ones), ones, times)
        gain = part.prediction(ones, ones, times) - linear
        close = {"rtol": 1e-6, "atol": 1e-6}  # the variances are kept in float32
        torch.testing.assert_close(linear[0], slope, **close)
        torch.testing.assert_close(gain[0], (aim - slope * x_t).square().mean(0).sqrt(), **close)
        torch.testing.assert_close(part.network_input(ones, times)[0], x_t.square().mean(0).rsqrt(), **close)


def test_the_same_answer_of_the_network_is_the_same_clean_latent_under_every_objective() -> None:
    answer, clean, noise = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = []
    for objective in OBJECTIVES:
        time = torch.tensor(time_of_log_snr(-1.0, objective=objective), dtype=torch.float64)
        at = levels(time, objective=objective)
        wanted = target(at, objective=objective)
        x_t = at.alpha * clean + at.sigma * noise
        predicted = Precondition([3.0, 0.2], objective=objective).prediction(answer, x_t, time.expand(5))
        found.append((wanted.of_noise * x_t - at.sigma * predicted) / wanted.determinant)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_without_scales_the_network_reads_and_answers_as_it_is() -> None:
    part, x, times = Precondition([4.0], scaled=False), torch.randn(3, 1), torch.tensor([0.0, 0.5, 0.9])
    assert torch.equal(part.network_input(x, times), x)
    assert torch.equal(part.prediction(2 * x, x, times), 2 * x)


def test_a_patch_names_its_variances_in_the_order_of_patchify() -> None:
    media = MODEL.media["image"].model_copy(update={"channel_variance": (3.0, 0.5)})
    assert patch_variance(media) == [3.0] * 4 + [0.5] * 4
    assert patch_variance(media.model_copy(update={"precondition": "unit"})) == [1.0] * 8
    assert patch_variance(MODEL.media["image"]) == [1.0] * 8


def pairs_at(root: Path, *, channels: int) -> DataConfig:
    folder = root / "pictures" / "train"
    folder.mkdir(parents=True)
    latents = {"shift": [0.0] * channels, "scale": 0.5, "channel_variance": [8.0, 0.0, 1.0][:channels]}
    (folder / "manifest.json").write_text(json.dumps({"latents": latents}))
    source = SourceConfig(path="pictures", form="pairs", modality="image", weight=1.0)
    return DataConfig(root=str(root), recipe=None, lanes=8, sequence_latents=48, sources={"pictures": source})


def test_a_run_takes_the_variances_of_its_data(tmp_path: Path) -> None:
    config = tiny_run().model_copy(update={"data": pairs_at(tmp_path, channels=2)})
    media = with_statistics(config).model.media
    assert media["image"].channel_variance == (2.0, 1e-4)
    assert media["audio"].channel_variance is None  # no source has it
    told = config.model.media["image"].model_copy(update={"channel_variance": (1.0, 2.0)})
    model = config.model.model_copy(update={"media": {"image": told}})
    assert with_statistics(config.model_copy(update={"model": model})).model.media["image"] == told


def test_other_channels_than_the_models_are_one_sentence(tmp_path: Path) -> None:
    config = tiny_run().model_copy(update={"data": pairs_at(tmp_path, channels=3)})
    with pytest.raises(DataError, match="model.media.image.channels = 2 channels, got 3 in data.sources.pictures"):
        with_statistics(config)


def test_statistics_that_are_missing_are_one_sentence(tmp_path: Path) -> None:
    data = pairs_at(tmp_path, channels=2)
    (tmp_path / "pictures" / "train" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="must hold the latents' statistics"):
        with_statistics(tiny_run().model_copy(update={"data": data}))
