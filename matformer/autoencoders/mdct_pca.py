"""Sound as principal components of its MDCT frames: a closed-form autoencoder, nothing trained.

MDCT of hop N: frames of 2N samples overlap by half, each gives N coefficients; with a sine window before the transform
and after its inverse, the aliasing of neighbouring frames cancels, so all N coefficients give the sound back exactly.
Source: Princen, Johnson, Bradley 1987, "Subband/transform coding using filter bank designs based on time domain
aliasing cancellation", equations 1 to 4; ours is orthonormal, as one matrix [N, 2N].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from matformer.autoencoders.base import Autoencoder, Moments, principal_axes
from matformer.errors import DataError


def mdct_matrix(hop: int) -> Float[Tensor, "n n2"]:
    """Window and transform in one: coefficients = matrix @ frame; its transpose is the inverse before overlap-add."""
    place = torch.arange(2 * hop, dtype=torch.float64)
    frequency = torch.arange(hop, dtype=torch.float64)
    window = torch.sin(math.pi / (2 * hop) * (place + 0.5))
    phase = math.pi / hop * torch.outer(frequency + 0.5, place + 0.5 + hop / 2)
    return (math.sqrt(2 / hop) * torch.cos(phase) * window).float()


def mdct(wave: Float[Tensor, "B samples"], *, matrix: Float[Tensor, "n n2"]) -> Float[Tensor, "B T n"]:
    """T = ceil(samples / hop) + 1 frames, because half a frame of silence stands at either end."""
    hop = len(matrix)
    tail = -wave.shape[1] % hop
    frames = functional.pad(wave, (hop, hop + tail)).unfold(1, 2 * hop, hop)
    return frames @ matrix.T


def inverse_mdct(frames: Float[Tensor, "B T n"], *, matrix: Float[Tensor, "n n2"]) -> Float[Tensor, "B samples"]:
    """(T - 1) * hop samples: the half frames at either end are dropped."""
    halves = (frames @ matrix).unflatten(2, (2, -1))
    return (halves[:, 1:, 0] + halves[:, :-1, 1]).flatten(1)


@final
class MDCTPCA(Autoencoder):
    """[B, 1, samples] <-> [B, C, T], T = ceil(samples / hop) + 1; decoding gives (T - 1) * hop samples.

    The axes pass through the origin (no mean is taken off), so silence is exactly zero in every channel.
    """

    kind = "mdct_pca"
    media_channels = 1
    axes: Tensor
    matrix: Tensor

    def __init__(self, *, hop: int, channels: int, sample_rate: int) -> None:
        super().__init__()
        if not 1 <= channels <= hop:
            raise DataError(
                f"a hop of {hop} samples has 1 to {hop} channels, got {channels}; change the autoencoder's channels"
            )
        self.hop, self.channels, self.sample_rate, self.downsampling = hop, channels, sample_rate, (hop,)
        self.register_buffer("axes", torch.eye(channels, hop))
        self.register_buffer("matrix", mdct_matrix(hop), persistent=False)

    @classmethod
    def fit(cls, waves: list[Float[Tensor, " _"]], *, hop: int, channels: int, sample_rate: int) -> MDCTPCA:
        """The best linear code of these sounds' MDCT frames, by their second moment in float64."""
        autoencoder = cls(hop=hop, channels=channels, sample_rate=sample_rate)
        square = torch.zeros(hop, hop, dtype=torch.float64)
        for wave in waves:
            frames = mdct(wave[None], matrix=autoencoder.matrix)[0].double()
            square += frames.T @ frames
        autoencoder.axes.copy_(principal_axes(square, num_axes=channels))
        return autoencoder.eval()

    def num_cells(self, num_samples: int) -> int:
        """T of a sound of so many samples."""
        return math.ceil(num_samples / self.hop) + 1

    def media_axes(self, grid: Sequence[int]) -> tuple[int, ...]:
        """One cell less than the grid: half a frame of silence stands at either end."""
        return ((grid[0] - 1) * self.hop,)

    def encode(self, media: Float[Tensor, "B c *axes"]) -> Moments:
        """Deterministic. Raises DataError as `check`."""
        self.check(media)
        frames = mdct(media[:, 0], matrix=self.matrix)
        return Moments(mean=(frames @ self.axes.T).movedim(2, 1))

    def decode(self, latent: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B c *axes"]:
        frames = latent.movedim(1, 2) @ self.axes
        return inverse_mdct(frames, matrix=self.matrix)[:, None]

    def check(self, media: Float[Tensor, "B c *axes"]) -> None:
        """Raises DataError unless there is one channel of sound."""
        if media.shape[1] != 1:
            raise DataError(f"sound must have 1 channel, got {media.shape[1]}; mix the source down")

    def settings(self) -> dict[str, Any]:
        return {"hop": self.hop, "channels": self.channels, "sample_rate": self.sample_rate}
