"""Patches that share a latent (leaves of a quad-tree) -> one row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Leaves(NamedTuple):
    """row: of each leaf, leaves of one patch first, then level by level. first: where its first patch stands in Q."""

    row_LH: Float[Tensor, "L H"]
    first_L: Int[Tensor, " L"]


@final
class LeafMerge(nn.Module):
    """The mean of a leaf's rows, a linear map of all its scalars (a map a level, zero at first), a vector of its level.

    The mean alone would lose what the budget found least worth a latent; the map may keep as much of it as a latent
    holds. Leaves of one patch are what they are without a budget.
    Source: APT (Choudhury 2025), section 3 (a resized patch and a zero-initialised map of its parts).
    """

    def __init__(self, features: int, *, atto_width: int, rank: int, levels: int) -> None:
        super().__init__()
        self.cells = [2 ** (rank * level) for level in range(1, levels + 1)]
        self.detail = nn.ModuleList(nn.Linear(cells * features, atto_width, bias=False) for cells in self.cells)
        self.level_embedding = nn.Embedding(levels, atto_width)

    def forward(
        self,
        row_QH: Float[Tensor, "Q H"],
        patch_QF: Float[Tensor, "Q F"],
        slot_Q: Int[Tensor, " Q"],
        level_Q: Int[Tensor, " Q"],
        *,
        patches_of_levels: Sequence[int],
    ) -> Leaves:
        """row: what each patch would give alone; patch: its scalars as the network sees them; slot: its leaf's.

        patches_of_levels: how many of Q stand in leaves of each level.
        """
        single, *larger = places_of_levels(slot_Q, level_Q, patches_of_levels=patches_of_levels, cells=self.cells)
        firsts, rows = [single.flatten()], [row_QH.index_select(0, single.flatten())]
        for level, (place_LM, detail) in enumerate(zip(larger, self.detail, strict=True), start=1):
            first_L = place_LM[:, 0]
            of_leaf, cells_LMF = (taken(x, place_LM) for x in (row_QH, patch_QF))
            merged = of_leaf.mean(1) + detail(cells_LMF.flatten(1))
            rows.append(merged + self.level_embedding(torch.full_like(first_L, level - 1)))
            firsts.append(first_L)
        return Leaves(torch.cat(rows), torch.cat(firsts))


def taken(x_QD: Float[Tensor, "Q D"], place_LM: Int[Tensor, "L M"]) -> Float[Tensor, "L M D"]:
    """Rows at these places; its backward adds in a fixed order."""
    return x_QD.index_select(0, place_LM.flatten()).view(*place_LM.shape, x_QD.shape[1])


def places_of_levels(
    slot_Q: Int[Tensor, " Q"], level_Q: Int[Tensor, " Q"], *, patches_of_levels: Sequence[int], cells: Sequence[int]
) -> list[Int[Tensor, "L M"]]:
    """Places in Q of the patches of each leaf, in raster order: of single patches, in Q's own order, and of each level.

    cells: patches of a leaf of level 1, 2, ... Sorted, and cut by numbers that the host knows: no device is asked.
    """
    by_slot = slot_Q.argsort(stable=True)
    order = by_slot[level_Q[by_slot].argsort(stable=True)]
    counts = [*patches_of_levels, *[0] * (1 + len(cells) - len(patches_of_levels))]
    single, *larger = order.split(counts)
    alone = single.sort().values[:, None]
    return [alone, *(places.view(-1, many) for places, many in zip(larger, cells, strict=True))]
