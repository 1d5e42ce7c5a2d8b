"""How many latents a budget leaves of a span: arithmetic on grids of patches alone, so that configs can be checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

ROUNDING = 1e-9  # a share such as 0.29 of 100 patches is 29, not 28


def root_counts(grid: Sequence[int], *, levels: int) -> list[int]:
    """Roots of the forest by level: the largest whole aligned blocks of 2^level patches a side that fill the grid.

    A block that would reach over the edge is none; what it would hold are roots of a lower level. Each block holds
    2^rank whole blocks of the level below.
    """
    blocks = [math.prod(size >> level for size in grid) for level in range(levels + 1)]
    return [here - 2 ** len(grid) * above for here, above in zip(blocks, [*blocks[1:], 0], strict=True)]


def budgeted_splits(grid: Sequence[int], *, share: float, levels: int) -> int:
    """Blocks that the budget lets be split: each makes 2^rank leaves of one. Negative if the roots alone exceed it."""
    roots = sum(root_counts(grid, levels=levels))
    return (math.floor(share * math.prod(grid) + ROUNDING) - roots) // (2 ** len(grid) - 1)


def budgeted_leaves(grid: Sequence[int], *, share: float, levels: int) -> int:
    """Most leaves of a span whose grid has so many patches along each axis; at least its roots."""
    roots = sum(root_counts(grid, levels=levels))
    return roots + (2 ** len(grid) - 1) * max(0, budgeted_splits(grid, share=share, levels=levels))


def leaves_of_levels(grid: Sequence[int], *, share: float, levels: int) -> list[int]:
    """Leaves of level 0, 1, ... of a tree with all its splits whose largest blocks are split first.

    So trees are where detail is everywhere alike; where it is not, more leaves are large, and more are single patches.
    """
    leaves = root_counts(grid, levels=levels)
    left = max(0, budgeted_splits(grid, share=share, levels=levels))
    for level in range(levels, 0, -1):
        split = min(left, leaves[level])
        leaves[level] -= split
        leaves[level - 1] += 2 ** len(grid) * split
        left -= split
    return leaves
