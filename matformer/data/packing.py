"""Documents -> sequences of S positions -> the `Batch` parcel, as SEMANTICS says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from matformer.config.schema import MediaConfig, ModelConfig, TimeSampler
from matformer.data.sources import Document, MediaSpan, TextSpan
from matformer.data.text_layout import Block, blocks_of, patches_that_fit, text_positions
from matformer.data.text_rows import Mask, PaddedText, TextRows, joined, mask_at, symbols_of
from matformer.errors import ParcelError
from matformer.layers.noise_levels import loss_weights, on_index
from matformer.layers.patchify import patchify
from matformer.layers.quad_tree import asked_blocks, leaf_numbers, num_leaves
from matformer.parallel.seeds import draw_time, generator
from matformer.parcels import Batch, Grid, Kind, MediaUnits, RouterUnits, TreeUnits
from matformer.shapes import NUM_AXES

INSIDE_TEXT, AFTER_TEXT, OPEN = range(3)  # what a router's question may be answered with


class Place(NamedTuple):
    """Where a document goes on: a span, and a patch of it (text only)."""

    span: int = 0
    patch: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a document that stands in one sequence: from `first` up to, not including, `last`."""

    document: Document
    first: Place
    last: Place


class Noise(NamedTuple):
    """What is drawn for a generated span: without its condition or not, t, and epsilon [N, F]."""

    blind: bool
    time: float
    epsilon: np.ndarray


class Tree(NamedTuple):
    """A noised copy's tree: its header's flat position, its document's number, levels of patches, shape bucket."""

    header: int
    document: int
    tree: np.ndarray
    bucket: int


DrawMask = Callable[[str, int, int], Mask]  # (document key, span of the sequence, symbols) -> Mask
DrawNoise = Callable[[str, int, tuple[int, int]], Noise]  # (document key, span of the sequence, (N, F)) -> Noise


