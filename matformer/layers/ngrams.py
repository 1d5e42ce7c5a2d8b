"""Hashed n-grams of symbols: what the last n symbols were, as a vector, at the price of a lookup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

PRIME = 1_000_000_007


def ngram_hashes(
    symbol_U: Int[Tensor, " U"], place_U: Int[Tensor, " U"], *, sizes: Sequence[int]
) -> Int[Tensor, "U n"]:
    """One number for the n symbols that end at each place, a column a size; before a piece's first symbol stand zeros.

    A symbol i places from the window's first is multiplied by PRIME ** i, all in int64 that wraps around, as the source
    does: the numbers may be negative. Source: BLT, section 3.2.1 (rolling polynomial hash).
    """
    powers = _wrapping_powers(max(sizes), device=symbol_U.device)
    window_nU = [symbol_U]  # column k: the symbol k places before, zero outside the piece
    for back in range(1, max(sizes)):
        earlier = torch.roll(symbol_U, back)
        window_nU.append(torch.where(place_U >= back, earlier, 0))
    columns = []
    for size in sizes:
        terms = [window_nU[back] * powers[size - 1 - back] for back in range(size)]
        columns.append(torch.stack(terms).sum(0))
    return torch.stack(columns, dim=1)


def _wrapping_powers(count: int, *, device: torch.device) -> Int[Tensor, " count"]:
    """PRIME ** 0, 1, ... in int64 that wraps around."""
    powers = [1]
    for _ in range(count - 1):
        powers.append((powers[-1] * PRIME + 2**63) % 2**64 - 2**63)
    return torch.tensor(powers, dtype=torch.int64, device=device)


@dataclass(frozen=True, slots=True)
class NgramSettings:
    """Sizes n of the n-grams, rows of the table of each, and the gain on what they give."""

    sizes: tuple[int, ...]
    rows: int
    gain: float


class NgramEmbedding(nn.Module):
    """The sum of one vector a size, each from a table of `rows` that n-grams share by their hash modulo `rows`.

    The table starts at zero, so that an n-gram never seen says nothing; the gain makes up for the small steps that
    AdamW gives to rows which are seldom touched. Source: BLT, section 3.2.1; zeros and gain are ours. One table holds
    all sizes, one after the other.
    """

    def __init__(self, width: int, settings: NgramSettings) -> None:
        super().__init__()
        self.sizes, self.rows, self.gain = settings.sizes, settings.rows, settings.gain
        self.table = nn.Embedding(self.rows * len(self.sizes), width)

    def forward(self, symbol_U: Int[Tensor, " U"], place_U: Int[Tensor, " U"]) -> Float[Tensor, "U D"]:
        first = torch.arange(len(self.sizes), device=symbol_U.device) * self.rows
        row_Un = ngram_hashes(symbol_U, place_U, sizes=self.sizes) % self.rows + first
        return self.gain * nn.functional.embedding_bag(row_Un, self.table.weight, mode="sum")
