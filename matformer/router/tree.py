"""The tree of a span that is to be generated, predicted from its header before any of its patches is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from matformer.layers.place_embedding import PlaceEmbedding
from matformer.layers.precision import at_least_float32
from matformer.parcels import TreeUnits
from matformer.shapes import TREE_WIDTH


@final
class TreeHead(nn.Module):
    """The logit of each block that it is split: one hidden layer over (header, place, level).

    Given the header, blocks are independent; what they share has to stand in the header's latent.
    """

    def __init__(self, atto_width: int, *, places: Sequence[int], levels: int) -> None:
        super().__init__()
        self.header = nn.Linear(atto_width, TREE_WIDTH)
        self.place = PlaceEmbedding(TREE_WIDTH, sizes=places)
        self.level_embedding = nn.Embedding(levels, TREE_WIDTH)
        self.head = nn.Linear(TREE_WIDTH, 1)

    def forward(self, latent_LH: Float[Tensor, "L H"], units: TreeUnits) -> Float[Tensor, " K"]:
        header_JD = self.header(latent_LH.index_select(0, units.slot_J))
        x_KD = header_JD.index_select(0, units.tree_K) + self.place(units.place_KX)
        x_KD = x_KD + self.level_embedding(units.level_K - 1)
        return at_least_float32(self.head(F.silu(x_KD)))[:, 0]
