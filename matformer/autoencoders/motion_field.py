"""Motion as a 2-D field: a vector and an intra flag for each macroblock of a frame, and what they do to a picture.

Nothing is trained and nothing is lost: the latent is the field, each channel times a power of two, so that float16
holds it exactly. Decoding snaps to what a codec can say (quarter pixels, a flag of 0 or 1), so it also gives an exact
field for a latent that was drawn.
"""

from __future__ import annotations

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from matformer.autoencoders.base import Autoencoder, Moments
from matformer.errors import DataError

MACROBLOCK = 16
"""Pixels of a side, in H.264."""
STEP = 0.25
"""Pixels: vectors of H.264 are multiples of it."""
LARGEST = 512.0
"""Pixels: float16 holds every multiple of a quarter up to here."""
DX, DY, INTRA = range(3)


@final
class MotionField(Autoencoder):
    """[B, 3, y, x] <-> [B, 3, y, x], a cell a macroblock: dx, dy in pixels, intra 0 or 1.

    A block at p shows what stood at p + (dx, dy) in the frame before; intra says that the codec drew it anew.
    """

    kind = "motion_field"
    channels = media_channels = 3
    downsampling = (1, 1)
    has_pictures = False
    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(3))

    @classmethod
    def fit(cls, fields: Float[Tensor, "B 3 y x"]) -> MotionField:
        """Gains that bring each channel near a variance of 1; a channel that never varies keeps 1."""
        autoencoder = cls()
        deviation = fields.double().movedim(1, 0).flatten(1).std(1, correction=0)
        powers = torch.where(deviation > 0, -deviation.clamp_min(1e-9).log2().round(), torch.zeros(()).double())
        autoencoder.gain.copy_(torch.exp2(powers.clamp(-8, 8)))
        return autoencoder.eval()

    def encode(self, media: Float[Tensor, "B c *axes"]) -> Moments:
        """Deterministic. Raises DataError where it is no field."""
        self._check(media)
        return Moments(mean=media * self.gain[:, None, None])

    def decode(self, latent: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B c *axes"]:
        field = latent / self.gain[:, None, None]
        vectors = (field[:, :INTRA] / STEP).round().mul(STEP).clamp(-LARGEST, LARGEST)
        return torch.cat((vectors, (field[:, INTRA:] > 0.5).to(field.dtype)), 1)

    def settings(self) -> dict[str, Any]:
        return {}

    def _check(self, media: Tensor) -> None:
        if media.ndim != 4 or media.shape[1] != 3:
            raise DataError(
                f"a field of motion must have shape [3, y, x] (dx, dy, intra), got {tuple(media.shape[1:])}; "
                "prepare the data with data_prep.film"
            )
        if not media[:, :INTRA].abs().max() <= LARGEST:  # `not <=`: nan is no vector either
            raise DataError(
                f"vectors of motion must be at most {LARGEST:g} pixels long on each axis, got "
                f"{float(media[:, :INTRA].abs().max()):g}; leave the frame out"
            )


def warp(picture: Float[Tensor, "c Y X"], fields: Float[Tensor, "T 3 y x"]) -> Float[Tensor, "T c Y X"]:
    """The frames that follow `picture`: each shows, block by block, what stood elsewhere in the one before.

    Between pixels it is bilinear (H.264 has six taps), outside is the border, and a block drawn anew stays as it was,
    because the field does not say what it shows. Y and X are `MACROBLOCK` times y and x. Raises DataError if not.
    """
    height, width = picture.shape[1:]
    if (height, width) != tuple(MACROBLOCK * size for size in fields.shape[2:]):
        raise DataError(
            f"a field of {tuple(fields.shape[2:])} macroblocks must move a picture of {MACROBLOCK} times as many "
            f"pixels, got {(height, width)}; set the buckets of the two modalities alike"
        )
    here = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"))
    to_unit = 2 / torch.tensor([width - 1, height - 1])
    frames = [picture]
    for field in fields:
        vectors = field[:INTRA] * (field[INTRA] < 0.5)
        there = here + vectors.repeat_interleave(MACROBLOCK, 1).repeat_interleave(MACROBLOCK, 2)
        grid = there.movedim(0, 2) * to_unit - 1
        frames.append(
            functional.grid_sample(frames[-1][None], grid[None], padding_mode="border", align_corners=True)[0]
        )
    return torch.stack(frames[1:])
