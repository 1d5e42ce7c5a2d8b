"""Documents -> sequences of S positions -> the `Batch` parcel, as SEMANTICS says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from matformer.config.schema import MediaConfig, ModelConfig, TimeSampler
from matformer.data.continued import NOTHING_BEFORE, Before, documents_of_units, numbers_in_document
from matformer.data.copies import Copies, Tree, leaf_places, num_latents, patch_places, tree_units
from matformer.data.sources import Document, MediaSpan, TextSpan
from matformer.data.text_layout import Block, blocks_of, patches_that_fit, text_positions
from matformer.data.text_rows import Mask, PaddedText, TextRows, joined, mask_at, symbols_of
from matformer.errors import ParcelError
from matformer.layers.noise_levels import loss_weights, on_index
from matformer.layers.patchify import patchify
from matformer.parallel.seeds import draw_time, draw_times, generator
from matformer.parcels import Batch, Grid, Kind, MediaUnits, RouterUnits
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
    """What is drawn for a generated span: without its condition or not, t, and epsilon [N, F].

    Under `next_latent` t is [K, N] and epsilon [K, N, F]: K noises of each latent.
    """

    blind: bool
    time: float | np.ndarray
    epsilon: np.ndarray


DrawMask = Callable[[str, int, int], Mask]  # (document key, span of the sequence, symbols) -> Mask
# (document key, span of the sequence, shape of epsilon) -> Noise; its K may be less than what is asked for
DrawNoise = Callable[[str, int, tuple[int, ...]], Noise]


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
    media, taken = model.media[part.modality], 2
    if part.role == "generate" and not media.causal:
        taken += time_positions(media) + num_latents(part, part.noised_tree, media=media)
    if media.causal or has_clean_copy(document, span, model=model):
        taken += num_latents(part, part.tree, media=media)
    return taken


def document_positions(document: Document, *, model: ModelConfig) -> int:
    """Positions of a whole document with one start."""
    return 1 + sum(span_positions(document, span, model=model) for span in range(len(document.spans)))


def largest_span(model: ModelConfig) -> int:
    """Positions of the largest media span with all its copies, and a start before it."""
    sizes = [
        media.noised_latents(bucket)
        + (model.most_copies(media) - 1) * media.clean_latents(bucket)
        + time_positions(media)
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

    def draw(key: str, span: int, shape: tuple[int, ...]) -> Noise:
        draws = generator(seed, "noise", step, lane, span)
        blind = bool(draws.random() < blind_probability)
        if len(shape) == 2:
            time = draw_time(draws, sampler=time_sampler, shift=time_shift)
        else:
            time = draw_times(draws, shape[:-1], sampler=time_sampler, shift=time_shift)
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


def draw_zeros(key: str, span: int, shape: tuple[int, ...]) -> Noise:
    """No noise at t = 0, once for each latent: for callers that put in their own."""
    if len(shape) == 2:
        return Noise(False, 0.0, np.zeros(shape, np.float32))
    return Noise(False, np.zeros((1, shape[1])), np.zeros((1, *shape[1:]), np.float32))


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

    def draw(key: str, span: int, shape: tuple[int, ...]) -> Noise:
        return draw_zeros(key, span, shape)._replace(blind=blind)

    rows = [[Piece(document, Place(), Place(len(document.spans)))] for document in documents]
    return pack_batch(rows, [draw] * len(rows), model=model, sequence_latents=sequence_latents)


def with_noise(batch: Batch, *, time: float, seed: int, index: int, before: Before = NOTHING_BEFORE) -> Batch:
    """The same batch with t = `time` in all generated spans and epsilon drawn from (document key, k-th span of the
    modality in the document, index): the same in whatever batches a document stands, if `before` is what stood before
    this one. Errors weigh the same at every t. Of a batch whose latents have one noise each (see `draw_zeros`).
    """
    media, documents = {}, documents_of_units(batch)
    for name, units in batch.media.items():
        span_Q = units.span_N[units.noised_row_Q]
        noise = torch.zeros_like(units.noise_QF)
        numbers = numbers_in_document(documents[name], before=before.get(name, 0))
        for span, (document, number) in enumerate(zip(documents[name], numbers, strict=True)):
            rows = span_Q == span
            if rows.any():
                draws = generator(seed, "heldout", batch.document_keys[document], name, number, index)
                shape = (int(rows.sum()), noise.shape[1])
                noise[rows] = torch.from_numpy(draws.standard_normal(shape, dtype=np.float32))
        media[name] = replace(
            units,
            noise_QF=noise,
            time_T=torch.zeros_like(units.time_T).index_fill(0, units.time_of_Q, time),
            weight_T=torch.ones_like(units.weight_T),
        )
    return replace(batch, media=media)


@dataclass(slots=True)
class _Media:
    values: list[Tensor] = field(default_factory=list)
    noises: list[np.ndarray] = field(default_factory=list)  # of noised patches alone
    places: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    time_of: list[np.ndarray] = field(default_factory=list)  # of noised patches alone
    buckets: list[int] = field(default_factory=list)
    headers: list[int] = field(default_factory=list)
    closings: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    noised: Copies = field(default_factory=Copies)  # its slots: of the latents that decode them
    clean: Copies = field(default_factory=Copies)
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
        places = patch_places(config.grid(part.bucket))
        begin = self.at
        header = self._take(1, Kind.HEADER)
        self.axes[self.row, header, 0] = self._tick(1)
        if config.causal:
            self._causal_patches(piece, span, places)
        else:
            self._copies(piece, span, places, begin=begin)
        closing = self._take(1, Kind.CLOSING)
        self.axes[self.row, closing, 0] = self._tick(1)
        self.modality[self.row, begin : self.at] = self.index[part.modality]
        self.media_number[self.row, begin : self.at] = self.spans
        units.values.append(value)
        units.places.append(places)
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

    def _copies(self, piece: Piece, span: int, places: np.ndarray, *, begin: int) -> None:
        """The noised copy of a generated span (its header stands at `begin`), and the clean one where there is one."""
        part, shared = piece.document.spans[span], self._tick(1)
        assert isinstance(part, MediaSpan)
        config, units, rows = self.model.media[part.modality], self.media[part.modality], len(places)
        time = 0.0
        if part.role == "generate":
            noise = self.draw(piece.document.key, self.spans, (rows, config.patch_scalars))
            time = self._time(piece.document, span, float(noise.time))
            if time_positions(config):
                told = self._copy(np.zeros((1, NUM_AXES - 1), np.int64), shared, kind=Kind.NOISED)
                units.time_slots.append((len(units.times), self._slot(told.start)))
            slots = self._latents(part, places, shared, kind=Kind.NOISED, tree=part.noised_tree)
            self.blind[self.row, begin : self.at] = noise.blind
            units.noised.add(slots, first_row=units.rows, tree=part.noised_tree)
            units.noises.append(noise.epsilon)
            units.time_of.append(np.full(rows, len(units.times)))
            if part.noised_tree is not None:
                tree = Tree(self._slot(begin), self.number, part.noised_tree, part.bucket)
                self.trees[part.modality].append(tree)
        units.times.append(time)
        if has_clean_copy(piece.document, span, model=self.model):
            slots = self._latents(part, places, shared, kind=Kind.CLEAN, tree=part.tree)
            units.clean.add(slots, first_row=units.rows, tree=part.tree)

    def _latents(
        self, part: MediaSpan, places: np.ndarray, clock: np.ndarray, *, kind: Kind, tree: np.ndarray | None
    ) -> np.ndarray:
        """Lays down a copy, a latent a patch or a leaf of `tree`; the slot of each patch's latent."""
        if tree is None:
            return self._slots(self._copy(places, clock, kind=kind))
        leaf, middles = leaf_places(tree, self.model.media[part.modality].grid(part.bucket))
        return self._slot(self._copy(middles, clock, kind=kind).start) + leaf

    def _causal_patches(self, piece: Piece, span: int, places: np.ndarray) -> None:
        """The patches of a span once, clean and causal, behind their header.

        Each of a generated span is decoded from the position before it, once for every noise that is drawn for it.
        """
        part = piece.document.spans[span]
        assert isinstance(part, MediaSpan)
        config, units, rows = self.model.media[part.modality], self.media[part.modality], len(places)
        where = self._take(rows, Kind.CLEAN)
        self.axes[self.row, where, 0] = self._tick(1)
        self.axes[self.row, where, 1:] = places
        slots = self._slots(where)
        units.clean.add(slots, first_row=units.rows)
        if part.role == "given":
            return
        shape = (config.next_latent.noises, rows, config.patch_scalars)
        noise = self.draw(piece.document.key, self.spans, shape)
        self.blind[self.row, where.start - 1 : where.stop] = noise.blind
        for time_N, epsilon_NF in zip(np.asarray(noise.time), noise.epsilon, strict=True):
            units.noised.add(slots - 1, first_row=units.rows)
            units.noises.append(epsilon_NF)
            units.time_of.append(np.arange(len(units.times), len(units.times) + rows))
            units.times.extend(_on_path(time, config) for time in time_N.tolist())

    def _time(self, document: Document, span: int, drawn: float) -> float:
        """The t of a span: halved where text will read it noised, and on an index under DDPM. 0 stays: it is clean.

        Source: Transfusion, section 4.4, for the limit; half of what was drawn keeps the law's shape.
        """
        part, later = document.spans[span], document.spans[span + 1 :]
        assert isinstance(part, MediaSpan)
        if self.model.media_context == "noised" and any(isinstance(one, TextSpan) for one in later):
            drawn = drawn / 2
        return _on_path(drawn, self.model.media[part.modality])

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
            kind_BS=torch.from_numpy(self.kind),
            modality_BS=torch.from_numpy(self.modality),
            document_BS=torch.from_numpy(self.document),
            span_BS=torch.from_numpy(self.span),
            media_BS=torch.from_numpy(self.media_number),
            blind_BS=torch.from_numpy(self.blind),
            axes_BSX=torch.from_numpy(self.axes),
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
        features = config.patch_scalars
        noises = [torch.from_numpy(noise) for noise in units.noises]
        times = torch.tensor(units.times, dtype=torch.float32)
        told = torch.tensor(units.time_slots, dtype=torch.int64).view(-1, 2)
        weights = loss_weights(
            times, objective=config.prediction, weighting=config.loss_weighting, gamma=config.min_snr_gamma
        )
        return MediaUnits(
            value_NF=torch.cat(units.values) if units.values else torch.zeros(0, features),
            place_NX=torch.from_numpy(np.concatenate([np.zeros((0, 3), np.int64), *units.places])),
            span_N=torch.from_numpy(np.repeat(np.arange(len(units.sizes)), units.sizes)),
            bucket_J=torch.tensor(units.buckets, dtype=torch.int64),
            header_slot_J=torch.tensor(units.headers, dtype=torch.int64),
            closing_slot_J=torch.tensor(units.closings, dtype=torch.int64),
            document_J=torch.tensor(units.documents, dtype=torch.int64),
            noised_row_Q=joined(units.noised.rows),
            noised_slot_Q=joined(units.noised.slots),
            noised_level_Q=joined(units.noised.levels),
            noise_QF=torch.cat(noises) if noises else torch.zeros(0, features),
            time_of_Q=joined(units.time_of),
            time_T=times,
            weight_T=weights,
            clean_row_Q=joined(units.clean.rows),
            clean_slot_Q=joined(units.clean.slots),
            clean_level_Q=joined(units.clean.levels),
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


def _on_path(time: float, media: MediaConfig) -> float:
    """A drawn t as the path has it: on an index under DDPM. 0 stays: it is clean."""
    return time if media.prediction == "flow" or time == 0 else on_index(time)