def num_latents(span: MediaSpan, tree: np.ndarray | None, *, model: ModelConfig) -> int:
    """Latents of a copy of a media span that stands in `tree`: the tree's leaves, or all patches."""
    if tree is not None:
        return num_leaves(tree, rank=model.media[span.modality].rank)
    patch = model.media[span.modality].patch
    return math.prod(size // patch for size in span.latent.shape[1:])


def has_clean_copy(document: Document, span: int, *, model: ModelConfig) -> bool:
    """Whether media span number `span` stands clean in the sequence: given, or what follows is to see it clean."""
    media = document.spans[span]
    assert isinstance(media, MediaSpan)
    followed = span + 1 < len(document.spans)
    return media.role == "given" or (followed and model.media_context == "clean_copy")


def time_positions(media: MediaConfig) -> int:
    """Positions at the head of a noised span that hold nothing but its t."""
    return int(media.time_conditioning == "token")


def span_positions(document: Document, span: int, *, model: ModelConfig, first: int = 0) -> int:
    """Positions that span number `span` of a document takes, a text from patch `first` on."""
    part = document.spans[span]
    if isinstance(part, TextSpan):
        patches, followed = len(part.patch_lengths) - first, span + 1 < len(document.spans)
        return text_positions(patches, model.text, given=max(0, part.given - first), followed=followed)
    taken = 2
    if part.role == "generate":
        taken += time_positions(model.media[part.modality]) + num_latents(part, part.noised_tree, model=model)
    if has_clean_copy(document, span, model=model):
        taken += num_latents(part, part.tree, model=model)
    return taken


def document_positions(document: Document, *, model: ModelConfig) -> int:
    """Positions of a whole document with one start."""
    return 1 + sum(span_positions(document, span, model=model) for span in range(len(document.spans)))


def largest_span(model: ModelConfig) -> int:
    """Positions of the largest media span with all its copies, and a start before it."""
    copied = model.media_context == "clean_copy"
    sizes = [
        media.noised_latents(bucket) + copied * media.clean_latents(bucket) + time_positions(media)
        for media in model.media.values()
        for bucket in range(len(media.buckets))
    ]
    return 3 + max(sizes, default=0)


def cut(document: Document, first: Place, *, room: int, model: ModelConfig) -> tuple[Piece, int] | None:
    """As much of `document` from `first` on as fits into `room` positions, and how many it takes; None if nothing fits.

    Text is cut at a patch, media never.
    """
    used, (span, patch) = 1, first
    while span < len(document.spans):
        part = document.spans[span]
        size = span_positions(document, span, model=model, first=patch)
        if used + size > room:
            if isinstance(part, TextSpan) and used < room:
                left = len(part.patch_lengths) - patch
                taken = patches_that_fit(room - used, model.text, patches=left)
                patch += taken
                used += text_positions(taken, model.text, given=0, followed=False) if taken else 0
            break
        span, patch, used = span + 1, 0, used + size
    if used == 1 or used > room:
        return None
    return Piece(document, first, Place(span, patch)), used


def ended(piece: Piece) -> bool:
    """Whether nothing of the document is left after this piece."""
    return piece.last.span == len(piece.document.spans)


def draw_training_noise(
    *,
    seed: int,
    step: int,
    lane: int,
    blind_probability: float,
    time_shift: float,
    time_sampler: TimeSampler = "logit_normal",
) -> DrawNoise:
    """Noise keyed by (seed, step, lane, span of the sequence): the same on every rank and after every restart."""

    def draw(key: str, span: int, shape: tuple[int, int]) -> Noise:
        draws = generator(seed, "noise", step, lane, span)
        blind = bool(draws.random() < blind_probability)
        time = draw_time(draws, sampler=time_sampler, shift=time_shift)
        return Noise(blind, time, draws.standard_normal(shape, dtype=np.float32))

    return draw


def draw_training_masks(*, seed: int, step: int, lane: int, lanes: int) -> DrawMask:
    """Masks keyed as `draw_training_noise`; over the `lanes` of a global batch a block's times lie evenly in (0, 1).

    Source: MDLM and BD3-LM, antithetic (low-discrepancy) times.
    """

    def draw(key: str, span: int, size: int) -> Mask:
        shared = generator(seed, "mask time", step, span).random()
        time = (shared + (lane % lanes) / lanes) % 1.0
        return mask_at(time, generator(seed, "mask", step, lane, span).random(size))

    return draw


def draw_no_masks(key: str, span: int, size: int) -> Mask:
    """Nothing is masked: for callers that put in their own (see `with_masks`)."""
    return Mask(np.zeros(size, bool), 0.0)


def draw_zeros(key: str, span: int, shape: tuple[int, int]) -> Noise:
    """No noise at t = 0: for callers that put in their own."""
    return Noise(False, 0.0, np.zeros(shape, np.float32))


def pack_batch(
    rows: Sequence[Sequence[Piece]],
    draws: Sequence[DrawNoise],
    *,
    model: ModelConfig,
    sequence_latents: int,
    masks: Sequence[DrawMask] | None = None,
) -> Batch:
    """The microbatch whose sequences hold these pieces, padded to `sequence_latents`; `draws` gives each row's noise.

    `masks`: each row's masks of text, which only a diffusion objective asks for; without them nothing is masked.
    Raises ParcelError if a row does not fit.
    """
    builder = _Builder(model, num_rows=len(rows), length=sequence_latents)
    masks = masks or [draw_no_masks] * len(rows)
    for row, (pieces, draw, mask) in enumerate(zip(rows, draws, masks, strict=True)):
        builder.begin_row(row, draw, mask)
        for piece in pieces:
            builder.add(piece)
    return builder.batch()


def build_batch(
    documents: Sequence[Document], *, model: ModelConfig, sequence_latents: int, blind: bool = False
) -> Batch:
    """One whole document a row, for sampling; generated spans hold zeros as noise at t = 0 (see `with_noise`).

    `blind` marks all generated spans as without their condition. A last text span that is not ended has no router
    question after it. Raises ParcelError if a document does not fit.
    """

    def draw(key: str, span: int, shape: tuple[int, int]) -> Noise:
        return draw_zeros(key, span, shape)._replace(blind=blind)

    rows = [[Piece(document, Place(), Place(len(document.spans)))] for document in documents]
    return pack_batch(rows, [draw] * len(rows), model=model, sequence_latents=sequence_latents)


def with_noise(batch: Batch, *, time: float, seed: int, index: int) -> Batch:
    """The same batch with t = `time` in all generated spans and epsilon drawn from (document key, k-th span of the
    modality in the document, index): independent of packing, as long as no document is cut between two batches.
    Errors weigh the same at every t.
    """
    media = {}
    for name, units in batch.media.items():
        generated = torch.zeros(len(units.time_J), dtype=torch.bool)
        generated[units.span_N[units.noised_row_Q]] = True
        noise = torch.zeros_like(units.noise_NF)
        seen: dict[int, int] = {}
        for span, document in enumerate(units.document_J.tolist()):
            number = seen[document] = seen.get(document, -1) + 1
            rows = units.span_N == span
            if generated[span]:
                draws = generator(seed, "heldout", batch.document_keys[document], name, number, index)
                shape = (int(rows.sum()), noise.shape[1])
                noise[rows] = torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))
        media[name] = replace(
            units,
            noise_NF=noise,
            time_J=torch.where(generated, time, 0.0),
            weight_J=torch.ones_like(units.weight_J),
        )
    return replace(batch, media=media)


