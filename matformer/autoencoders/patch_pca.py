"""Pictures as principal components of their f x f patches: a closed-form autoencoder, nothing trained."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from matformer.autoencoders.base import Autoencoder, Moments, principal_components
from matformer.errors import DataError

FIT_CHUNK = 512


@final
class PatchPCA(Autoencoder):
    """[B, 3, y, x] <-> [B, C, y / f, x / f]: each patch minus the mean patch, on C orthonormal axes.

    The channels are uncorrelated over the pictures of the fit and ordered by variance.
    """

    kind = "patch_pca"
    media_channels = 3
    mean: Tensor
    axes: Tensor

    def __init__(self, *, factor: int, channels: int) -> None:
        super().__init__()
        values = 3 * factor * factor
        if not 1 <= channels <= values:
            raise DataError(
                f"a patch of {factor} x {factor} pixels has 1 to {values} channels, got {channels}; "
                "change the channels of the autoencoder"
            )
        self.factor, self.channels, self.downsampling = factor, channels, (factor, factor)
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("axes", torch.eye(channels, values))

    @classmethod
    def fit(cls, pixels: UInt8[Tensor, "B 3 y x"], *, factor: int, channels: int) -> PatchPCA:
        """The best linear code of these pictures' patches, by their covariance in float64."""
        autoencoder = cls(factor=factor, channels=channels)
        chunks = (functional.pixel_unshuffle(to_signed(chunk), factor) for chunk in pixels.split(FIT_CHUNK))
        patches = (chunk.movedim(1, -1).flatten(0, -2) for chunk in chunks)
        mean, axes = principal_components(patches, num_axes=channels)
        autoencoder.mean.copy_(mean)
        autoencoder.axes.copy_(axes)
        return autoencoder.eval()

    def encode(self, media: Float[Tensor, "B c *axes"]) -> Moments:
        """Deterministic. Raises DataError as `check`."""
        self.check(media)
        patches = functional.pixel_unshuffle(media, self.factor) - self.mean[:, None, None]
        return Moments(mean=torch.einsum("bnyx,cn->bcyx", patches, self.axes))

    def decode(self, latent: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B c *axes"]:
        patches = torch.einsum("bcyx,cn->bnyx", latent, self.axes) + self.mean[:, None, None]
        return functional.pixel_shuffle(patches, self.factor)

    def check(self, media: Float[Tensor, "B c *axes"]) -> None:
        """Raises DataError unless height and width are multiples of the factor."""
        if media.shape[2] % self.factor or media.shape[3] % self.factor:
            raise DataError(
                f"height and width must be multiples of {self.factor}, got {tuple(media.shape[2:])}; "
                "resize the pictures"
            )

    def settings(self) -> dict[str, Any]:
        return {"factor": self.factor, "channels": self.channels}


def to_signed(pixels: UInt8[Tensor, "B 3 y x"]) -> Float[Tensor, "B 3 y x"]:
    """0 .. 255 -> -1 .. 1."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(media: Float[Tensor, "B 3 y x"]) -> UInt8[Tensor, "B 3 y x"]:
    """-1 .. 1 -> 0 .. 255, rounded and clipped."""
    return ((media + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
