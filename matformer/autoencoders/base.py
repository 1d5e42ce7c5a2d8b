"""What every autoencoder promises. Shape letters: B samples, C latent channels; `*grid` are latent cells."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matformer.layers.saved import Saved, saved

SETTINGS_FILE = "autoencoder.json"
WEIGHTS_FILE = "autoencoder.safetensors"
LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to it, as diffusers does: float16 holds them, and none makes a sample infinite."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and log-variance of the latent; `logvar` is None where encoding is deterministic."""

    mean: Float[Tensor, "B C *grid"]
    logvar: Float[Tensor, "B C *grid"] | None = None


class Autoencoder(nn.Module, ABC):
    """Media [B, channels_in, *axes] <-> latents [B, C, *grid].

    Pixels run from -1 to 1, sound is the waveform in full-scale units.
    kind: its name in the saved file. channels: C. downsampling: media samples of a latent cell along each axis.
    media_channels: channels_in. sample_rate: Hz where the medium is sound, else None.
    stochastic: whether `encode` gives a log-variance.
    has_pictures: whether media of two axes are pictures and of three are video; else they are arrays alone.
    shift, scale: the normalisation (mean - shift) * scale its makers trained with, one number for all channels or one a
    channel; None where they left none.
    """

    kind: str
    channels: int
    downsampling: tuple[int, ...]
    media_channels: int
    sample_rate: int | None = None
    stochastic: bool = False
    has_pictures: bool = True
    shift: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    @abstractmethod
    def encode(self, media: Float[Tensor, "B c *axes"]) -> Moments:
        """Latents before normalisation; the manifest of a data set carries shift and scale."""

    @abstractmethod
    def decode(self, latent: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B c *axes"]:
        """Media of un-normalised latents."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them."""

    def forward(self, media: Float[Tensor, "B c *axes"]) -> Float[Tensor, "B c *axes"]:
        """Media through the latent's mean and back."""
        return self.decode(self.encode(media).mean)

    def media_axes(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Pixels, frames or samples whose latent has this grid."""
        return tuple(cells * factor for cells, factor in zip(grid, self.downsampling, strict=True))

    @property
    def modality(self) -> str:
        """What it codes, by the name that configs give it."""
        if self.sample_rate is not None:
            return "audio"
        return {2: "image", 3: "video"}.get(len(self.downsampling), "tensor") if self.has_pictures else "tensor"

    def identity(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "channels": self.channels,
            "downsampling": list(self.downsampling),
            "media_channels": self.media_channels,
            "sample_rate": self.sample_rate,
            "shift": list(self.shift) if self.shift else None,
            "scale": list(self.scale) if self.scale else None,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what `save` writes: of the settings, then of the weights."""
        return self._saved().fingerprint

    def save(self, folder: Path) -> None:
        """Write settings (JSON) and weights (safetensors) into `folder`, which is made when missing."""
        self._saved().write(folder, settings_file=SETTINGS_FILE, weights_file=WEIGHTS_FILE)

    def _saved(self) -> Saved:
        return saved(self, {"kind": self.kind, "settings": self.settings()}, sort_keys=True)


def principal_axes(second_moment: Float[Tensor, "n n"], *, num_axes: int) -> Float[Tensor, "C n"]:
    """Unit eigenvectors of the largest eigenvalues, largest first, each with its largest entry positive.

    The sign rule makes the axes a function of the data alone. Where eigenvalues coincide they are not unique.
    """
    _, vectors = torch.linalg.eigh(second_moment.double())
    axes = vectors.flip(1).T[:num_axes]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return (axes * largest.sign()).float().contiguous()


def principal_components(
    chunks: Iterable[Float[Tensor, "_ n"]], *, num_axes: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, "C n"]]:
    """Mean and principal axes of rows that come in chunks, by their covariance in float64."""
    count, total, square = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for chunk in chunks:
        rows = chunk.double()
        total, square, count = total + rows.sum(0), square + rows.T @ rows, count + len(rows)
    mean = total / count
    return mean, principal_axes(square / count - torch.outer(mean, mean), num_axes=num_axes)
