"""The text symbols of a microbatch, piece by piece, and what is masked of them under a diffusion objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matformer.data.continued import NOTHING_BEFORE, Before, documents_of_units, numbers_in_document
from matformer.data.sources import TextSpan
from matformer.data.text_layout import Block
from matformer.parallel.seeds import generator
from matformer.parcels import Batch, TextUnits
from matformer.shapes import BEGIN, END, MASK

LEAST_MASKED = 1e-3


class Mask(NamedTuple):
    """Which symbols of a block are hidden, and the factor on the nats of each of them: 1 / p."""

    hidden_U: Bool[np.ndarray, " U"]
    weight: float


def mask_at(time: float, draw_U: Float[np.ndarray, " U"]) -> Mask:
    """Each symbol hidden with p = (1 - eps) t + eps, from uniform draws. Source: LLaDA, section 2.2; SEMANTICS."""
    p = (1.0 - LEAST_MASKED) * time + LEAST_MASKED
    return Mask(draw_U < p, 1.0 / p)


def symbols_of(part: TextSpan, first: int, last: int) -> Int[np.ndarray, " U"]:
    """The symbols of patches first .. last - 1 of a text span."""
    start, stop = (int(part.patch_lengths[:patch].sum()) for patch in (first, last))
    symbols = np.full(stop - start, END, np.int64)
    data = np.frombuffer(part.data, np.uint8)[start:stop]
    symbols[: len(data)] = data
    return symbols


class PaddedText:
    """A piece's symbols behind which `<end>` fills the last block; only the first `<end>` is scored."""

    def __init__(self, symbols: Int[np.ndarray, " U"], blocks: Sequence[Block], *, patch_bytes: int) -> None:
        self.patch_bytes = patch_bytes
        size = sum(block.size for block in blocks) * patch_bytes
        self.symbols = np.full(size, END, np.int64)
        self.symbols[: len(symbols)] = symbols
        self.scored = np.arange(size) < len(symbols)

    def of(self, block: Block) -> tuple[Int[np.ndarray, " U"], Bool[np.ndarray, " U"]]:
        """A block's symbols, and which of them are scored."""
        here = slice(block.first * self.patch_bytes, (block.first + block.size) * self.patch_bytes)
        return self.symbols[here], self.scored[here]


@dataclass(slots=True)
class TextRows:
    """Pieces (or copies of blocks) in the order in which they stand; `parcel` makes the arrays of them all."""

    symbols: list[np.ndarray] = field(default_factory=list)
    seen: list[np.ndarray] = field(default_factory=list)  # what diffusion shows of the symbols
    scored: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)  # symbols of each patch
    slots: list[np.ndarray] = field(default_factory=list)  # of each patch
    tokens: list[np.ndarray] = field(default_factory=list)  # of each patch
    documents: list[int] = field(default_factory=list)  # of each piece
    marks: list[tuple[int, int]] = field(default_factory=list)  # header and closing of each diffused span
    num_bytes: int = 0

    def add(
        self,
        symbols: Int[np.ndarray, " U"],
        *,
        lengths: np.ndarray,
        slots: np.ndarray,
        document: int,
        tokens: np.ndarray | None = None,
        scored: Bool[np.ndarray, " U"] | None = None,
        mask: Mask | None = None,
    ) -> None:
        """One piece. `tokens`: the numbers of its patches, if it has a vocabulary."""
        scored = np.ones(len(symbols), bool) if scored is None else scored
        self.symbols.append(symbols)
        self.scored.append(scored)
        seen, weight = _masked(symbols, scored, mask) if mask else (symbols, np.ones(len(symbols), np.float32))
        self.seen.append(seen)
        self.weights.append(weight)
        self.lengths.append(lengths)
        self.slots.append(slots)
        self.tokens.extend([] if tokens is None else [tokens])
        self.documents.append(document)
        self.num_bytes += int((symbols != END).sum())

    def parcel(self, *, diffused: bool) -> TextUnits:
        """The arrays."""
        symbol, lengths = joined(self.symbols), joined(self.lengths)
        sizes = np.array([len(symbols) for symbols in self.symbols], np.int64)
        firsts = np.cumsum(sizes) - sizes
        header, closing = torch.tensor(self.marks, dtype=torch.int64).view(-1, 2).unbind(1)
        return TextUnits(
            symbol_U=symbol,
            coda_input_U=joined(self.seen) if diffused else _shifted(symbol, firsts[sizes > 0]),
            piece_U=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
            place_U=torch.from_numpy(np.arange(len(symbol)) - np.repeat(firsts, sizes)),
            patch_U=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
            document_U=torch.from_numpy(np.repeat(np.asarray(self.documents, np.int64), sizes)),
            slot_P=joined(self.slots),
            token_P=joined(self.tokens),
            scored_U=torch.from_numpy(np.concatenate([np.zeros(0, bool), *self.scored])),
            weight_U=torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *self.weights])),
            header_slot_J=header,
            closing_slot_J=closing,
        )

    def and_clean(self, clean: TextRows) -> TextUnits:
        """What the Preludio reads under a diffusion objective: these rows as they are seen, then the clean ones."""
        both = TextRows(
            symbols=self.seen + clean.symbols,
            seen=self.seen + clean.symbols,
            scored=self.scored + clean.scored,
            weights=self.weights + clean.weights,
            lengths=self.lengths + clean.lengths,
            slots=self.slots + clean.slots,
            documents=self.documents + clean.documents,
            marks=self.marks,
        )
        return both.parcel(diffused=True)