@dataclass(slots=True)
class _Copies:
    """Of each patch of each copy: its row among the patches, its latent's slot, the level of its leaf."""

    rows: list[np.ndarray] = field(default_factory=list)
    slots: list[np.ndarray] = field(default_factory=list)
    levels: list[np.ndarray] = field(default_factory=list)


@dataclass(slots=True)
class _Media:
    values: list[Tensor] = field(default_factory=list)
    noises: list[np.ndarray] = field(default_factory=list)
    places: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)
    headers: list[int] = field(default_factory=list)
    closings: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    noised: _Copies = field(default_factory=_Copies)
    clean: _Copies = field(default_factory=_Copies)
    time_slots: list[tuple[int, int]] = field(default_factory=list)  # (span, slot) of each position of `token`
    rows: int = 0


@dataclass(slots=True)
class _Route:
    slots: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    rules: list[int] = field(default_factory=list)
    span_ends: list[bool] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)


class _Builder:
    """Fills the arrays of a microbatch, piece by piece."""

    def __init__(self, model: ModelConfig, *, num_rows: int, length: int) -> None:
        self.model = model
        self.length = length
        self.index = {name: i for i, name in enumerate(model.modalities)}
        shape = (num_rows, length)
        self.kind = np.full(shape, Kind.PAD, np.int64)
        self.modality = np.full(shape, -1, np.int64)
        self.document = np.full(shape, -1, np.int64)
        self.span = np.full(shape, -1, np.int64)
        self.media_number = np.full(shape, -1, np.int64)
        self.blind = np.zeros(shape, bool)
        self.axes = np.zeros((*shape, NUM_AXES), np.int64)
        self.text, self.clean_text = TextRows(), TextRows()
        self.media = {name: _Media() for name in model.media}
        self.trees: dict[str, list[Tree]] = {name: [] for name, media in model.media.items() if media.noises_trees}
        self.route = _Route()
        self.keys: dict[str, int] = {}

    def begin_row(self, row: int, draw: DrawNoise, mask: DrawMask) -> None:
        self.row, self.draw, self.mask = row, draw, mask
        self.at = self.clock = self.pieces = self.spans = 0

    def add(self, piece: Piece) -> None:
        document, begin = piece.document, self.at
        self.number = self.keys.setdefault(document.key, len(self.keys))
        self._start(piece)
        last = piece.last
        for span in range(piece.first.span, last.span + (last.patch > 0)):
            part = document.spans[span]
            if isinstance(part, MediaSpan):
                self._media(piece, span)
                continue
            first = piece.first.patch if span == piece.first.span else 0
            self._text(piece, span, first, last.patch if span == last.span else len(part.patch_lengths))
        self.document[self.row, begin : self.at] = self.pieces
        self.pieces += 1

    def _start(self, piece: Piece) -> None:
        where = self._take(1, Kind.START)
        self.axes[self.row, where, 0] = self._tick(1)
        if piece.first.patch:
            self._ask(where.start, 0, rule=INSIDE_TEXT)
        elif piece.first.span < len(piece.document.spans):
            target, bucket = self._what_comes(piece, piece.first.span)
            self._ask(where.start, target, rule=OPEN, bucket=bucket)

    def _text(self, piece: Piece, span: int, first: int, last: int) -> None:
        part = piece.document.spans[span]
        assert isinstance(part, TextSpan)
        ends = last == len(part.patch_lengths) and part.ended
        if self.model.diffuses_text:
            at = self._diffused_text(piece, span, first, last)
        else:
            where = self._take(last - first, Kind.TEXT)
            self.modality[self.row, where] = 0
            self.axes[self.row, where, 0] = self._tick(last - first)
            self.text.add(
                symbols_of(part, first, last),
                lengths=part.patch_lengths[first:last],
                slots=self._slots(where),
                document=self.number,
                tokens=None if part.tokens is None else part.tokens[first:last],
            )
            self._ask(where.start, 0, rule=INSIDE_TEXT, count=last - first - 1)
            at = where.stop - 1
        if ends and self._is_asked(piece, span):
            target, bucket = self._what_comes(piece, span + 1)
            self._ask(at, target, rule=AFTER_TEXT, span_end=True, bucket=bucket)

    def _diffused_text(self, piece: Piece, span: int, first: int, last: int) -> int:
        """Header, the copies of each block, closing; where the closing stands."""
        part = piece.document.spans[span]
        assert isinstance(part, TextSpan)
        text, begin = self.model.text, self.at
        followed = last == len(part.patch_lengths) and span + 1 < len(piece.document.spans)
        blocks = blocks_of(last - first, text, given=max(0, part.given - first), followed=followed)
        padded = PaddedText(symbols_of(part, first, last), blocks, patch_bytes=text.patch_bytes)
        header = self._take(1, Kind.HEADER)
        self.axes[self.row, header, 0] = self._tick(1)
        number = self.spans
        for block in blocks:
            self._text_block(piece, block, padded)
        closing = self._take(1, Kind.CLOSING)
        self.axes[self.row, closing, 0] = self._tick(1)
        self.modality[self.row, begin : self.at] = 0
        self.media_number[self.row, begin : self.at] = number
        self.text.marks.append((self._slot(header.start), self._slot(closing.start)))
        return closing.start

    def _text_block(self, piece: Piece, block: Block, padded: PaddedText) -> None:
        symbols, scored = padded.of(block)
        lengths = np.full(block.size, self.model.text.patch_bytes)
        clock, places = self._tick(block.size), np.zeros((block.size, NUM_AXES - 1), np.int64)
        if block.noised:
            where = self._copy(places, clock, kind=Kind.NOISED)
            self.text.add(
                symbols,
                lengths=lengths,
                slots=self._slots(where),
                document=self.number,
                scored=scored,
                mask=self.mask(piece.document.key, self.spans, len(symbols)),
            )
        if block.clean:
            where = self._copy(places, clock, kind=Kind.CLEAN)
            self.clean_text.add(symbols, lengths=lengths, slots=self._slots(where), document=self.number)
        self.spans += 1

    def _media(self, piece: Piece, span: int) -> None:
        part = piece.document.spans[span]
        assert isinstance(part, MediaSpan)
        config, units = self.model.media[part.modality], self.media[part.modality]
        value = patchify(torch.from_numpy(part.latent), rank=config.rank, patch=config.patch)
        rows = len(value)
        generated = part.role == "generate"
        noise = self.draw(piece.document.key, self.spans, (rows, value.shape[1])) if generated else None
        places = patch_places(part.latent.shape[1:], patch=config.patch)
        begin = self.at
        header = self._take(1, Kind.HEADER)
        self.axes[self.row, header, 0] = self._tick(1)
        shared = self._tick(1)
        if noise is not None:
            if time_positions(config):
                told = self._copy(np.zeros((1, NUM_AXES - 1), np.int64), shared, kind=Kind.NOISED)
                units.time_slots.append((len(units.sizes), self._slot(told.start)))
            self._patches(part, units.noised, places, shared, kind=Kind.NOISED, tree=part.noised_tree)
            self.blind[self.row, begin : self.at] = noise.blind
            if part.noised_tree is not None:
                trees = self.trees[part.modality]
                trees.append(Tree(self._slot(header.start), self.number, part.noised_tree, part.bucket))
        if has_clean_copy(piece.document, span, model=self.model):
            self._patches(part, units.clean, places, shared, kind=Kind.CLEAN, tree=part.tree)
        closing = self._take(1, Kind.CLOSING)
        self.axes[self.row, closing, 0] = self._tick(1)
        self.modality[self.row, begin : self.at] = self.index[part.modality]
        self.media_number[self.row, begin : self.at] = self.spans
        units.values.append(value)
        units.places.append(places)
        units.noises.append(noise.epsilon if noise else np.zeros(tuple(value.shape), np.float32))
        units.times.append(self._time(piece.document, span, noise.time) if noise else 0.0)
        units.sizes.append(rows)
        units.buckets.append(part.bucket)
        units.headers.append(self._slot(header.start))
        units.closings.append(self._slot(closing.start))
        units.documents.append(self.number)
        units.rows += rows
        self.spans += 1
        if self._is_asked(piece, span):
            target, bucket = self._what_comes(piece, span + 1)
            self._ask(closing.start, target, rule=OPEN, span_end=True, bucket=bucket)

    def _patches(
        self,
        part: MediaSpan,
        copies: _Copies,
        places: np.ndarray,
        clock: np.ndarray,
        *,
        kind: Kind,
        tree: np.ndarray | None,
    ) -> None:
        """A copy of the span that is being laid down: a latent a patch, or a leaf of `tree`."""
        if tree is None:
            slots, levels = self._slots(self._copy(places, clock, kind=kind)), np.zeros(len(places), np.int64)
        else:
            patch = self.model.media[part.modality].patch
            leaf, middle = leaf_places(tree, [size // patch for size in part.latent.shape[1:]])
            slots, levels = self._slot(self._copy(middle, clock, kind=kind).start) + leaf, tree
        rows = self.media[part.modality].rows
        copies.rows.append(np.arange(rows, rows + len(places)))
        copies.slots.append(slots)
        copies.levels.append(levels)

    def _time(self, document: Document, span: int, drawn: float) -> float:
        """The t of a span: halved where text will read it noised, and on an index under DDPM. 0 stays: it is clean.

        Source: Transfusion, section 4.4, for the limit; half of what was drawn keeps the law's shape.
        """
        part, later = document.spans[span], document.spans[span + 1 :]
        assert isinstance(part, MediaSpan)
        if self.model.media_context == "noised" and any(isinstance(one, TextSpan) for one in later):
            drawn = drawn / 2
        straight = self.model.media[part.modality].objective == "flow"
        return drawn if straight or drawn == 0 else on_index(drawn)

    def _copy(self, places: np.ndarray, clock: np.ndarray, *, kind: Kind) -> slice:
        where = self._take(len(places), kind)
        self.span[self.row, where] = 2 * self.spans + (kind == Kind.CLEAN)
        self.axes[self.row, where, 0] = clock
        self.axes[self.row, where, 1:] = places
        return where

    def _is_asked(self, piece: Piece, span: int) -> bool:
        """Whether what follows span number `span` is known here: it stands in this piece, or the document ends."""
        return ended(piece) or span + 1 < piece.last.span or (span + 1 == piece.last.span and piece.last.patch > 0)

    def _what_comes(self, piece: Piece, span: int) -> tuple[int, int]:
        """Router target and shape bucket (-1 for none) of span number `span`."""
        if span == len(piece.document.spans):
            return len(self.index), -1
        part = piece.document.spans[span]
        return (0, -1) if isinstance(part, TextSpan) else (self.index[part.modality], part.bucket)

    def _ask(
        self, at: int, target: int, *, rule: int, span_end: bool = False, bucket: int = -1, count: int = 1
    ) -> None:
        """`count` equal questions from position `at` of the row on."""
        route, count = self.route, max(count, 0)
        route.slots.extend(range(self._slot(at), self._slot(at) + count))
        route.targets.extend([target] * count)
        route.rules.extend([rule] * count)
        route.span_ends.extend([span_end] * count)
        route.buckets.extend([bucket] * count)
        route.documents.extend([self.number] * count)

    def _take(self, count: int, kind: Kind) -> slice:
        where = slice(self.at, self.at + count)
        if where.stop > self.length:
            raise ParcelError(
                f"a row must fit into {self.length} latents, got at least {where.stop}; set data.sequence_latents"
            )
        self.kind[self.row, where] = kind
        self.at = where.stop
        return where

    def _tick(self, count: int) -> np.ndarray:
        self.clock += count
        return np.arange(self.clock - count, self.clock)

    def _slot(self, at: int) -> int:
        return self.row * self.length + at

    def _slots(self, where: slice) -> np.ndarray:
        return np.arange(self._slot(where.start), self._slot(where.stop))

    def batch(self) -> Batch:
        grid = Grid(
            *(
                torch.from_numpy(array)
                for array in (
                    self.kind,
                    self.modality,
                    self.document,
                    self.span,
                    self.media_number,
                    self.blind,
                    self.axes,
                )
            )
        )
        text = self.text.parcel(diffused=self.model.diffuses_text)
        return Batch(
            grid=grid,
            text=text,
            read=self.text.and_clean(self.clean_text) if self.model.diffuses_text else text,
            media={name: self._media_parcel(name) for name in self.model.media},
            trees={name: tree_units(found, media=self.model.media[name]) for name, found in self.trees.items()},
            route=self._route_parcel(),
            num_bytes=self.text.num_bytes,
            num_documents=len(self.keys),
            document_keys=tuple(self.keys),
        )

    def _media_parcel(self, name: str) -> MediaUnits:
        units, config = self.media[name], self.model.media[name]
        features = config.channels * config.patch**config.rank
        noises = [torch.from_numpy(noise) for noise in units.noises]
        times = torch.tensor(units.times, dtype=torch.float32)
        told = torch.tensor(units.time_slots, dtype=torch.int64).view(-1, 2)
        weights = loss_weights(
            times, objective=config.objective, weighting=config.loss_weighting, gamma=config.min_snr_gamma
        )
        return MediaUnits(
            value_NF=torch.cat(units.values) if units.values else torch.zeros(0, features),
            noise_NF=torch.cat(noises) if noises else torch.zeros(0, features),
            place_NX=torch.from_numpy(np.concatenate([np.zeros((0, 3), np.int64), *units.places])),
            span_N=torch.from_numpy(np.repeat(np.arange(len(units.sizes)), units.sizes)),
            time_J=times,
            bucket_J=torch.tensor(units.buckets, dtype=torch.int64),
            header_slot_J=torch.tensor(units.headers, dtype=torch.int64),
            closing_slot_J=torch.tensor(units.closings, dtype=torch.int64),
            document_J=torch.tensor(units.documents, dtype=torch.int64),
            noised_row_Q=joined(units.noised.rows),
            noised_slot_Q=joined(units.noised.slots),
            noised_level_Q=joined(units.noised.levels),
            clean_row_Q=joined(units.clean.rows),
            clean_slot_Q=joined(units.clean.slots),
            clean_level_Q=joined(units.clean.levels),
            weight_J=weights,
            time_span_Q=told[:, 0],
            time_slot_Q=told[:, 1],
        )

    def _route_parcel(self) -> RouterUnits:
        route, classes = self.route, len(self.index) + 2
        legal = np.ones((3, classes), bool)
        legal[INSIDE_TEXT, 1:] = False
        legal[AFTER_TEXT, 0] = False
        legal[:, -1] = self.model.router.recurrent
        return RouterUnits(
            slot_R=torch.tensor(route.slots, dtype=torch.int64),
            target_R=torch.tensor(route.targets, dtype=torch.int64),
            legal_RM=torch.from_numpy(legal[np.asarray(route.rules, np.int64)]),
            span_end_R=torch.tensor(route.span_ends, dtype=torch.bool),
            bucket_R=torch.tensor(route.buckets, dtype=torch.int64),
            document_R=torch.tensor(route.documents, dtype=torch.int64),
        )


def tree_units(trees: Sequence[Tree], *, media: MediaConfig) -> TreeUnits:
    """What is asked of the headers of these trees."""
    assert media.budget is not None
    asked = [asked_blocks(one.tree, grid=media.grid(one.bucket), levels=media.budget.levels) for one in trees]
    places = [np.zeros((0, 3), np.int64)]
    for _, corners, _ in asked:
        places.append(np.zeros((len(corners), 3), np.int64))
        places[-1][:, _axes(media.rank)] = corners
    return TreeUnits(
        slot_J=torch.tensor([one.header for one in trees], dtype=torch.int64),
        document_J=torch.tensor([one.document for one in trees], dtype=torch.int64),
        tree_K=joined([np.full(len(levels), number) for number, (levels, _, _) in enumerate(asked)]),
        level_K=joined([levels for levels, _, _ in asked]),
        place_KX=torch.from_numpy(np.concatenate(places)),
        split_K=joined([splits for _, _, splits in asked]).bool(),
    )


def patch_places(grid: Sequence[int], *, patch: int) -> Int[np.ndarray, "N 3"]:
    """t, y, x of each patch in raster order: audio lies on t, images on y and x, video on all three."""
    patches = [size // patch for size in grid]
    places = np.zeros((math.prod(patches), 3), np.int64)
    places[:, _axes(len(patches))] = np.indices(patches).reshape(len(patches), -1).T
    return places


def leaf_places(tree: Int[np.ndarray, " N"], grid: Sequence[int]) -> tuple[np.ndarray, Int[np.ndarray, "leaves 3"]]:
    """The number of each patch's leaf `[N]` in a grid of patches; t, y, x of each leaf: of its middle, rounded down.

    A leaf of one patch stands where its patch does without a budget.
    """
    number, first = leaf_numbers(tree, grid=grid)
    places = patch_places(grid, patch=1)[first]
    places[:, _axes(len(grid))] += ((1 << tree[first]) - 1)[:, None] // 2
    return number, places


def _axes(rank: int) -> slice:
    """Of t, y, x, those that a grid of this rank has."""
    return slice(1, 3) if rank == 2 else slice(rank)
