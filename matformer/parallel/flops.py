"""FLOPs of a microbatch by part, from its counts: plain integers, some microseconds.

A product of `[m, k]` and `[k, n]` counts 2 m k n, as torch's FlopCounterMode counts. The way back costs as much for the
weights and as much again for the rows, unless the rows are data. Not counted, there as here: lookups, norms, softmax,
rotary turns, and the pooling of a patch's few symbols, which are products element by element.

Of attention two numbers can be asked. `seen` counts the pairs that the mask shows: the model's FLOPs, of which a
utilisation speaks. `computed` counts the pairs that the code multiplies, hidden ones too: what FlopCounterMode sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from matformer.config.schema import ModelConfig, Recompute
from matformer.parallel.counts import Counts
from matformer.parallel.parts import Attention, Map, Piece, atto_layer, parts, recomputed

Attended = Literal["seen", "computed"]


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one microbatch."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times)

    @property
    def total(self) -> int:
        return self.forward + self.backward


def flops_by_part(model: ModelConfig, counts: Counts, *, attended: Attended = "seen") -> dict[str, Flops]:
    """Every part's FLOPs, by the names of `parts`."""
    layer = part_flops(list(atto_layer(model, counts)), attended=attended)  # once: they are all alike
    return {
        name: layer * model.atto.layers if name == "atto" else part_flops(pieces, attended=attended)
        for name, pieces in parts(model, counts).items()
    }


def batch_flops(model: ModelConfig, counts: Counts, *, attended: Attended = "seen") -> int:
    """Forward and backward of the whole model over one microbatch."""
    return added(flops_by_part(model, counts, attended=attended)).total


def flops_again(model: ModelConfig, counts: Counts, recompute: Recompute, *, attended: Attended = "seen") -> int:
    """What all layers compute twice under `parallel.recompute`: work that is no model's, and in no utilisation."""
    layer = part_flops(list(recomputed(model, counts, recompute)), attended=attended)
    return layer.forward * model.atto.layers


def part_flops(pieces: list[Piece], *, attended: Attended = "seen") -> Flops:
    """The sum over the pieces."""
    total = Flops()
    for piece in pieces:
        total += _flops(piece, attended=attended)
    return total


def added(by_part: Mapping[str, Flops]) -> Flops:
    """The whole model."""
    return sum(by_part.values(), Flops())


def _flops(piece: Piece, *, attended: Attended) -> Flops:
    if isinstance(piece, Map):
        product = 2 * piece.inner * piece.outer * piece.rows
        return Flops(product, product if piece.of_data else 2 * product)
    if isinstance(piece, Attention):  # scores and sums; on the way back queries, keys, weights, values
        pairs = piece.pairs.seen if attended == "seen" else piece.pairs.computed
        return Flops(4 * pairs * piece.width, 8 * pairs * piece.width)
    return Flops()
