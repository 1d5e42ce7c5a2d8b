"""Where a patch stands in its span, as a vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from jaxtyping import Float, Int
from torch import Tensor, nn


class PlaceEmbedding(nn.Module):
    """The sum of one learned vector an axis.

    Rotary positions say how far two patches are apart, this says where one is: most of what pictures have in common
    (a white border, a centre) hangs on it. Source: BAGEL (learned 2-D positions).
    """

    def __init__(self, width: int, *, sizes: Sequence[int]) -> None:
        super().__init__()
        tables = {f"embedding_{axis}": nn.Embedding(size, width) for axis, size in zip("tyx", sizes, strict=True)}
        self.axes = nn.ModuleDict(tables)

    def forward(self, place_NX: Int[Tensor, "N 3"]) -> Float[Tensor, "N D"]:
        vectors = [cast(nn.Embedding, table)(place_NX[:, i]) for i, table in enumerate(self.axes.values())]
        return vectors[0] + vectors[1] + vectors[2]
