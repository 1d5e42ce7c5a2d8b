"""Clips of video as principal components of their blocks of a few frames by f x f pixels: nothing trained."""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matformer.autoencoders.base import Autoencoder, Moments, principal_components
from matformer.autoencoders.patch_pca import to_signed
from matformer.errors import DataError


@final
class ClipPCA(Autoencoder):
    """[B, 3, t, y, x] <-> [B, C, t / frames, y / f, x / f]: each block minus the mean block, on C orthonormal axes."""

    kind = "clip_pca"
    media_channels = 3
    mean: Tensor
    axes: Tensor

    def __init__(self, *, frames: int, factor: int, channels: int) -> None:
        super().__init__()
        values = 3 * frames * factor * factor
        if not 1 <= channels <= values:
            raise DataError(
                f"a block of {frames} frames of {factor} x {factor} pixels has 1 to {values} channels, got {channels}; "
                "change the channels of the autoencoder"
            )
        self.frames, self.factor, self.channels = frames, factor, channels
        self.downsampling = (frames, factor, factor)
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("axes", torch.eye(channels, values))

    @classmethod
    def fit(cls, clips: list[UInt8[Tensor, "3 t y x"]], *, frames: int, factor: int, channels: int) -> ClipPCA:
        """The best linear code of these clips' blocks (they may differ in size), by their covariance in float64."""
        autoencoder = cls(frames=frames, factor=factor, channels=channels)
        blocks = (autoencoder._blocks(to_signed(clip[None])).flatten(0, -2) for clip in clips)
        mean, axes = principal_components(blocks, num_axes=channels)
        autoencoder.mean.copy_(mean)
        autoencoder.axes.copy_(axes)
        return autoencoder.eval()

    def encode(self, media: Float[Tensor, "B c *axes"]) -> Moments:
        """Deterministic. Raises DataError unless the axes are multiples of a block's."""
        if media.ndim != 5 or any(size % step for size, step in zip(media.shape[2:], self.downsampling, strict=True)):
            raise DataError(
                f"clips must have frames, height and width in multiples of {self.downsampling}, got "
                f"{tuple(media.shape[2:])}; change --buckets"
            )
        return Moments(mean=((self._blocks(media) - self.mean) @ self.axes.T).movedim(-1, 1))

    def decode(self, latent: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B c *axes"]:
        blocks = latent.movedim(1, -1) @ self.axes + self.mean
        split = blocks.unflatten(-1, (3, *self.downsampling)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return split.flatten(2, 3).flatten(3, 4).flatten(4, 5)

    def settings(self) -> dict[str, Any]:
        return {"frames": self.frames, "factor": self.factor, "channels": self.channels}

    def _blocks(self, media: Float[Tensor, "B 3 t y x"]) -> Float[Tensor, "B v w u n"]:
        split = media
        for axis, step in enumerate(self.downsampling):
            split = split.unflatten(2 + 2 * axis, (-1, step))
        return split.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
