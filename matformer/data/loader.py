"""Batches of one rank: lanes of packed sequences, resumable from one small cursor a lane; and held-out documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from matformer.config.schema import ModelConfig, RunConfig
from matformer.data.coders import check_same
from matformer.data.continued import with_before
from matformer.data.mixture import BadSamples, Mixture
from matformer.data.packing import (
    DrawNoise,
    Piece,
    Place,
    cut,
    document_positions,
    draw_training_masks,
    draw_training_noise,
    draw_zeros,
    ended,
    largest_span,
    pack_batch,
    with_noise,
)
from matformer.data.row_cost import row_flops
from matformer.data.sources import Document, MediaSpan, Role, Source, Stream, TextSpan, open_source
from matformer.errors import ConfigError, DataError, ParcelError
from matformer.parallel.balance import deal_rows, ranks_that_share
from matformer.parallel.seeds import Permutation
from matformer.parcels import Batch

State = dict[str, Any]


class Lane:
    """One deterministic stream of sequences."""

    def __init__(self, mixture: Mixture, *, model: ModelConfig, sequence_latents: int) -> None:
        self.mixture = mixture
        self.model = model
        self.sequence_latents = sequence_latents
        self._document: tuple[str, int, Document] | None = None
        self._place = Place()

    def next_sequence(self) -> list[Piece]:
        """The pieces of the next sequence; a document that does not fit goes on in the one after it."""
        pieces: list[Piece] = []
        room = self.sequence_latents
        while room > 1:
            if self._document is None:
                self._document = self.mixture.next(lambda document: document_positions(document, model=self.model))
            taken = cut(self._document[2], self._place, room=room, model=self.model)
            if taken is None:
                break
            piece, used = taken
            pieces.append(piece)
            room -= used
            if not ended(piece):
                self._place = piece.last
                break
            self._document, self._place = None, Place()
        return pieces

    def state(self) -> State:
        """The cursor, fit for json: what each source gave, and the document that goes on, if any."""
        current = None if self._document is None else [*self._document[:2], *self._place]
        return {"sources": self.mixture.state(), "current": current}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises DataError if the document that goes on cannot be read."""
        self.mixture.load_state(state["sources"])
        self._document, self._place = None, Place()
        if state["current"] is not None:
            name, place, *at = state["current"]
            if name not in self.mixture.streams:
                raise DataError(
                    f"source {name!r} must stay while a document of it goes on, got {list(self.mixture.streams)}; "
                    "set data.sources"
                )
            self._document = (name, place, self.mixture.streams[name].document(place))
            self._place = Place(*at)


class Row(NamedTuple):
    """A sequence to be packed: its lane, what stands in it, and its estimated FLOPs."""

    lane: int
    pieces: list[Piece]
    flops: int


