"""Copies of a media span in a sequence: a latent a patch, or a latent a leaf of the tree that a budget gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from matformer.config.schema import MediaConfig
from matformer.data.sources import MediaSpan
from matformer.data.text_rows import joined
from matformer.layers.quad_tree import asked_blocks, leaf_numbers, num_leaves
from matformer.parcels import TreeUnits


class Tree(NamedTuple):
    """A noised copy's tree: its header's flat position, its document's number, levels of patches, shape bucket."""

    header: int
    document: int
    tree: np.ndarray
    bucket: int


@dataclass(slots=True)
class Copies:
    """Of each patch of each copy: its row among the patches, its latent's slot, the level of its leaf."""

    rows: list[np.ndarray] = field(default_factory=list)
    slots: list[np.ndarray] = field(default_factory=list)
    levels: list[np.ndarray] = field(default_factory=list)

    def add(self, slots: Int[np.ndarray, " N"], *, first_row: int, tree: Int[np.ndarray, " N"] | None = None) -> None:
        """One more copy, of the patches from row `first_row` on."""
        self.rows.append(np.arange(first_row, first_row + len(slots)))
        self.slots.append(slots)
        self.levels.append(np.zeros(len(slots), np.int64) if tree is None else tree)


def num_latents(span: MediaSpan, tree: np.ndarray | None, *, media: MediaConfig) -> int:
    """Latents of a copy of a media span that stands in `tree`: the tree's leaves, or all patches."""
    return math.prod(media.grid(span.bucket)) if tree is None else num_leaves(tree, rank=media.rank)


def patch_places(grid: Sequence[int]) -> Int[np.ndarray, "N 3"]:
    """t, y, x of each of a grid of patches in raster order: audio lies on t, images on y and x, video on all three."""
    return _on_axes(np.indices(tuple(grid)).reshape(len(grid), -1).T)


def leaf_places(tree: Int[np.ndarray, " N"], grid: Sequence[int]) -> tuple[np.ndarray, Int[np.ndarray, "leaves 3"]]:
    """The number of each patch's leaf `[N]` in a grid of patches; t, y, x of each leaf: of its middle, rounded down.

    A leaf of one patch stands where its patch does without a budget.
    """
    number, first = leaf_numbers(tree, grid=grid)
    corners = np.stack(np.unravel_index(first, tuple(grid)), axis=1)
    return number, _on_axes(corners + ((1 << tree[first]) - 1)[:, None] // 2)


def tree_units(trees: Sequence[Tree], *, media: MediaConfig) -> TreeUnits:
    """What is asked of the headers of these trees."""
    assert media.budget is not None
    asked = [asked_blocks(one.tree, grid=media.grid(one.bucket), levels=media.budget.levels) for one in trees]
    places = [np.zeros((0, 3), np.int64), *(_on_axes(corners) for _, corners, _ in asked)]
    return TreeUnits(
        slot_J=torch.tensor([one.header for one in trees], dtype=torch.int64),
        document_J=torch.tensor([one.document for one in trees], dtype=torch.int64),
        tree_K=joined([np.full(len(levels), number) for number, (levels, _, _) in enumerate(asked)]),
        level_K=joined([levels for levels, _, _ in asked]),
        place_KX=torch.from_numpy(np.concatenate(places)),
        split_K=joined([splits for _, _, splits in asked]).bool(),
    )


def _on_axes(places: Int[np.ndarray, "n rank"]) -> Int[np.ndarray, "n 3"]:
    """The same places on t, y, x; 0 on the axes that a grid of this rank lacks."""
    rank = places.shape[1]
    found = np.zeros((len(places), 3), np.int64)
    found[:, slice(1, 3) if rank == 2 else slice(rank)] = places
    return found
