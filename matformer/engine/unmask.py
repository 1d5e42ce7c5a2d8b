"""Texts by filling in what is masked: whole at once (LLaDA), or block after block (BD3-LM).

In each step the Coda guesses every masked symbol, and those guesses stay of which it is surest. What lies behind a
symbol that became `<end>` stays masked, as padding is in training.
Source: LLaDA, section 2.4 (low-confidence remasking); BD3-LM, section 3 (blocks given the clean ones before them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from matformer.config.schema import RunConfig
from matformer.data.packing import Piece, Place, document_positions, draw_zeros, pack_batch
from matformer.data.patching import build_patcher
from matformer.data.sources import Document, TextSpan, text_span
from matformer.data.text_layout import patches_that_fit
from matformer.data.text_rows import with_seen
from matformer.engine.draws import Draws, OnStep, Row, Span, dice_of, draw_answer, given, unwatched
from matformer.errors import ParcelError
from matformer.model import Matformer
from matformer.parcels import Batch
from matformer.shapes import END, MASK, NUM_TARGETS


@dataclass(slots=True)
class _Sheet:
    """A text in the making: `symbols` with `<mask>` where nothing is known; `block`: symbols filled in at a time."""

    spans: tuple[Span, ...]
    symbols: np.ndarray
    block: int
    first: int  # symbol of the block in hand
    limit: int  # bytes that may be there in the end
    dice: np.random.Generator
    asked: int = 0  # how many symbols of the block were hidden when it was begun

    @property
    def end(self) -> int:
        """Where `<end>` stands, or the number of symbols."""
        ends = np.flatnonzero(self.symbols == END)
        return int(ends[0]) if len(ends) else len(self.symbols)

    @property
    def done(self) -> bool:
        return self.end < self.first or self.first >= len(self.symbols)

    def hidden(self) -> np.ndarray:
        """Places of the block in hand that are to be filled in."""
        last = min(self.first + self.block, self.end)
        return self.first + np.flatnonzero(self.symbols[self.first : last] == MASK)

    def begin(self) -> None:
        """A new block is in hand."""
        self.asked = len(self.hidden())

    def fill(self, logits_UV: np.ndarray, *, step: int, draws: Draws) -> None:
        """Guess what is hidden of the block, from logits of all its symbols; after each of its steps an equal share of
        what was hidden at first may stay so, after the last nothing. Steps beyond are idle.
        """
        places = self.hidden()
        if not len(places):
            return
        steps = min(draws.steps, self.asked)
        left = self.asked * max(0, steps - step - 1) // steps
        logits_RV = logits_UV[places - self.first]
        logits_RV[places == 0, END] = -np.inf  # no span of a document is empty
        guess = np.array([draw_answer(row, draws=draws, dice=self.dice) for row in logits_RV], np.int64)
        top_R1 = logits_RV.max(axis=1, keepdims=True)
        sure = np.take_along_axis(logits_RV - top_R1, guess[:, None], axis=1)[:, 0]
        sure = sure - np.log(np.exp(logits_RV - top_R1).sum(axis=1))
        keep = np.argsort(-sure, kind="stable")[: max(0, len(places) - left)]
        self.symbols[places[keep]] = guess[keep]
        self.symbols[self.end + 1 :] = MASK


@torch.no_grad()
def fill_texts(
    model: Matformer, rows: Sequence[Row], *, config: RunConfig, draws: Draws, on_step: OnStep = unwatched
) -> list[TextSpan]:
    """One text span a row, its prompt continued to `<end>`, `draws.max_bytes` or the end of the sequence.

    A text that is filled in whole is as long as its number of patches, which is drawn evenly: in training `<end>`
    stands in the last patch. `on_step` hears of the symbols of all rows that are known.
    Raises ParcelError where a prompt does not fit.
    """
    sheets = [_sheet(row, config=config, draws=draws) for row in rows]
    while live := [sheet for sheet in sheets if not sheet.done]:
        batch = _blocks_in_hand(live, config=config)
        for sheet in live:
            sheet.begin()
        for step in range(min(draws.steps, max(sheet.asked for sheet in live))):
            logits = _logits(model, batch, live)
            for sheet, logits_UV in zip(live, logits, strict=True):
                sheet.fill(logits_UV, step=step, draws=draws)
            on_step(sum(int((one.symbols != MASK).sum()) for one in sheets), sum(len(one.symbols) for one in sheets))
        for sheet in live:
            sheet.first += sheet.block
    patcher = build_patcher(config.data.patcher)
    return [
        text_span(
            sheet.symbols[: min(sheet.end, sheet.limit)].astype(np.uint8).tobytes(),
            patcher,
            ended=sheet.end < min(len(sheet.symbols), sheet.limit + 1),
        )
        for sheet in sheets
    ]


def _sheet(row: Row, *, config: RunConfig, draws: Draws) -> _Sheet:
    text = config.model.text
    spans = given(row.spans)
    room = config.data.sequence_latents - document_positions(Document("", spans), model=config.model)
    limit = len(row.prompt) + draws.max_bytes
    wanted = -(-(limit + 1) // text.patch_bytes)
    whole = text.objective == "masked_diffusion"
    wanted = wanted if whole else -(-wanted // text.block_patches) * text.block_patches
    size = min(wanted, patches_that_fit(room, text, patches=wanted + 1)) * text.patch_bytes
    if size <= len(row.prompt):
        raise ParcelError(
            f"a prompt must leave room in {config.data.sequence_latents} latents, got {len(row.prompt)} bytes where "
            f"{size} symbols fit; shorten it"
        )
    dice = dice_of(draws, row, "text")
    if whole:
        fewest = len(row.prompt) // text.patch_bytes + 1
        size = int(dice.integers(fewest, size // text.patch_bytes, endpoint=True)) * text.patch_bytes
    symbols = np.full(size, MASK, np.int64)
    symbols[: len(row.prompt)] = np.frombuffer(row.prompt, np.uint8)
    block = size if whole else text.block_patches * text.patch_bytes
    first = len(row.prompt) // block * block
    return _Sheet(spans, symbols, block, first, limit, dice)


def _blocks_in_hand(sheets: Sequence[_Sheet], *, config: RunConfig) -> Batch:
    """Each sheet a row: the blocks before the one in hand clean alone, that one noised alone."""
    patch = config.model.text.patch_bytes
    documents = []
    for number, sheet in enumerate(sheets):
        last = sheet.first + sheet.block
        known = np.where(sheet.symbols[:last] == MASK, 0, sheet.symbols[:last]).astype(np.uint8)
        lengths = np.full(last // patch, patch, np.int32)
        text = TextSpan(known.tobytes(), lengths, ended=False, given=sheet.first // patch)
        documents.append(Document(f"row {number}", (*sheet.spans, text)))
    pieces = [[Piece(document, Place(), Place(len(document.spans)))] for document in documents]
    length = max(document_positions(document, model=config.model) for document in documents)
    return pack_batch(pieces, [draw_zeros] * len(pieces), model=config.model, sequence_latents=length)


def _logits(model: Matformer, batch: Batch, sheets: Sequence[_Sheet]) -> list[np.ndarray]:
    """Of the symbols of every block in hand, under what is known of them now."""
    inside = [sheet.symbols[sheet.first : sheet.first + sheet.block] for sheet in sheets]
    batch = with_seen(batch, torch.from_numpy(np.concatenate(inside)))
    logits_UV = model.text_logits(model.latents(batch).flatten(0, 1), batch.text)[:, :NUM_TARGETS]
    ends = np.cumsum([sheet.block for sheet in sheets])[:-1]
    return np.split(logits_UV.double().numpy(), ends)