class Loader:
    """The share of one data-parallel rank in every global batch.

    Global batch n is the next sequence of lanes (n * G + i) mod L, i = 0 .. G - 1. Rows i = r mod dp are rank r's, but
    that neighbouring ranks (`parallel.balance_ranks`) put theirs together and deal them out by estimated FLOPs, as many
    to each: every one of them reads the rows of all, and packs its own. Which rows a step has, and what is drawn for
    them, does not depend on who takes them.
    `state()` holds the lanes that this rank reads after the last batch it gave; states of all ranks merge to one that
    any dp loads.
    """

    def __init__(
        self, config: RunConfig, *, split: str = "train", dp_rank: int = 0, dp_size: int = 1, prefetch: bool = True
    ) -> None:
        _check(config, dp_size=dp_size)
        self.config = config
        self.bad = BadSamples(config.data.max_bad_samples)
        self.sources = {
            name: open_source(name, data=config.data, model=config.model, split=split) for name in config.data.sources
        }
        check_same({source.reader.folder: source.reader.manifest for source in self.sources.values()})
        self._rank, self._dp_size = dp_rank, dp_size
        self._sharing = ranks_that_share(dp_size, most=config.parallel.balance_ranks)
        self._own = [lane for lane in range(config.data.lanes) if self._is_near(lane % dp_size)]
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=_alone) if prefetch else None
        self._pending: Future[tuple[list[Batch], State]] | None = None
        self._begin()

    def next_global_batch(self, step: int) -> list[Batch]:
        """Microbatches of this rank in global batch `step`; steps come in order. Raises DataError, ParcelError."""
        if step != self._state["step"]:
            raise ParcelError(
                f"the loader must give step {self._state['step']} next, got {step}; call load_state first"
            )
        batches, state = self._make(step, self._state) if self._pending is None else self._pending.result()
        self._state = state
        if self._executor is not None:
            self._pending = self._executor.submit(self._make, step + 1, state)
        return batches

    def state(self) -> State:
        """Cursors of this rank's lanes after the last batch given, fit for json."""
        return self._state

    def load_state(self, state: State) -> None:
        """Go on after the batch that `state` (merged over all ranks) was taken at, whatever dp was then."""
        if state["num_lanes"] != self.config.data.lanes:
            raise DataError(
                f"data.lanes must stay what the state was saved with, {state['num_lanes']}, "
                f"got {self.config.data.lanes}; set data.lanes"
            )
        missing = [lane for lane in self._own if str(lane) not in state["lanes"]]
        if missing:
            raise DataError(
                f"a loader state must hold every lane, got none for {missing[:8]}; merge the states of all ranks"
            )
        self._begin()
        cursors = {str(lane): state["lanes"][str(lane)] for lane in self._own}
        for lane, cursor in cursors.items():
            self._lanes[int(lane)].load_state(cursor)
        self._state = {"step": state["step"], "num_lanes": state["num_lanes"], "lanes": cursors}

    def close(self) -> None:
        """Let the background thread end; the loader still works, without reading ahead."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)  # cancelling would leave a future that nobody ever completes
            self._executor = None

    def _begin(self) -> None:
        if self._pending is not None:
            wait([self._pending])
            self._pending = None
        self._lanes = {lane: self._lane(lane) for lane in self._own}
        cursors = {str(lane): self._lanes[lane].state() for lane in self._own}
        self._state: State = {"step": 0, "num_lanes": self.config.data.lanes, "lanes": cursors}

    def _lane(self, lane: int) -> Lane:
        config, seed = self.config, self.config.seed
        streams = {
            name: Stream(source, seed=seed, lane=lane, lanes=config.data.lanes) for name, source in self.sources.items()
        }
        weights = {name: source.weight for name, source in config.data.sources.items()}
        mixture = Mixture(streams, weights, seed=seed, lane=lane, bad=self.bad)
        return Lane(mixture, model=config.model, sequence_latents=config.data.sequence_latents)

    def _make(self, step: int, state: State) -> tuple[list[Batch], State]:
        data, train = self.config.data, self.config.train
        lanes = [
            (step * train.global_batch + i) % data.lanes
            for i in range(train.global_batch)
            if self._is_near(i % self._dp_size)
        ]
        rows = [self._row(lane) for lane in lanes]
        own = deal_rows([row.flops for row in rows], ranks=self._sharing)[self._rank % self._sharing]
        batches = [
            self._microbatch(step, [rows[number] for number in own[first : first + train.micro_batch]])
            for first in range(0, len(own), train.micro_batch)
        ]
        changed = {str(lane): self._lanes[lane].state() for lane in lanes}
        return batches, {**state, "step": step + 1, "lanes": {**state["lanes"], **changed}}

    def _is_near(self, rank: int) -> bool:
        """Whether that data-parallel rank puts its rows together with this one."""
        return rank // self._sharing == self._rank // self._sharing

    def _row(self, lane: int) -> Row:
        data = self.config.data
        pieces = self._lanes[lane].next_sequence()
        return Row(lane, pieces, row_flops(pieces, model=self.config.model, sequence_latents=data.sequence_latents))

    def _microbatch(self, step: int, rows: Sequence[Row]) -> Batch:
        data, seed = self.config.data, self.config.seed
        lanes = [row.lane for row in rows]
        draws = [training_noise(self.config, step=step, lane=lane) for lane in lanes]
        abreast = self.config.train.global_batch
        masks = [draw_training_masks(seed=seed, step=step, lane=lane, lanes=abreast) for lane in lanes]
        pieces, model = [row.pieces for row in rows], self.config.model
        batch = pack_batch(pieces, draws, masks=masks, model=model, sequence_latents=data.sequence_latents)
        return replace(batch, flops=sum(row.flops for row in rows))


def training_noise(config: RunConfig, *, step: int, lane: int) -> DrawNoise:
    """What the config draws for generated spans of a lane in a step."""
    data = config.data
    return draw_training_noise(
        seed=config.seed,
        step=step,
        lane=lane,
        blind_probability=data.blind_probability,
        time_shift=data.time_shift,
        time_sampler=data.time_sampler,
    )


def _alone() -> None:
    """Keep torch in the calling thread: a second pool of workers on the same cores slows the model's by a third."""
    torch.set_num_threads(1)


