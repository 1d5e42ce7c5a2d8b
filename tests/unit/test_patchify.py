"""Patchify: raster order written out, and an exact inverse for every rank."""

from __future__ import annotations

import pytest
import torch

from matformer.errors import ParcelError
from matformer.layers.patchify import patchify, unpatchify


def test_patches_of_an_image_stand_in_raster_order_with_channels_first() -> None:
    latent = torch.arange(2 * 4 * 4).reshape(2, 4, 4).float()
    patches = patchify(latent, rank=2, patch=2)
    assert patches.shape == (4, 8)
    assert patches[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert patches[1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert patches[2].tolist() == [8, 9, 12, 13, 24, 25, 28, 29]


@pytest.mark.parametrize("grid", [(8,), (4, 6), (2, 4, 6)])
def test_unpatchify_undoes_patchify(grid: tuple[int, ...]) -> None:
    latent = torch.randn(3, 5, *grid)
    patches = patchify(latent, rank=len(grid), patch=2)
    assert torch.equal(unpatchify(patches, grid=grid, patch=2), latent)
    assert torch.equal(patches[1], patchify(latent[1], rank=len(grid), patch=2))


def test_a_patch_that_does_not_divide_the_grid_is_refused() -> None:
    with pytest.raises(ParcelError, match="divide"):
        patchify(torch.zeros(1, 5), rank=1, patch=2)
    with pytest.raises(ParcelError, match="divide"):
        unpatchify(torch.zeros(1, 2, 2), grid=(5,), patch=2)
