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
    hash_U = symbol_U
    hashes = {1: hash_U}
    for size in range(2, max(sizes) + 1):
        earlier = torch.where(place_U >= size - 1, torch.roll(symbol_U, size - 1), 0)
        hash_U = hashes[size] = hash_U * PRIME + earlier  # all before it stand one place further from the first
    return torch.stack([hashes[size] for size in sizes], dim=1)


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
        return self.of_hashes(ngram_hashes(symbol_U, place_U, sizes=self.sizes))

    def of_hashes(self, hash_Un: Int[Tensor, "U n"]) -> Float[Tensor, "U D"]:
        """The same from hashes: their symbols need not stand together."""
        first = torch.arange(len(self.sizes), device=hash_Un.device) * self.rows
        row_Un = hash_Un % self.rows + first
        return self.gain * nn.functional.embedding_bag(row_Un, self.table.weight, mode="sum")
