"""Adaptive norms: t as a scale and a shift behind a norm, and a gate on what a branch adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.layers.time_embedding import time_waves
from matformer.parcels import Batch, PositionTimes
from matformer.shapes import TIME_WAVES

Rows = tuple[Float[Tensor, "... H"], Float[Tensor, "... H"], Float[Tensor, "... H"]]


class TimeModulation(nn.Module):
    """`parts` vectors of each t, all zero at first: the last layer starts at zero.

    Source: DiT, section 3.2 (adaLN-zero); one hidden layer of 128 instead of the model's width, since each layer of the
    Atto has one of its own (a shared one would tie weights across pipeline stages).
    """

    def __init__(self, width: int, *, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.first = nn.Linear(2 * TIME_WAVES, TIME_WAVES)
        self.film = nn.Linear(TIME_WAVES, parts * width)

    def forward(self, time_T: Float[Tensor, " T"]) -> Float[Tensor, "T parts H"]:
        waves = time_waves(time_T).to(self.first.weight.dtype)
        return self.film(F.silu(self.first(waves))).unflatten(-1, (self.parts, -1))


def modulate(
    x: Float[Tensor, "... H"], *, shift: Float[Tensor, "... H"], scale: Float[Tensor, "... H"]
) -> Float[Tensor, "... H"]:
    """x (1 + scale) + shift; with zeros x itself, bit for bit."""
    return x * (1 + scale) + shift


def rows_of_positions(found_T6H: Float[Tensor, "T parts H"], index: Int[Tensor, "*dims"]) -> tuple[Rows, Rows]:
    """(shift, scale, gate) of the attention branch and of the feed-forward branch at every position `[*dims, H]`.

    Positions of index 0 get zeros that no weight reaches: what they hold is x (1 + 0) + 0 and (1 + 0) of a branch.
    """
    table = torch.cat((torch.zeros_like(found_T6H[:1]), found_T6H))
    rows = table.index_select(0, index.flatten()).view(*index.shape, *table.shape[1:])
    shift, scale, gate, later_shift, later_scale, later_gate = rows.unbind(-2)
    return (shift, scale, gate), (later_shift, later_scale, later_gate)


def position_times(batch: Batch, modalities: Sequence[str]) -> PositionTimes | None:
    """t of the noised patches and 0 of the clean ones of these modalities; None if there is none to be told.

    All other positions (text, start, header, closing, media of other modalities) have no time.
    """
    if not modalities:
        return None
    units = [batch.media[name] for name in modalities]
    times = torch.cat([units[0].time_T.new_zeros(1), *(one.time_T for one in units)])
    index = torch.zeros_like(batch.grid.kind_BS).flatten()
    first = 2  # 1: clean
    for one in units:
        index = index.index_fill(0, one.clean_slot_Q, 1)
        index = index.index_copy(0, one.noised_slot_Q, first + one.time_of_Q)
        first += len(one.time_T)
    return PositionTimes(times, index.view_as(batch.grid.kind_BS))
