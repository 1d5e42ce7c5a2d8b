"""Convolutions over the latent cells of media spans, each copy of a span on a canvas of its own.

Rows of patches are laid on canvases of the largest shape, cells that no patch covers are zero and stay zero, so that a
span's answer does not depend on what else is in the batch. One level of a U-Net: `CellsDown` before patches become
latents, `CellsUp` after latents become patches, with the noised cells as its skip.
Source: Transfusion (Zhou 2024), section 3.2 (U-Net down and up instead of a linear map).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.layers.norm import RMSNorm
from matformer.layers.patchify import patchify, unpatchify
from matformer.shapes import REACH

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AXES = {1: (0,), 2: (1, 2), 3: (0, 1, 2)}  # of t, y, x


@dataclass(frozen=True, slots=True)
class CellShape:
    """Canvases of one modality: places along its axes (of t, y, x), cells of a patch along each, channels."""

    places: Sequence[int]
    patch: int
    rank: int
    channels: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Patches along each of the modality's own axes."""
        return tuple(self.places[axis] for axis in _AXES[self.rank])

    @property
    def cells(self) -> tuple[int, ...]:
        return tuple(self.patch * size for size in self.sizes)


@dataclass(frozen=True, slots=True)
class Canvases:
    """Where each row stands: its canvas and its place there as one number. known: 1 on cells that a row covers."""

    shape: CellShape
    index_R: Int[Tensor, " R"]
    count: int
    known: Float[Tensor, "K 1 *cells"]

    def lay(self, rows_RF: Float[Tensor, "R F"]) -> Float[Tensor, "K C *cells"]:
        """Rows onto the canvases, zero elsewhere."""
        return _laid(rows_RF, self.index_R, count=self.count, shape=self.shape)

    def take(self, cells: Float[Tensor, "K C *cells"]) -> Float[Tensor, "R F"]:
        """The inverse of `lay`."""
        return patchify(cells, rank=self.shape.rank, patch=self.shape.patch).flatten(0, 1)[self.index_R]


def canvases(
    copy_R: Int[Tensor, " R"], place_RX: Int[Tensor, "R 3"], *, count: int, shape: CellShape, dtype: torch.dtype
) -> Canvases:
    """copy: the canvas of each row, below `count`; no two rows share a canvas and a place."""
    index = copy_R
    for axis, size in zip(_AXES[shape.rank], shape.sizes, strict=True):
        index = index * size + place_RX[:, axis]
    ones = place_RX.new_ones(len(index), shape.patch**shape.rank, dtype=dtype)
    return Canvases(shape, index, count, _laid(ones, index, count=count, shape=shape))


def _laid(
    rows_RF: Float[Tensor, "R F"], index_R: Int[Tensor, " R"], *, count: int, shape: CellShape
) -> Float[Tensor, "K C *cells"]:
    patches, scalars = math.prod(shape.sizes), rows_RF.shape[1]
    dense = rows_RF.new_zeros(count * patches, scalars).index_copy(0, index_R, rows_RF)
    return unpatchify(dense.view(count, patches, scalars), grid=shape.cells, patch=shape.patch)


class CellBlock(nn.Module):
    """Pre-norm residual block of two convolutions; the norm is over the channels of each cell."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.first = convolution(width, width, rank=rank)
        self.output = convolution(width, width, rank=rank)

    def forward(
        self, x: Float[Tensor, "K D *cells"], known: Float[Tensor, "K 1 *cells"]
    ) -> Float[Tensor, "K D *cells"]:
        inner = F.silu(self.first(self.norm(x.movedim(1, -1)).movedim(-1, 1))) * known
        return x + self.output(inner) * known


class CellsDown(nn.Module):
    """Rows of patches -> rows of the Atto's width."""

    def __init__(self, shape: CellShape, *, width: int, atto_width: int) -> None:
        super().__init__()
        self.enter = convolution(shape.channels, width, rank=shape.rank)
        self.block = CellBlock(width, shape.rank)
        self.leave = nn.Linear(width * shape.patch**shape.rank, atto_width)

    def forward(self, rows_RF: Float[Tensor, "R F"], on: Canvases) -> Float[Tensor, "R H"]:
        cells = self.enter(on.lay(rows_RF)) * on.known
        return self.leave(on.take(self.block(cells, on.known)))


class CellsUp(nn.Module):
    """Rows of the Coda's width and the noised patches -> rows of patches; zero at first."""

    def __init__(self, shape: CellShape, *, width: int, coda_width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(coda_width, width * shape.patch**shape.rank)
        self.skip = convolution(shape.channels, width, rank=shape.rank)
        self.block = CellBlock(width, shape.rank)
        self.norm = RMSNorm(width)
        self.velocity = convolution(width, shape.channels, rank=shape.rank)

    def forward(
        self, rows_RD: Float[Tensor, "R D"], noised_RF: Float[Tensor, "R F"], on: Canvases
    ) -> Float[Tensor, "R F"]:
        cells = on.lay(self.enter(rows_RD)) + self.skip(on.lay(noised_RF)) * on.known
        cells = self.norm(self.block(cells, on.known).movedim(1, -1)).movedim(-1, 1)
        return on.take(self.velocity(cells))


def convolution(channels: int, width: int, *, rank: int) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """Over REACH cells along each axis, as many cells out as in."""
    return _CONVOLUTIONS[rank](channels, width, REACH, padding=REACH // 2)
