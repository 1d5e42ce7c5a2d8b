"""The demo's pictures and sounds -> latents (float16, un-normalised), their statistics, and what coding costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from data_prep.records import Picture, Sound
from matformer.autoencoders import MDCTPCA, PatchPCA
from matformer.autoencoders.patch_pca import to_pixels, to_signed
from matformer.errors import DataError

FACTOR, PICTURE_CHANNELS = 8, 32
HOP, SOUND_CHANNELS = 160, 64
BUCKETS = (32, 64, 96, 128, 192, 256)
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Coded:
    """A sample's latent. length: cells that are not padding."""

    moments: Float[np.ndarray, "C ..."]
    length: int

    @property
    def bucket(self) -> list[int]:
        """Shape of the grid."""
        return list(self.moments.shape[1:])


@dataclass(frozen=True, slots=True)
class Normalisation:
    """normalised = (mean - shift) * scale: a shift a channel, and one scale that makes the mean variance 1."""

    shift: list[float]
    scale: float
    variance: list[float]
    minimum: list[float]
    maximum: list[float]

    def manifest(self) -> dict[str, Any]:
        """As manifests carry it."""
        return {
            "formula": "(mean - shift) * scale",
            "shift": self.shift,
            "scale": self.scale,
            "channel_mean": self.shift,
            "channel_variance": self.variance,
            "channel_min": self.minimum,
            "channel_max": self.maximum,
        }


def pixels_of(pictures: Sequence[Picture]) -> UInt8[torch.Tensor, "B 3 y x"]:
    """All pictures as one tensor."""
    return torch.from_numpy(np.stack([picture.pixels for picture in pictures])).movedim(3, 1).contiguous()


def fit_pictures(pictures: Sequence[Picture]) -> PatchPCA:
    """The pictures' autoencoder."""
    return PatchPCA.fit(pixels_of(pictures), factor=FACTOR, channels=PICTURE_CHANNELS)


def fit_sounds(sounds: Sequence[Sound], *, sample_rate: int) -> MDCTPCA:
    """The sounds' autoencoder."""
    waves = [torch.from_numpy(sound.wave) for sound in sounds]
    return MDCTPCA.fit(waves, hop=HOP, channels=SOUND_CHANNELS, sample_rate=sample_rate)


def encode_pictures(pictures: Sequence[Picture], *, autoencoder: PatchPCA) -> dict[str, Coded]:
    """Key -> latent [C, 8, 8]."""
    coded = {}
    for start in range(0, len(pictures), CHUNK):
        part = pictures[start : start + CHUNK]
        means = autoencoder.encode(to_signed(pixels_of(part))).mean.half().numpy()
        coded.update({picture.key: Coded(mean, mean[0].size) for picture, mean in zip(part, means, strict=True)})
    return coded


def encode_sounds(sounds: Iterable[Sound], *, autoencoder: MDCTPCA) -> dict[str, Coded]:
    """Key -> latent [C, T], T rounded up to a bucket with encoded silence; what is longer than all is left out."""
    coded = {}
    for sound in sounds:
        length = autoencoder.num_cells(len(sound.wave))
        bucket = next((cells for cells in BUCKETS if cells >= length), None)
        if bucket is not None:
            wave = np.zeros((1, 1, (bucket - 1) * HOP), np.float32)
            wave[0, 0, : len(sound.wave)] = sound.wave
            mean = autoencoder.encode(torch.from_numpy(wave)).mean[0].half().numpy()
            coded[sound.key] = Coded(np.ascontiguousarray(mean), length)
    return coded


def fit_normalisation(coded: Iterable[Coded]) -> Normalisation:
    """Statistics over all cells as they are stored, padding included, because that is scored too."""
    cells = np.concatenate([item.moments.reshape(len(item.moments), -1) for item in coded], axis=1).astype(np.float64)
    variance = cells.var(axis=1)
    if not variance.mean() > 0:
        raise DataError("latents must vary, got a variance of 0; check the media of this data set")
    return Normalisation(
        shift=cells.mean(axis=1).tolist(),
        scale=float(1 / np.sqrt(variance.mean())),
        variance=variance.tolist(),
        minimum=cells.min(axis=1).tolist(),
        maximum=cells.max(axis=1).tolist(),
    )


def picture_quality(pictures: Sequence[Picture], *, coded: dict[str, Coded], autoencoder: PatchPCA) -> dict[str, float]:
    """Mean and 5th percentile over pictures of the peak signal-to-noise ratio in dB, from the stored latents."""
    decibels = []
    for start in range(0, len(pictures), CHUNK):
        part = pictures[start : start + CHUNK]
        latent = torch.from_numpy(np.stack([coded[picture.key].moments for picture in part])).float()
        error = (to_pixels(autoencoder.decode(latent)).float() - pixels_of(part).float()).square().mean((1, 2, 3))
        decibels += (10 * torch.log10(255**2 / error.clamp_min(1e-3))).tolist()
    return {"psnr_db": float(np.mean(decibels)), "psnr_db_5th_percentile": float(np.percentile(decibels, 5))}


def sound_quality(sounds: Sequence[Sound], *, coded: dict[str, Coded], autoencoder: MDCTPCA) -> dict[str, float]:
    """Signal-to-noise ratio in dB from the stored latents: mean over sounds, and of all their samples together."""
    ratios, signal, noise = [], 0.0, 0.0
    for sound in sounds:
        if sound.key in coded:
            latent = torch.from_numpy(coded[sound.key].moments)[None].float()
            decoded = autoencoder.decode(latent)[0, 0, : len(sound.wave)].numpy()
            power = float(np.square(sound.wave).sum())
            error = float(np.square(decoded - sound.wave).sum())
            if power > 0 and error > 0:
                ratios.append(10 * np.log10(power / error))
                signal, noise = signal + power, noise + error
    return {"snr_db": float(np.mean(ratios)), "snr_db_all_samples": float(10 * np.log10(signal / noise))}
