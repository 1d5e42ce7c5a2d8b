"""Which noised patches a noised patch sees in a Coda that attends."""

from __future__ import annotations

from collections.abc import Sequence

from matformer.layers.local_attention import LocalView, window_of
from matformer.layers.rotary import rotary_tables
from matformer.parcels import MediaUnits

ROTARY_BASE = 100.0


class Neighbours:
    """A window in raster order over the patches of the same noised span, both ways; rotary positions along its axes.

    head_size: K of the attention; its K / 2 pairs are shared out among the axes that have more than one place.
    """

    def __init__(self, places: Sequence[int], *, head_size: int, window: int) -> None:
        axes = [axis for axis, size in enumerate(places) if size > 1] or [0]
        pairs = [0] * len(places)
        for number in range(head_size // 2):
            pairs[axes[number % len(axes)]] += 1
        self.pairs, self.window = tuple(pairs), window

    def view(self, units: MediaUnits) -> LocalView:
        """Of one microbatch, for every layer of the Coda."""
        row_Q = units.noised_row_Q
        rotary = rotary_tables(units.place_NX[row_Q], pairs=self.pairs, bases=(ROTARY_BASE,) * len(self.pairs))
        return LocalView(window_of(units.span_N[row_Q], window=self.window, both_ways=True), rotary)