def _masked(
    symbols: Int[np.ndarray, " U"], scored: Bool[np.ndarray, " U"], mask: Mask
) -> tuple[Int[np.ndarray, " U"], Float[np.ndarray, " U"]]:
    """What is seen, and the weights. Padding is never seen: it would tell where the text ends (decision 0009)."""
    weight = np.where(mask.hidden_U & scored, np.float32(mask.weight), np.float32(0.0))
    return np.where(mask.hidden_U | ~scored, MASK, symbols), weight


def with_masks(batch: Batch, *, number: int, draws: int, seed: int, before: Before = NOTHING_BEFORE) -> Batch:
    """The same batch with masks drawn anew at one of `draws` strata of t, from (document key, block of the document,
    number): the same in whatever batches a document stands, if `before` is what stood before this one.
    """
    units = batch.text
    hidden, weight = np.zeros(len(units.symbol_U), bool), np.zeros(len(units.symbol_U), np.float32)
    sizes = torch.bincount(units.piece_U).tolist()
    documents = documents_of_units(batch)["text"]
    blocks = numbers_in_document(documents, before=before.get("text", 0))
    first = 0
    for size, document, block in zip(sizes, documents, blocks, strict=True):
        dice = generator(seed, "heldout mask", batch.document_keys[document], block, number)
        mask = mask_at((number + dice.random()) / draws, dice.random(size))
        hidden[first : first + size], weight[first : first + size] = mask.hidden_U, mask.weight
        first += size
    hidden_U, weight_U = torch.from_numpy(hidden) | ~units.scored_U, torch.from_numpy(weight)
    return with_seen(
        batch,
        units.symbol_U.masked_fill(hidden_U, MASK),
        weight_U=torch.where(hidden_U & units.scored_U, weight_U, 0.0),
    )


def with_seen(batch: Batch, seen_U: Int[Tensor, " U"], *, weight_U: Float[Tensor, " U"] | None = None) -> Batch:
    """The same batch with this seen of its noised text, and these weights."""
    read_U = torch.cat((seen_U, batch.read.symbol_U[len(seen_U) :]))
    weight_U = batch.text.weight_U if weight_U is None else weight_U
    return replace(
        batch,
        text=replace(batch.text, coda_input_U=seen_U, weight_U=weight_U),
        read=replace(batch.read, symbol_U=read_U, coda_input_U=read_U),
    )


def joined(arrays: Sequence[np.ndarray]) -> Int[Tensor, " rows"]:
    """All of them in one row, int64."""
    return torch.from_numpy(np.concatenate(arrays)).long() if arrays else torch.zeros(0, dtype=torch.int64)


def _shifted(symbol_U: Int[Tensor, " U"], firsts: np.ndarray) -> Int[Tensor, " U"]:
    """The symbol before each, `<begin>` at the first of a piece."""
    before_U = torch.roll(symbol_U, 1)
    before_U[torch.from_numpy(firsts)] = BEGIN
    return before_U
