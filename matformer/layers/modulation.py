"""Adaptive norms: t as a scale and a shift behind a norm, and a gate on what a branch adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.layers.time_embedding import NUM_FREQUENCIES, time_waves

ATTO_PARTS = 6  # shift, scale and gate of the attention branch and of the feed-forward branch
Rows = tuple[Float[Tensor, "... H"], Float[Tensor, "... H"], Float[Tensor, "... H"]]


class TimeModulation(nn.Module):
    """`parts` vectors of each t, all zero at first: the last layer starts at zero.

    Source: DiT, section 3.2 (adaLN-zero); one hidden layer of 128 instead of the model's width, since each layer of the
    Atto has one of its own (a shared one would tie weights across pipeline stages).
    """

    def __init__(self, width: int, *, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.first = nn.Linear(2 * NUM_FREQUENCIES, NUM_FREQUENCIES)
        self.film = nn.Linear(NUM_FREQUENCIES, parts * width)

    def forward(self, time_T: Float[Tensor, " T"]) -> Float[Tensor, "T parts H"]:
        waves = time_waves(time_T).to(self.first.weight.dtype)
        return self.film(F.silu(self.first(waves))).unflatten(-1, (self.parts, -1))


def modulate(
    x: Float[Tensor, "... H"], *, shift: Float[Tensor, "... H"], scale: Float[Tensor, "... H"]
) -> Float[Tensor, "... H"]:
    """x (1 + scale) + shift; with zeros x itself, bit for bit."""
    return x * (1 + scale) + shift


@dataclass(frozen=True, slots=True)
class PositionTimes:
    """The time of each position of the Atto whose layers are told of it.

    time: the different times of the microbatch. index: 1 + the row of `time` that a position has, 0 where it has none.
    """

    time_T: Float[Tensor, " T"]
    index_BS: Int[Tensor, "B S"]


def rows_of_positions(found_T6H: Float[Tensor, "T parts H"], index: Int[Tensor, "*dims"]) -> tuple[Rows, Rows]:
    """(shift, scale, gate) of the attention branch and of the feed-forward branch at every position `[*dims, H]`.

    Positions of index 0 get zeros that no weight reaches: what they hold is x (1 + 0) + 0 and (1 + 0) of a branch.
    """
    table = torch.cat((torch.zeros_like(found_T6H[:1]), found_T6H))
    rows = table.index_select(0, index.flatten()).view(*index.shape, *table.shape[1:])
    shift, scale, gate, later_shift, later_scale, later_gate = rows.unbind(-2)
    return (shift, scale, gate), (later_shift, later_scale, later_gate)
