"""Measures of reconstruction against closed forms and against libraries that we did not write."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import audio_utils

from data_prep.quality import channel_statistics, log_mel, mel_distance, mel_filters, psnr, snr, ssim


def pictures(seed: int) -> Tensor:
    return torch.rand(2, 3, 24, 30, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_constant_error_is_its_closed_form() -> None:
    original = pictures(0)
    expected = 20 * math.log10(2 / 0.1)  # the peak-to-peak range is 2
    torch.testing.assert_close(psnr(original + 0.1, original), torch.full((2,), expected), atol=1e-3, rtol=0)
    assert (psnr(original, original) > 90).all()


def test_ssim_of_constant_pictures_is_its_luminance_term() -> None:
    a, b = 0.25, 0.75  # on the scale from 0 to 1
    one, other = torch.full((1, 3, 16, 16), 2 * a - 1), torch.full((1, 3, 16, 16), 2 * b - 1)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(one, other).item() == pytest.approx(expected, abs=1e-5)
    assert ssim(one, one).item() == pytest.approx(1.0)


def test_ssim_is_that_of_windows_looked_at_one_by_one() -> None:
    x, y = ((pictures(seed)[:1, :1, :14, :13].double() + 1) / 2 for seed in (1, 2))
    place = torch.arange(11).double() - 5
    weights = torch.outer(*[torch.exp(-place.square() / 4.5)] * 2)
    weights /= weights.sum()
    found = []
    for top in range(4):
        for left in range(3):
            a, b = (one[0, 0, top : top + 11, left : left + 11] for one in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            found.append(
                (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
            )  # fmt: skip
    ours = ssim(pictures(1)[:1, :1, :14, :13], pictures(2)[:1, :1, :14, :13])
    assert ours.item() == pytest.approx(torch.stack(found).mean().item(), abs=1e-6)


def test_ssim_and_psnr_are_those_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    original = pictures(3)
    ours = (original + 0.3 * pictures(4)).clamp(-1, 1)
    for i in range(2):
        a, b = ((one[i].movedim(0, 2).double().numpy() + 1) / 2 for one in (original, ours))
        theirs = metrics.structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=2
        )
        assert ssim(ours, original)[i].item() == pytest.approx(theirs, abs=1e-5)
        assert psnr(ours, original)[i].item() == pytest.approx(
            metrics.peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-3
        )


@pytest.mark.parametrize(("rate", "size", "mels"), [(8000, 256, 40), (22050, 512, 80), (44100, 1024, 80)])
def test_log_mel_is_that_of_transformers(rate: int, size: int, mels: int) -> None:
    draws = np.random.default_rng(0)
    wave = draws.standard_normal(rate // 4).astype(np.float32) * 0.2
    filters = audio_utils.mel_filter_bank(
        size // 2 + 1, mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney", triangularize_in_mel_space=False
    )
    np.testing.assert_allclose(mel_filters(size // 2 + 1, mels=mels, rate=rate).numpy(), filters.T, atol=1e-7)
    theirs = audio_utils.spectrogram(
        wave, audio_utils.window_function(size, "hann", periodic=True), size, size // 4, power=2.0,
        pad_mode="constant", mel_filters=filters, mel_floor=1e-6,
    )  # fmt: skip
    ours = log_mel(torch.from_numpy(wave)[None, None], rate=rate)[0, 0]
    np.testing.assert_allclose(ours.numpy(), 10 * np.log10(theirs), atol=2e-3)


def test_a_sound_twice_as_loud_is_six_decibels_away() -> None:
    wave = torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert mel_distance(2 * wave, wave, rate=8000).tolist() == pytest.approx([20 * math.log10(2)] * 2, abs=0.05)
    assert snr(1.1 * wave, wave).tolist() == pytest.approx([20.0] * 2, abs=1e-3)
    assert mel_distance(torch.zeros(1, 1, 4000), torch.zeros(1, 1, 4000), rate=8000).item() == 0


def test_kurtosis_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(200_000, generator=generator) * 3 + 2
    uniform = torch.rand(200_000, generator=generator)
    two = torch.tensor([-1.0, 1.0]).repeat(100_000)
    found = channel_statistics(torch.stack([gaussian, uniform, two, torch.ones(200_000)]))
    assert found["mean"] == pytest.approx([2, 0.5, 0, 1], abs=0.03)
    assert found["std"] == pytest.approx([3, 12**-0.5, 1, 0], abs=0.03)
    assert found["kurtosis"] == pytest.approx([0, -1.2, -2, 0], abs=0.06)
