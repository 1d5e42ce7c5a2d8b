"""How near decoded media are to the originals, and how latents are distributed."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
MEL_FLOOR = 1e-6
"""Power below which a mel band counts as silent: -60 dB, under what is heard beside speech."""
WINDOW_SECONDS = 0.032


def psnr(ours: Float[Tensor, "B c *axes"], original: Float[Tensor, "B c *axes"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio in dB of media between -1 and 1, a number a sample; 96 where they are equal."""
    error = (ours - original).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-9))


def ssim(ours: Float[Tensor, "B c y x"], original: Float[Tensor, "B c y x"]) -> Float[Tensor, " B"]:
    """Structural similarity of media between -1 and 1, over Gaussian windows that lie inside the picture.

    Source: Wang et al. 2004, equation 13, with its constants; scikit-image's `structural_similarity` with
    `gaussian_weights=True, use_sample_covariance=False` is the same.
    """
    if min(ours.shape[2:]) < SSIM_WINDOW:
        return torch.full((len(ours),), math.nan)
    x, y = (ours.double() + 1) / 2, (original.double() + 1) / 2
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (var_x + var_y + SSIM_C2)
    return (luminance * structure).flatten(1).mean(1).float()


def snr(ours: Float[Tensor, "B c samples"], original: Float[Tensor, "B c samples"]) -> Float[Tensor, " B"]:
    """Signal-to-noise ratio in dB, a number a sound."""
    noise = (ours - original).square().flatten(1).sum(1)
    return 10 * torch.log10(original.square().flatten(1).sum(1).clamp_min(1e-12) / noise.clamp_min(1e-12))


def variance_snr(error: float, *, variance: float) -> float:
    """dB of media of any range, from the mean squared error and their variance: 0 for a constant; 96 without error."""
    return 10 * math.log10(variance / max(error, variance * 10**-9.6)) if variance > 0 else math.nan


def mel_distance(
    ours: Float[Tensor, "B c samples"], original: Float[Tensor, "B c samples"], *, rate: int
) -> Float[Tensor, " B"]:
    """Mean absolute difference of the log-mel spectra in dB, a number a sound."""
    return (log_mel(ours, rate=rate) - log_mel(original, rate=rate)).abs().flatten(1).mean(1)


def log_mel(wave: Float[Tensor, "B c samples"], *, rate: int) -> Float[Tensor, "B c mels frames"]:
    """Power of mel bands (Slaney's scale and norm) in dB above `MEL_FLOOR`'s, Hann windows of about 32 ms."""
    size = 2 ** round(math.log2(WINDOW_SECONDS * rate))
    window = torch.hann_window(size)
    spectrum = torch.stft(
        wave.flatten(0, 1), size, hop_length=size // 4, window=window, center=True, pad_mode="constant",
        return_complex=True,
    ).abs().square()  # fmt: skip
    bands = mel_filters(size // 2 + 1, mels=40 if rate < 16000 else 80, rate=rate) @ spectrum
    return (10 * torch.log10(bands.clamp_min(MEL_FLOOR))).unflatten(0, wave.shape[:2])


@functools.cache
def mel_filters(bins: int, *, mels: int, rate: int) -> Float[Tensor, "mels bins"]:
    """Triangles of unit area between `mels + 2` points, spread evenly over Slaney's scale up to half the rate."""
    edges = _hertz(torch.linspace(0, _mel(rate / 2), mels + 2, dtype=torch.float64))
    frequency = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    slopes = edges[:, None] - frequency[None]
    widths = edges.diff()[:, None]
    rising, falling = -slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]
    return (torch.minimum(rising, falling).clamp_min(0) * (2 / (edges[2:] - edges[:-2]))[:, None]).float()


def channel_statistics(latents: Float[Tensor, "C cells"]) -> dict[str, list[float]]:
    """Mean, standard deviation and excess kurtosis (0 for a Gaussian) of each channel."""
    values = latents.double()
    mean = values.mean(1)
    centred = values - mean[:, None]
    variance = centred.square().mean(1)
    fourth = centred.pow(4).mean(1)
    kurtosis = torch.where(variance > 0, fourth / variance.square().clamp_min(1e-300) - 3, torch.zeros(()).double())
    return {"mean": mean.tolist(), "std": variance.sqrt().tolist(), "kurtosis": kurtosis.tolist()}


def _mel(hertz: float) -> float:
    """Slaney's scale: linear up to 1 kHz (15 mels), logarithmic above."""
    return 3 * hertz / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) * 27 / math.log(6.4)


def _hertz(mel: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.where(mel < 15, 200 * mel / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


def _blurred(media: Float[Tensor, "B c y x"]) -> Float[Tensor, "B c v u"]:
    place = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    flat = media.flatten(0, 1)[:, None]
    flat = functional.conv2d(functional.conv2d(flat, weights[None, None, :, None]), weights[None, None, None])
    return flat.unflatten(0, media.shape[:2])[:, :, 0]
