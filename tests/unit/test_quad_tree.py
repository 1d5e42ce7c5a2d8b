"""Trees of patches: budgets are kept, leaves tile the grid, what is constant is merged, and all is deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from matformer.config.budget import budgeted_leaves, budgeted_splits, root_counts
from matformer.layers.patchify import patchify, unpatchify
from matformer.layers.quad_tree import budgeted_levels, grow, leaf_numbers, merging_errors, num_leaves, roots
from matformer.preludio.leaves import places_of_levels

GRIDS = [(8,), (5,), (4, 4), (8, 8), (3, 5), (2, 7), (1, 6), (2, 4, 6), (3, 3, 3)]
LEVELS = (1, 2, 3)


def patches_of(grid: tuple[int, ...], *, seed: int = 0, features: int = 3) -> np.ndarray:
    """Of patches that differ more the farther they stand from the first corner."""
    draws = np.random.default_rng(seed).standard_normal((*grid, features), dtype=np.float32)
    return (draws * np.indices(grid).sum(0)[..., None]).reshape(-1, features)


def smallest_share(grid: tuple[int, ...], levels: int) -> float:
    return sum(root_counts(grid, levels=levels)) / math.prod(grid)


def every_tree(check: Callable[[tuple[int, ...], int, float, np.ndarray], None]) -> None:
    """`check` for trees of every grid, level and several budgets."""
    for grid in GRIDS:
        for levels in LEVELS:
            least = smallest_share(grid, levels)
            for share in (least, (least + 1) / 2, 1.0):
                tree = budgeted_levels(patches_of(grid), grid=grid, share=share, levels=levels)
                check(grid, levels, share, tree)


def test_a_busy_corner_keeps_its_patches() -> None:
    patches = np.zeros((4, 4, 1), np.float32)
    patches[2:, 2:, 0] = [[1, 2], [3, 4]]
    tree = budgeted_levels(patches.reshape(16, 1), grid=(4, 4), share=7 / 16, levels=2)
    assert tree.reshape(4, 4).tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    number, first = leaf_numbers(tree, grid=(4, 4))
    assert first.tolist() == [0, 2, 8, 10, 11, 14, 15]
    assert number.reshape(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 4], [2, 2, 5, 6]]


def test_errors_are_squared_distances_from_the_mean_of_a_block() -> None:
    patches = patches_of((4, 6), seed=1)
    first, second = merging_errors(patches, grid=(4, 6), levels=2)
    assert (first.shape, second.shape) == ((2, 3), (1, 1))
    grid = patches.reshape(4, 6, 3).astype(np.float64)
    for errors, side in ((first, 2), (second, 4)):
        for block in np.ndindex(*errors.shape):
            y, x = (side * at for at in block)
            cells = grid[y : y + side, x : x + side].reshape(-1, 3)
            assert errors[block] == pytest.approx(np.square(cells - cells.mean(0)).sum(), rel=1e-12)


def test_leaves_are_whole_blocks_that_tile_the_grid() -> None:
    def check(grid: tuple[int, ...], levels: int, share: float, tree: np.ndarray) -> None:
        number, first = leaf_numbers(tree, grid=grid)
        places = np.indices(grid).reshape(len(grid), -1).T
        for leaf, corner in enumerate(first):
            inside = places[number == leaf]
            side = 2 ** tree[corner]
            assert len(inside) == side ** len(grid) and (tree[number == leaf] == tree[corner]).all()
            assert (inside.min(0) % side == 0).all() and (inside.max(0) - inside.min(0) == side - 1).all()
        assert len(first) == num_leaves(tree, rank=len(grid))

    every_tree(check)


def test_a_budget_is_used_up_and_never_exceeded() -> None:
    def check(grid: tuple[int, ...], levels: int, share: float, tree: np.ndarray) -> None:
        leaves, children = num_leaves(tree, rank=len(grid)), 2 ** len(grid)
        assert leaves == budgeted_leaves(grid, share=share, levels=levels)
        assert leaves <= share * math.prod(grid) + 1e-6 < leaves + children - 1

    every_tree(check)


def test_a_constant_medium_has_the_fewest_leaves_whatever_the_budget() -> None:
    for grid in GRIDS:
        for levels in LEVELS:
            constant = np.full((math.prod(grid), 3), 0.1, np.float32)
            tree = budgeted_levels(constant, grid=grid, share=1.0, levels=levels)
            assert num_leaves(tree, rank=len(grid)) == sum(root_counts(grid, levels=levels))
            found = [level for level, _ in roots(grid, levels=levels)]
            assert [found.count(level) for level in range(1, levels + 1)] == root_counts(grid, levels=levels)[1:]


def test_the_same_patches_give_the_same_tree_and_ties_go_in_raster_order() -> None:
    patches = patches_of((8, 8))
    first, again = (budgeted_levels(p, grid=(8, 8), share=0.5, levels=2) for p in (patches, patches.copy()))
    assert (first == again).all()
    tied = grow([np.ones((2, 2))], grid=(4, 4), splits=1)
    assert tied.reshape(4, 4)[:2, :2].tolist() == [[0, 0], [0, 0]] and tied.sum() == 12
    larger = grow([np.ones((4, 4)), np.ones((2, 2))], grid=(8, 8), splits=4)
    assert (larger == 1).all()


def test_a_share_that_rounds_to_whole_patches_is_whole() -> None:
    assert budgeted_splits((100,), share=0.29, levels=2) == 29 - 25


def test_cells_of_leaves_are_all_cells_and_go_back_where_they_were() -> None:
    def check(grid: tuple[int, ...], levels: int, share: float, tree: np.ndarray) -> None:
        latent = torch.randn(2, *(2 * size for size in grid))
        patches = patchify(latent, rank=len(grid), patch=2)
        slot = 7 + torch.from_numpy(leaf_numbers(tree, grid=grid)[0])
        back = torch.full_like(patches, torch.nan)
        level = torch.from_numpy(tree)
        cells = [2 ** (len(grid) * larger) for larger in range(1, levels + 1)]
        counts = torch.bincount(level).tolist()
        for place in places_of_levels(slot, level, patches_of_levels=counts, cells=cells):
            of_leaves = patches[place].flatten(1)  # what a level's own map reads
            back[place.flatten()] = of_leaves.view(-1, patches.shape[1])
        assert torch.equal(unpatchify(back, grid=latent.shape[1:], patch=2), latent)

    every_tree(check)
