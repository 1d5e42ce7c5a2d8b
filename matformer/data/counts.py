"""What a microbatch holds, counted: what `parallel/flops.py` and `parallel/memory.py` ask for.

Linear in the number of positions: no S x S mask is made. The tests hold it to the masks themselves.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Int

from matformer.config.schema import MediaConfig, ModelConfig
from matformer.layers.tiles import ROWS, even_rows
from matformer.parallel.counts import Counts, MediaCounts, Pairs, TextCounts
from matformer.parcels import Batch, Grid, Kind, MediaUnits, TextUnits

TEXT = 0  # index of the modality


def counts_of(batch: Batch, model: ModelConfig) -> Counts:
    """Of a microbatch on the CPU. `computed` pairs are those of tiles (layers/tiles.py)."""
    begins = model.text.coda_input == "preludio"
    media = {name: _media_counts(batch.media[name], media=one) for name, one in model.media.items()}
    for name, trees in batch.trees.items():
        asked = {"trees": trees.slot_J.numel(), "blocks": trees.tree_K.numel()}
        media[name] = replace(media[name], **asked)
    return Counts(
        positions=batch.grid.kind_BS.numel(),
        atto=atto_pairs(batch.grid, noised_context=model.media_context == "noised"),
        read=_text_counts(batch.read, model, begins=begins),
        text=_text_counts(batch.text, model, begins=False),
        media=media,
        questions=batch.route.slot_R.numel(),
    )


def _text_counts(units: TextUnits, model: ModelConfig, *, begins: bool) -> TextCounts:
    size = np.unique(units.piece_U.numpy(), return_counts=True)[1] + begins
    pairs = local_pairs(size, window=model.text.window, both_ways=model.diffuses_text)
    return TextCounts(int(size.sum()), units.symbol_U.numel(), units.slot_P.numel(), pairs)


def _media_counts(units: MediaUnits, *, media: MediaConfig) -> MediaCounts:
    span_Q = units.span_N[units.noised_row_Q].numpy()
    size = np.diff(np.flatnonzero(np.diff(span_Q, prepend=-1, append=-1)))
    return MediaCounts(
        noised=len(span_Q),
        clean=units.clean_row_Q.numel(),
        spans=units.bucket_J.numel(),
        times=units.time_T.numel(),
        told=units.time_span_Q.numel(),
        leaves=_leaves(units, media),
        pairs=local_pairs(size, window=media.coda_window, both_ways=True),
    )


def _leaves(units: MediaUnits, media: MediaConfig) -> tuple[int, ...]:
    """Of level 1, 2, ... of a budget's trees: 2^(rank * level) patches share one."""
    if media.budget is None:
        return ()
    level_Q = np.concatenate([units.noised_level_Q.numpy(), units.clean_level_Q.numpy()])
    patches = np.bincount(level_Q, minlength=media.budget.levels + 1)
    return tuple(int(patches[level]) >> (media.rank * level) for level in range(1, media.budget.levels + 1))


def local_pairs(size: Int[np.ndarray, " pieces"], *, window: int, both_ways: bool) -> Pairs:
    """Of one layer of local attention over pieces of these sizes, one behind the other."""
    end_U, place_U = np.repeat(size.cumsum(), size), np.arange(size.sum())
    first_U = np.maximum(np.repeat(size.cumsum() - size, size), place_U - window + 1)
    end_U = np.minimum(end_U, place_U + window) if both_ways else place_U + 1
    return Pairs(int((end_U - first_U).sum()), _tiled(first_U, end_U))


def atto_pairs(grid: Grid, *, noised_context: bool) -> Pairs:
    """Of one layer of the Atto."""
    kind, document, span, modality, media, blind = (
        x.numpy()
        for x in (grid.kind_BS, grid.document_BS, grid.span_BS, grid.modality_BS, grid.media_BS, grid.blind_BS)
    )
    private = (kind == Kind.NOISED) & ((modality == TEXT) | (not noised_context))
    public = ~private & ~(blind & (kind == Kind.HEADER))
    size, place = kind.shape[1], np.arange(kind.shape[1])
    seen = computed = 0
    for row in range(len(kind)):
        pad = kind[row] == Kind.PAD
        first, _ = _bounds(document[row])
        of_span, end = _bounds(span[row])
        spans = span[row] >= 0
        before = np.concatenate([[0], public[row].cumsum()])
        open_query = before[place + 1] - before[first] + spans * (before[end] - before[place + 1])
        open_query += np.where(spans & private[row], end - of_span, 0)
        closed = 1 + _own(kind[row], media[row], place)
        seen += int(np.where(pad, 1, np.where(blind[row], closed, open_query)).sum())
        computed += _tiled(np.where(pad, place, first), np.where(spans, end, place + 1))
    return Pairs(seen, computed if size > 2 * ROWS else kind.size * size)


def _own(kind: Int[np.ndarray, " S"], media: Int[np.ndarray, " S"], place: Int[np.ndarray, " S"]) -> np.ndarray:
    """Keys of its own medium that a blind query sees: header and whole copy, or (causal patches) those before it."""
    header, end = _bounds(media)
    copy = kind == Kind.NOISED
    copies = np.concatenate([[0], copy.cumsum()])
    return np.where(copy, 1 + copies[end] - copies[header], place - header + 1)


def _bounds(number: Int[np.ndarray, " S"]) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """First and end of the run of equal numbers in which each place stands."""
    starts = np.flatnonzero(np.diff(number, prepend=number[0] - 1))
    ends = np.append(starts[1:], len(number))
    return np.repeat(starts, ends - starts), np.repeat(ends, ends - starts)


def _tiled(first: Int[np.ndarray, " Q"], end: Int[np.ndarray, " Q"]) -> int:
    """Pairs of tiles over queries that see keys first, ..., end - 1 at most."""
    if not len(first):
        return 0
    starts = np.arange(0, len(first), even_rows(len(first)))
    lows, highs = np.minimum.reduceat(first, starts), np.maximum.reduceat(end, starts)
    return int((np.diff(starts, append=len(first)) * (highs - lows)).sum())
