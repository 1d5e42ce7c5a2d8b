"""Held-out sums by document, over all ranks: the same numbers under any layout and however documents are packed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from matformer.engine.step import METRIC_SUMS, on_comm_device
from matformer.hosts.base import Host, Sums
from matformer.parallel.groups import sum_over_world
from matformer.parcels import Batch, Grid, Kind

Weigh = Callable[[Batch], tuple[Tensor, Tensor]]  # batch -> (document of each term, weight of each term)


@dataclass(frozen=True, slots=True)
class Documents:
    """Batches and the documents that stand in them; a document may stand in several batches."""

    batches: tuple[Batch, ...]
    keys: tuple[str, ...]

    def count(self, weigh: Weigh) -> np.ndarray:
        """Weights summed by document, from the batches alone: every rank knows them all."""
        counts, row_of = np.zeros(len(self.keys)), self._rows()
        for batch in self.batches:
            document, weight = weigh(batch)
            found = np.bincount(document.numpy(), weights=weight.double().numpy(), minlength=batch.num_documents)
            np.add.at(counts, rows_of(batch, row_of), found)
        return counts

    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}


def gather_documents(batches: Iterable[Batch], *, num_rows: int) -> Documents:
    """The batches with `num_rows` sequences each, empty ones added: a pipeline takes only equal shapes."""
    filled = tuple(with_empty_rows(batch, num_rows) for batch in batches)
    return Documents(filled, tuple(dict.fromkeys(key for batch in filled for key in batch.document_keys)))


def with_empty_rows(batch: Batch, num_rows: int) -> Batch:
    """The same batch with sequences of padding below."""
    missing = num_rows - len(batch.grid.kind_BS)
    if missing <= 0:
        return batch
    grid = batch.grid

    def more(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (0, 0) * (values.dim() - 1) + (0, missing), value=fill)

    filled = Grid(
        kind_BS=more(grid.kind_BS, int(Kind.PAD)),
        modality_BS=more(grid.modality_BS, -1),
        document_BS=more(grid.document_BS, -1),
        span_BS=more(grid.span_BS, -1),
        media_BS=more(grid.media_BS, -1),
        blind_BS=more(grid.blind_BS, 0),
        axes_BSX=more(grid.axes_BSX, 0),
    )
    return replace(batch, grid=filled)


def document_sums(host: Host, tables: Sequence[Documents]) -> list[dict[str, np.ndarray]]:
    """For each table: what the model sums (its parts and what metrics need), one number a document. Collective.

    Batches are dealt out over the data-parallel ranks, each of which runs as many as any other: under ZeRO 3 a
    forward is collective. Who has none left runs one again, and its sums are not taken.
    """
    groups = host.groups
    jobs = [(number, batch) for number, table in enumerate(tables) for batch in table.batches]
    if not jobs:
        return [{} for _ in tables]
    mine = jobs[groups.dp_rank :: groups.dp_size]
    rounds = -(-len(jobs) // groups.dp_size)
    fillers = [jobs[0]] * (rounds - len(mine))
    sums = host.forward_only([batch for _, batch in [*mine, *fillers]])
    names = _names(jobs[0][1])
    totals = [np.zeros((len(names), len(table.keys))) for table in tables]
    if groups.speaks:
        _take(sums[: len(mine)], mine, tables=tables, names=names, totals=totals)
    flat = torch.from_numpy(np.concatenate([total.reshape(-1) for total in totals]))
    summed = sum_over_world(on_comm_device(flat), groups).cpu().numpy()
    ends = np.cumsum([total.size for total in totals])
    parts = [part.reshape(len(names), -1) for part in np.split(summed, ends[:-1])]
    return [dict(zip(names, part, strict=True)) for part in parts]


def velocity_scalars(batch: Batch, modality: str) -> tuple[Tensor, Tensor]:
    """Document of each noised row, and its scalars: how many terms its loss sums there."""
    units = batch.media[modality]
    document = units.document_J[units.span_N[units.noised_row_Q]]
    return document, document.new_full(document.shape, units.value_NF.shape[1])


def rows_of(batch: Batch, row_of: dict[str, int]) -> np.ndarray:
    """Row of each of the batch's documents in its table."""
    return np.array([row_of[key] for key in batch.document_keys], np.int64)


def _names(batch: Batch) -> tuple[str, ...]:
    return ("text", *batch.media, "router", *METRIC_SUMS)


def _take(
    sums: Sequence[Sums],
    jobs: Sequence[tuple[int, Batch]],
    *,
    tables: Sequence[Documents],
    names: Sequence[str],
    totals: Sequence[np.ndarray],
) -> None:
    row_of = [table._rows() for table in tables]
    for (number, batch), found in zip(jobs, sums, strict=True):
        rows = rows_of(batch, row_of[number])
        for column, name in enumerate(names):
            np.add.at(totals[number][column], rows, found[name].double().cpu().numpy())