def merge_states(states: Sequence[State]) -> State:
    """One state of the states of all ranks at the same step. Raises DataError if their steps or lanes differ."""
    first = states[0]
    for state in states[1:]:
        if (state["step"], state["num_lanes"]) != (first["step"], first["num_lanes"]):
            raise DataError(
                f"loader states must be of one step and number of lanes, got steps {[s['step'] for s in states]} "
                f"and lanes {[s['num_lanes'] for s in states]}; save them together"
            )
    lanes = {lane: cursor for state in states for lane, cursor in state["lanes"].items()}
    return {**first, "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


def heldout_documents(
    config: RunConfig,
    source: str | Source,
    *,
    max_bytes: int | None = None,
    max_spans: int | None = None,
    direction: Role | None = "generate",
) -> Iterator[Document]:
    """Whole held-out documents in a fixed shuffled order (no seed of the run enters), up to bytes or media spans.

    Media documents are caption -> media under `direction` "generate", media -> caption under "given".
    """
    opened = (
        open_source(source, data=config.data, model=config.model, split="heldout")
        if isinstance(source, str)
        else source
    )
    order = Permutation(len(opened), 0, "heldout", opened.name)
    num_bytes = num_spans = 0
    for number in range(len(opened)):
        document = opened.pick(order[number], direction=direction)
        num_bytes += sum(len(span.data) for span in document.spans if isinstance(span, TextSpan))
        num_spans += sum(isinstance(span, MediaSpan) for span in document.spans)
        if number and (_exceeds(num_bytes, max_bytes) or _exceeds(num_spans, max_spans)):
            return
        yield document


def heldout_batches(
    config: RunConfig,
    source: str | Source,
    *,
    max_bytes: int | None = None,
    max_spans: int | None = None,
    direction: Role | None = "generate",
) -> Iterator[Batch]:
    """Held-out documents packed to batches of train.micro_batch sequences; a document that fits whole is not cut.

    The same on every rank and under any layout. Generated spans have t = 0.5 and noise of index 0: see `with_noise`.
    """
    documents = heldout_documents(config, source, max_bytes=max_bytes, max_spans=max_spans, direction=direction)
    yield from pack_documents(documents, config=config)


def pack_documents(documents: Iterator[Document] | Sequence[Document], *, config: RunConfig) -> Iterator[Batch]:
    """Documents one after the other as held-out batches (see `heldout_batches`)."""
    for batch, before in with_before(_packed(documents, config=config)):
        yield with_noise(batch, time=0.5, seed=0, index=0, before=before)


def _packed(documents: Iterator[Document] | Sequence[Document], *, config: RunConfig) -> Iterator[Batch]:
    """The same, not yet noised."""
    length, most = config.data.sequence_latents, config.train.micro_batch
    rows = _rows(documents, model=config.model, length=length)
    while some := list(itertools.islice(rows, most)):
        yield pack_batch(some, [draw_zeros] * len(some), model=config.model, sequence_latents=length)


def _rows(
    documents: Iterator[Document] | Sequence[Document], *, model: ModelConfig, length: int
) -> Iterator[list[Piece]]:
    row: list[Piece] = []
    room = length
    for document in documents:
        if room < document_positions(document, model=model) <= length:
            yield row
            row, room = [], length
        place, done = Place(), False
        while not done:
            taken = cut(document, place, room=room, model=model)
            if taken is not None:
                piece, used = taken
                row.append(piece)
                place, room, done = piece.last, room - used, ended(piece)
            if not done:
                if not row:
                    raise DataError(
                        f"a span of {document.key} must fit into {length} latents; set data.sequence_latents"
                    )
                yield row
                row, room = [], length
    if row:
        yield row


def _exceeds(number: int, limit: int | None) -> bool:
    return limit is not None and number > limit


def _check(config: RunConfig, *, dp_size: int) -> None:
    data, train = config.data, config.train
    if data.lanes % train.global_batch:
        raise ConfigError(
            f"data.lanes must be a multiple of train.global_batch {train.global_batch}, got {data.lanes}; "
            "set data.lanes"
        )
    if train.global_batch % (dp_size * train.micro_batch):
        raise ConfigError(
            f"train.global_batch must be a multiple of dp x micro_batch = {dp_size} x {train.micro_batch}, "
            f"got {train.global_batch}; set train.micro_batch"
        )
    largest = largest_span(config.model)
    if largest > data.sequence_latents:
        raise ConfigError(
            f"data.sequence_latents must hold the largest media span twice, {largest} latents, "
            f"got {data.sequence_latents}; set data.sequence_latents"
        )
