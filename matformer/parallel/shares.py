"""Who encodes and decodes what: the small encoders run data-parallel inside the tensor-parallel group.

The ranks of a group hold the same microbatch. Its text pieces and media spans are dealt out, the dearest first, each to
the rank that has least to do; what a Preludio makes goes to the rank whose chunk of the positions it stands in, and
what a Coda reads comes back from there. Everything is index arithmetic on the CPU, known to every rank before the
forward, so no rank asks another how much it will send.

        positions     s a b h n n c | c e d d d s a       chunk of rank 0 | of rank 1
        encoded by    0 0 0 1 1 1 1   1 1 0 0 0 1 1       (start: by the rank in whose chunk it stands)

Balanced by the FLOPs of the units (bytes, patches), not by rows. A piece or span is never cut: local
attention and convolutions stay inside it (docs/decisions/0015).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from matformer.config.schema import MediaConfig, ModelConfig
from matformer.parallel.counts import MediaCounts, TextCounts
from matformer.parallel.flops import part_flops
from matformer.parallel.parts import media_coda, media_preludio, text_coda, text_preludio
from matformer.parcels import Batch, Exchange, MediaUnits, TextUnits, TreeUnits

Units = TypeVar("Units")


def share_out(batch: Batch, *, model: ModelConfig, rank: int, ranks: int) -> Batch:
    """The microbatch as one rank of a tensor-parallel group encodes and decodes it; the grid stays whole.

    Raises nothing: a rank may get no unit of a modality, and `ranks` must divide the positions (the config's check).
    """
    owners = _deal(batch, model=model, ranks=ranks)
    chunk = batch.grid.kind_BS.numel() // ranks
    asked_R = batch.route.slot_R // chunk  # a question is answered where its latent stands
    reads = _reading(batch, owners, back=0 if model.diffuses_text else 1, chunk=chunk, ranks=ranks)
    exchange = _exchange(_standing(batch, owners, model=model, ranks=ranks), reads, rank=rank)
    text = text_share(batch.text, owners.text == rank, marks=slice(rank, None, ranks))
    if batch.read is batch.text:
        read = text
    else:
        read = text_share(batch.read, owners.read == rank, marks=slice(rank, None, ranks))
    media = {name: media_share(units, owners.media[name] == rank) for name, units in batch.media.items()}
    trees = {name: tree_share(units, units.slot_J // chunk == rank) for name, units in batch.trees.items()}
    route = _taken(batch.route, {"R": asked_R == rank})
    return replace(batch, text=text, read=read, media=media, trees=trees, route=route, exchange=exchange)


@dataclass(frozen=True, slots=True)
class Owners:
    """The rank of each piece of text, of each piece that the Preludio reads, and of each media span."""

    text: Int[Tensor, " pieces"]
    read: Int[Tensor, " pieces"]
    media: Mapping[str, Int[Tensor, " J"]]


def _deal(batch: Batch, *, model: ModelConfig, ranks: int) -> Owners:
    same = batch.read is batch.text
    costs = {"text": _piece_costs(batch.text, model=model, coda=True, preludio=same)}
    for name, units in batch.media.items():
        costs[name] = _span_costs(units, model=model, media=model.media[name])
    dealt = deal(costs, ranks=ranks)
    text = dealt.pop("text")
    if same:
        return Owners(text, text, dealt)
    read = deal({"read": _piece_costs(batch.read, model=model, coda=False, preludio=True)}, ranks=ranks)
    return Owners(text, read["read"], dealt)


def deal(costs: Mapping[str, Sequence[float]], *, ranks: int) -> dict[str, Int[Tensor, " items"]]:
    """Each item's rank: the dearest first, each to the rank with least so far (Graham 1969: within 4/3 of the best)."""
    items = [(-cost, name, index) for name, of_name in costs.items() for index, cost in enumerate(of_name)]
    found = {name: torch.zeros(len(of_name), dtype=torch.int64) for name, of_name in costs.items()}
    loads = [(0.0, rank) for rank in range(ranks)]
    for negative, name, index in sorted(items):
        load, rank = loads[0]
        found[name][index] = rank
        heapq.heapreplace(loads, (load - negative, rank))
    return found


def _piece_costs(units: TextUnits, *, model: ModelConfig, preludio: bool, coda: bool) -> list[float]:
    """FLOPs of each piece in Preludio and Coda; pairs of attention left out."""

    def flops(counts: TextCounts) -> int:
        found = part_flops(list(text_preludio(model, counts))).total if preludio else 0
        return found + (part_flops(list(text_coda(model, counts))).total if coda else 0)

    symbols = torch.bincount(units.piece_U)
    patches = torch.bincount(_piece_of_patch(units), minlength=len(symbols))
    return (flops(TextCounts(symbols=1, pooled=1)) * symbols + flops(TextCounts(patches=1)) * patches).tolist()


def _span_costs(units: MediaUnits, *, model: ModelConfig, media: MediaConfig) -> list[float]:
    """FLOPs of each span with its copies in Preludio and Coda; pairs of attention left out."""

    def flops(counts: MediaCounts) -> int:
        pieces = (
            *media_preludio(media, model.atto.width, counts=counts),
            *media_coda(media, model.atto.width, counts=counts),
        )
        return part_flops(list(pieces)).total

    spans = len(units.bucket_J)
    noised = torch.bincount(units.span_N[units.noised_row_Q], minlength=spans)
    clean = torch.bincount(units.span_N[units.clean_row_Q], minlength=spans)
    nothing = flops(MediaCounts())
    each = [
        flops(one) - nothing for one in (MediaCounts(noised=1), MediaCounts(clean=1), MediaCounts(spans=1, times=1))
    ]
    return (each[0] * noised + each[1] * clean + each[2]).tolist()


def _piece_of_patch(units: TextUnits) -> Int[Tensor, " P"]:
    size_P = torch.bincount(units.patch_U, minlength=len(units.slot_P))
    return units.piece_U[size_P.cumsum(0) - size_P]


def text_share(units: TextUnits, mine: Bool[Tensor, " pieces"], *, marks: slice) -> TextUnits:
    """The symbols and patches of some pieces, numbered anew; `marks` says which headers and closings."""
    keep_U, keep_P = mine[units.piece_U], mine[_piece_of_patch(units)]
    keep_J = torch.zeros(len(units.header_slot_J), dtype=torch.bool)
    keep_J[marks] = True
    taken = _taken(units, {"U": keep_U, "P": keep_P, "J": keep_J})
    return replace(taken, piece_U=_numbers(mine)[taken.piece_U], patch_U=_numbers(keep_P)[taken.patch_U])


def media_share(units: MediaUnits, mine: Bool[Tensor, " J"]) -> MediaUnits:
    """Some spans with all their copies, numbered anew."""
    keep_N = mine[units.span_N]
    keep_Q = keep_N[units.noised_row_Q]
    keep_T = torch.zeros(len(units.time_T), dtype=torch.bool)
    keep_T[units.time_of_Q[keep_Q]] = True
    token_Q = mine[units.time_span_Q]
    keep_T[units.time_span_Q[token_Q]] = True  # T are the spans wherever a time stands at a position
    taken = _taken(
        units,
        {
            "N": keep_N,
            "J": mine,
            "T": keep_T,
            "noised": keep_Q,
            "noise": keep_Q,
            "time_of": keep_Q,
            "clean": keep_N[units.clean_row_Q],
            "time_span": token_Q,
            "time_slot": token_Q,
        },
    )
    row, time = _numbers(keep_N), _numbers(keep_T)
    return replace(
        taken,
        span_N=_numbers(mine)[taken.span_N],
        noised_row_Q=row[taken.noised_row_Q],
        clean_row_Q=row[taken.clean_row_Q],
        time_of_Q=time[taken.time_of_Q],
        time_span_Q=time[taken.time_span_Q],
    )


def tree_share(units: TreeUnits, mine: Bool[Tensor, " J"]) -> TreeUnits:
    """Some trees with all their questions, numbered anew."""
    taken = _taken(units, {"J": mine, "K": mine[units.tree_K]})
    return replace(taken, tree_K=_numbers(mine)[taken.tree_K])


def _numbers(keep: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The new number of each that is kept."""
    return keep.long().cumsum(0) - 1


def _taken(record: Units, keep: Mapping[str, Bool[Tensor, " n"]]) -> Units:
    """Rows of every field, by the letter of its first axis; rows Q, of which there are three kinds, by the name."""
    found = {}
    for field in fields(record):  # pyright: ignore[reportArgumentType] - a frozen record
        value = getattr(record, field.name)
        if not isinstance(value, Tensor):
            continue
        name, letters = field.name.rsplit("_", 1)
        letter = letters[0]
        if letter == "Q":
            letter = next(prefix for prefix in keep if len(prefix) > 1 and name.startswith(prefix))
        found[field.name] = value[keep[letter]] if len(value) else value
    return type(record)(**found)


def _standing(batch: Batch, owners: Owners, *, model: ModelConfig, ranks: int) -> Int[Tensor, " L"]:
    """The rank that encodes what stands at each position; -1 where no Preludio speaks (start, padding)."""
    owner_L = torch.full((batch.grid.kind_BS.numel(),), -1)
    read = batch.read
    owner_L[read.slot_P] = owners.read[_piece_of_patch(read)]
    for slot_J in (read.header_slot_J, read.closing_slot_J):
        owner_L[slot_J] = torch.arange(len(slot_J)) % ranks
    for name, units in batch.media.items():
        owner_J = owners.media[name]
        owner_N = owner_J[units.span_N]
        if model.media[name].objective != "next_latent":  # else no noised patch stands in the sequence
            owner_L[units.noised_slot_Q] = owner_N[units.noised_row_Q]
        owner_L[units.clean_slot_Q] = owner_N[units.clean_row_Q]
        owner_L[units.header_slot_J] = owner_J
        owner_L[units.closing_slot_J] = owner_J
        owner_L[units.time_slot_Q] = owner_J[units.time_span_Q]
    return owner_L


def _reading(batch: Batch, owners: Owners, *, back: int, chunk: int, ranks: int) -> Bool[Tensor, "ranks L"]:
    """Which positions' latents each rank reads. back: how far before a patch the latent stands that decodes it."""
    reads = torch.zeros(ranks, batch.grid.kind_BS.numel(), dtype=torch.bool)
    reads[owners.text[_piece_of_patch(batch.text)], batch.text.slot_P - back] = True
    for name, units in batch.media.items():
        reads[owners.media[name][units.span_N[units.noised_row_Q]], units.noised_slot_Q] = True
    for slots in (batch.route.slot_R, *(units.slot_J for units in batch.trees.values())):
        reads[slots // chunk, slots] = True
    return reads


def _exchange(owner_L: Int[Tensor, " L"], reads: Bool[Tensor, "ranks L"], *, rank: int) -> Exchange:
    """The tables of one rank: of what, in ascending order of position, it sends to each rank and gets from each."""
    ranks = len(reads)
    mine = slice(rank * (len(owner_L) // ranks), (rank + 1) * (len(owner_L) // ranks))
    encoded = torch.stack([owner_L == other for other in range(ranks)])
    return Exchange(
        own=mine,
        entering_sent=_by_chunk(encoded[rank], ranks),
        entering_received=tuple(encoded[:, mine].sum(1).tolist()),
        entering_slot_R=encoded[:, mine].nonzero()[:, 1],
        leaving_sent=tuple(reads[:, mine].sum(1).tolist()),
        leaving_slot_R=reads[:, mine].nonzero()[:, 1],
        leaving_received=_by_chunk(reads[rank], ranks),
        read_slot_R=reads[rank].nonzero()[:, 0],
    )


def _by_chunk(flag_L: Bool[Tensor, " L"], ranks: int) -> tuple[int, ...]:
    return tuple(flag_L.view(ranks, -1).sum(1).tolist())
