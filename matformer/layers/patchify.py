"""Grids of latents <-> rows of patches. C channels, N patches in raster order, F = C * patch ** rank scalars."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from matformer.errors import ParcelError


def patchify(latent: Float[Tensor, "*dims"], *, rank: int, patch: int) -> Float[Tensor, "... N F"]:
    """Cut [..., C, *grid] (`rank` grid axes) into patches, raster order; a patch is C by its cells in raster order.

    Raises ParcelError unless `patch` divides every grid axis.
    """
    *batch, channels = latent.shape[: latent.ndim - rank]
    grid = latent.shape[latent.ndim - rank :]
    if any(size % patch for size in grid):
        raise ParcelError(
            f"patch must divide every axis of a grid, got patch {patch} for {tuple(grid)}; set media.patch"
        )
    split = [part for size in grid for part in (size // patch, patch)]
    first = len(batch)
    outer = [first + 1 + 2 * axis for axis in range(rank)]
    inner = [first + 2 + 2 * axis for axis in range(rank)]
    x = latent.reshape(*batch, channels, *split).permute(*range(first), *outer, first, *inner)
    return x.reshape(*batch, math.prod(size // patch for size in grid), channels * patch**rank)


def unpatchify(patches: Float[Tensor, "... N F"], *, grid: tuple[int, ...], patch: int) -> Float[Tensor, "*dims"]:
    """The inverse of `patchify`: [..., N, F] -> [..., C, *grid].

    Raises ParcelError unless `patch` divides every grid axis.
    """
    if any(size % patch for size in grid):
        raise ParcelError(
            f"patch must divide every axis of a grid, got patch {patch} for {tuple(grid)}; set media.patch"
        )
    rank, batch = len(grid), patches.shape[:-2]
    channels = patches.shape[-1] // patch**rank
    first = len(batch)
    x = patches.reshape(*batch, *(size // patch for size in grid), channels, *(patch for _ in grid))
    pairs = [place for axis in range(rank) for place in (first + axis, first + rank + 1 + axis)]
    return x.permute(*range(first), first + rank, *pairs).reshape(*batch, channels, *grid)
