"""Texts written symbol by symbol, or piece by piece, each from all that stands before it.

Rows are documents that grow side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.data.packing import build_batch, document_positions
from matformer.data.patching import Patcher, TokenPatcher, build_patcher, text_symbols
from matformer.data.sources import Document, TextSpan, cut_span
from matformer.engine.draws import Draws, OnStep, Row, Span, dice_of, draw_answer, given, unwatched
from matformer.errors import ParcelError
from matformer.model import Matformer
from matformer.parcels import TextUnits
from matformer.shapes import BEGIN, END, NUM_TARGETS


class TextWriter:
    """Text spans that are being written, one a row; boundaries, latents and logits are those of the finished span.

    The Atto runs again over a row where a patch was completed; the Coda runs for every symbol over as many symbols of
    the span as its layers can see.
    """

    def __init__(self, model: Matformer, rows: Sequence[Row], *, config: RunConfig) -> None:
        text = config.model.text
        self.model, self.config = model, config
        # what the layers look back over, and the n-grams of the first symbol that they see
        layers, ngrams = text.coda_layers, text.coda_ngrams
        if text.coda_input == "preludio":
            layers, ngrams = layers + text.preludio_layers, text.preludio_ngrams
        self.sight = layers * (text.window - 1) + max(ngrams, default=1)
        self.patcher = build_patcher(config.data.patcher, vocabulary=text.vocabulary)
        self.pens = [_Pen(given(row.spans), self.patcher) for row in rows]
        for pen, row in zip(self.pens, rows, strict=True):
            pen.before = document_positions(Document("", pen.spans), model=config.model)
            for symbol, ends in zip(row.prompt, _prompt_ends(row.prompt, self.patcher), strict=True):
                pen.push(symbol, ends=ends)
            if not self.has_room(pen):
                raise ParcelError(
                    f"a prompt must leave room in {config.data.sequence_latents} latents, got "
                    f"{pen.before + len(pen.lengths)}; shorten it"
                )

    def has_room(self, pen: _Pen) -> bool:
        """Whether the patch in hand still fits into the sequence."""
        return pen.before + len(pen.lengths) < self.config.data.sequence_latents

    @torch.no_grad()
    def logits(self, pens: Sequence[_Pen]) -> Float[Tensor, "rows V"]:
        """Of the next symbol of each, and after them, where the Coda says so, of its patch's end (see TextCoda).

        Or of the next piece, where there is a vocabulary.
        """
        self._refresh([pen for pen in pens if pen.latents is None])
        latents = [pen.latents for pen in pens if pen.latents is not None]
        first = np.cumsum([0] + [len(latent) for latent in latents])
        units = _coda_units(pens, first, sight=self.sight)
        sizes = [min(len(pen.data) + 1, self.sight) for pen in pens]
        last_U = torch.from_numpy(np.cumsum(sizes) - 1)
        logits = self.model.text_logits(torch.cat(latents), units)
        return logits[last_U if self.config.model.text.vocabulary is None else units.patch_U[last_U]]

    def write(self, pen: _Pen, logits_V: np.ndarray, *, draws: Draws, dice: np.random.Generator) -> None:
        """Draw a symbol or piece for `pen` from its logits, and push it."""
        first = not pen.data
        if isinstance(self.patcher, TokenPatcher):
            end = len(logits_V) - 1
            logits_V[end] = -np.inf if first else logits_V[end]
            logits_V[self.patcher.pieces.unknown] = -np.inf  # stands for no bytes
            piece = draw_answer(logits_V, draws=draws, dice=dice)
            data = [END] if piece == end else [*self.patcher.pieces.decode([piece])]
            for place, symbol in enumerate(data, start=1):
                pen.push(symbol, ends=place == len(data))
            return
        of_symbol, of_end = logits_V[:NUM_TARGETS], logits_V[NUM_TARGETS:]
        if first:
            of_symbol[END] = -np.inf  # no span of a document is empty
        symbol = draw_answer(of_symbol, draws=draws, dice=dice)
        ends = len(of_end) > 0 and draw_answer(np.array([0.0, of_end[symbol]]), draws=draws, dice=dice) == 1
        pen.push(symbol, ends=ends)

    def _refresh(self, stale: Sequence[_Pen]) -> None:
        if not stale:
            return
        documents = [Document(f"row {i}", pen.complete()) for i, pen in enumerate(stale)]
        sizes = [pen.before + len(pen.lengths) for pen in stale]
        batch = build_batch(documents, model=self.config.model, sequence_latents=max(sizes))
        for pen, size, latents_SH in zip(stale, sizes, self.model.latents(batch), strict=True):
            pen.latents = latents_SH[:size]


def _prompt_ends(prompt: bytes, patcher: Patcher) -> np.ndarray:
    """Whether a patch ends with each byte, where the patcher does not find out by itself; the last stays open."""
    ends = np.zeros(len(prompt), bool)
    if patcher.learned and prompt:
        ends[patcher.lengths(text_symbols(prompt, ended=False)).cumsum() - 1] = True
        ends[-1] = isinstance(patcher, TokenPatcher)  # a piece of a vocabulary is whole
    return ends


class _Pen:
    """One span in the writing. `lengths`: symbols of its complete patches; `latents`: up to the last of these."""

    def __init__(self, spans: tuple[Span, ...], patcher: Patcher) -> None:
        self.spans, self.patcher, self.boundary = spans, patcher, patcher.boundary()
        self.before = 0
        self.data = bytearray()
        self.lengths: list[int] = []
        self.in_hand = 0
        self.ended = False
        self.latents: Tensor | None = None

    def push(self, symbol: int, *, ends: bool = False) -> None:
        """Write a byte or `<end>`; `ends` as Boundary wants it."""
        self.in_hand += 1
        if symbol == END:
            self.ended = True
        else:
            self.data.append(symbol)
        if self.boundary.push(symbol, ends=ends):
            self.lengths.append(self.in_hand)
            self.in_hand, self.latents = 0, None

    def complete(self) -> tuple[Span, ...]:
        """The document up to its last complete patch."""
        if not self.lengths:
            return self.spans
        data = bytes(self.data[: sum(self.lengths)])
        return (*self.spans, self._cut(data, self.lengths))

    def span(self) -> TextSpan:
        """What is written; the patch in hand is cut where it stands."""
        return self._cut(bytes(self.data), self.lengths + [self.in_hand] * (self.in_hand > 0))

    def _cut(self, data: bytes, lengths: Sequence[int]) -> TextSpan:
        return cut_span(data, np.asarray(lengths, np.int32), self.patcher, ended=self.ended)


@torch.no_grad()
def write_texts(
    model: Matformer, rows: Sequence[Row], *, config: RunConfig, draws: Draws, on_step: OnStep = unwatched
) -> list[TextSpan]:
    """One text span a row, its prompt continued until `<end>`, `draws.max_bytes` or the end of the sequence.

    Of a vocabulary the last piece is whole, and may reach beyond `max_bytes`. `on_step` hears of the new bytes of the
    longest.
    Raises ParcelError where a prompt does not fit.
    """
    writer = TextWriter(model, rows, config=config)
    dice = [dice_of(draws, row, "text") for row in rows]
    limits = [len(row.prompt) + draws.max_bytes for row in rows]
    live = list(range(len(rows)))
    while live:
        logits = writer.logits([writer.pens[i] for i in live]).double().numpy()
        for i, logits_V in zip(live, logits, strict=True):
            writer.write(writer.pens[i], logits_V, draws=draws, dice=dice[i])
        pens = writer.pens
        longest = max(len(pen.data) - len(row.prompt) for pen, row in zip(pens, rows, strict=True))
        on_step(min(longest, draws.max_bytes), draws.max_bytes)
        live = [i for i in live if not pens[i].ended and len(pens[i].data) < limits[i] and writer.has_room(pens[i])]
    return [pen.span() for pen in writer.pens]


def _coda_units(pens: Sequence[_Pen], first: np.ndarray, *, sight: int) -> TextUnits:
    """The last `sight` Coda inputs of each span; what they predict is not asked, so `symbol` repeats the input."""
    inputs, places, patches, slots, pieces, num_patches = [], [], [], [], [], 0
    for number, (pen, begin) in enumerate(zip(pens, first, strict=False)):
        size = len(pen.data) + 1
        kept = slice(max(0, size - sight), size)
        patch = np.repeat(np.arange(len(pen.lengths) + 1), [*pen.lengths, pen.in_hand + 1])[kept]
        inputs.append(np.array([BEGIN, *pen.data], np.int64)[kept])
        places.append(np.arange(size)[kept])
        patches.append(patch - patch[0] + num_patches)
        slots.append(begin + pen.before + np.arange(patch[0], patch[-1] + 1))
        pieces.append(np.full(len(patch), number))
        num_patches += int(patch[-1] - patch[0]) + 1
    symbol, place, patch, slot, piece = (
        torch.from_numpy(np.concatenate(arrays)).long() for arrays in (inputs, places, patches, slots, pieces)
    )
    none = torch.zeros(0, dtype=torch.int64)
    return TextUnits(
        symbol_U=symbol,
        coda_input_U=symbol,
        piece_U=piece,
        place_U=place,
        patch_U=patch,
        document_U=piece,
        slot_P=slot,
        token_P=none,
        scored_U=torch.ones_like(symbol, dtype=torch.bool),
        weight_U=torch.ones(len(symbol)),
        header_slot_J=none,
        closing_slot_J=none,
    )
