"""Trees over a grid of patches: blocks of 2^level patches a side, aligned; a leaf becomes one latent.

Runs of sound (binary trees), quad-trees over pictures, octrees over video: the same arithmetic at any rank. A tree is
written as the level of the leaf that each patch lies in: a picture of 4 x 4 patches whose lower right quarter is busy,

    1 1 1 1
    1 1 1 1
    1 1 0 0
    1 1 0 0     has 3 leaves of 2 x 2 patches and 4 of one, 7 latents instead of 16.

Sources: Quadformer (Ronen 2023), for the greedy mosaic under a budget; APT (Choudhury 2025), for levels of patch sizes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from matformer.config.budget import budgeted_splits

Errors = list[np.ndarray]
"""Of each level from 1 on, one number a whole block, in the shape of the grid of these blocks."""


def budgeted_levels(
    patches: Float[np.ndarray, "N F"], *, grid: Sequence[int], share: float, levels: int
) -> Int[np.ndarray, " N"]:
    """The tree of a span's clean patches (raster order) that the budget allows: errors of merging, split greedily.

    A function of the patches alone. Has as many leaves as the budget lets it, fewer only where all blocks that are left
    are constant.
    """
    errors = merging_errors(patches, grid=grid, levels=levels)
    return grow(errors, grid=grid, splits=budgeted_splits(grid, share=share, levels=levels))


def merging_errors(patches: Float[np.ndarray, "N F"], *, grid: Sequence[int], levels: int) -> Errors:
    """Squared distance of each block's patches from their mean, summed, in float64: what a mean of them would lose.

    Exactly 0 where all are equal: means of 2^rank equal numbers are exact.
    """
    rank = len(grid)
    mean = patches.astype(np.float64).reshape(*grid, -1)
    lost, found = np.zeros(tuple(grid)), []
    for level in range(1, levels + 1):
        halves = [size >> level for size in grid]
        inner = tuple(range(1, 2 * rank, 2))
        children = _paired(mean, halves)
        mean = children.mean(inner)
        spread = np.square(children - np.expand_dims(mean, inner)).sum(-1)
        lost = (_paired(lost[..., None], halves)[..., 0] + 2 ** (rank * (level - 1)) * spread).sum(inner)
        found.append(lost)
    return found


def _paired(array: np.ndarray, halves: Sequence[int]) -> np.ndarray:
    """[*grid, F] -> [half, 2, half, 2, ..., F], whatever is no whole block left out."""
    whole = array[tuple(slice(2 * half) for half in halves)]
    return whole.reshape(*(size for half in halves for size in (half, 2)), array.shape[-1])


def grow(scores: Errors, *, grid: Sequence[int], splits: int, floor: float = 0.0) -> Int[np.ndarray, " N"]:
    """The tree after `splits` times splitting the leaf of the largest score; none at or below `floor` is split.

    Ties go to the larger block, then to raster order.
    """
    tree = np.zeros(tuple(grid), np.int64)
    heap: list[tuple[float, int, tuple[int, ...]]] = []
    for level, block in roots(grid, levels=len(scores)):
        tree[_patches_of(block, level)] = level
        heapq.heappush(heap, (-float(scores[level - 1][block]), -level, block))
    for _ in range(splits):
        if not heap or -heap[0][0] <= floor:
            break
        _, minus_level, block = heapq.heappop(heap)
        level = -minus_level - 1
        tree[_patches_of(block, level + 1)] = level
        if level:
            for child in _children(block):
                heapq.heappush(heap, (-float(scores[level - 1][child]), -level, child))
    return tree.reshape(-1)


def roots(grid: Sequence[int], *, levels: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Level and place among the blocks of its level of each root that can be split."""
    for level in range(levels, 0, -1):
        above = [size >> (level + 1) for size in grid]
        for block in np.ndindex(*(size >> level for size in grid)):
            if level == levels or any(at // 2 >= size for at, size in zip(block, above, strict=True)):
                yield level, block


def leaf_numbers(tree: Int[np.ndarray, " N"], *, grid: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The number of each patch's leaf `[N]`, and each leaf's first patch `[leaves]`, by which leaves are in order."""
    at = np.indices(tuple(grid)).reshape(len(grid), -1)
    corner = np.ravel_multi_index(tuple(at >> tree << tree), tuple(grid))
    first, number = np.unique(corner, return_inverse=True)
    return number.reshape(-1), first


def asked_blocks(
    tree: Int[np.ndarray, " N"], *, grid: Sequence[int], levels: int
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, "K rank"], np.ndarray]:
    """Level and first patch of every block that is no part of a leaf, large ones first, and whether it is split.

    They are the tree, written as answers. Of a tree of patches alone, every block of the grid.
    """
    level_of, found = tree.reshape(tuple(grid)), []
    for level in range(levels, 0, -1):
        corners = np.indices([size >> level for size in grid]).reshape(len(grid), -1) << level
        below = level_of[tuple(corners)]
        asked = below <= level
        found.append((np.full(asked.sum(), level), corners.T[asked], below[asked] < level))
    levels_K, corners_KX, splits_K = zip(*found, strict=True)
    return np.concatenate(levels_K), np.concatenate(corners_KX), np.concatenate(splits_K)


def drawn_levels(
    scores_K: Float[np.ndarray, " K"], *, grid: Sequence[int], share: float, levels: int
) -> Int[np.ndarray, " N"]:
    """The tree of this budget that splits by scores of every block of the grid, in the order of `asked_blocks`."""
    shapes = [tuple(size >> level for size in grid) for level in range(levels, 0, -1)]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    scores = [part.reshape(shape) for part, shape in zip(np.split(scores_K, ends), shapes, strict=True)]
    splits = budgeted_splits(grid, share=share, levels=levels)
    return grow(scores[::-1], grid=grid, splits=splits, floor=-math.inf)


def num_leaves(tree: Int[np.ndarray, " N"], *, rank: int) -> int:
    """Latents that a copy in this tree takes."""
    counts = np.bincount(tree)
    return sum(int(count) >> (rank * level) for level, count in enumerate(counts))


def _children(block: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for step in np.ndindex(*(2 for _ in block)):
        yield tuple(2 * at + more for at, more in zip(block, step, strict=True))


def _patches_of(block: tuple[int, ...], level: int) -> tuple[slice, ...]:
    return tuple(slice(at << level, (at + 1) << level) for at in block)
