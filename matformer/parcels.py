"""Frozen records handed from one part to the next. Shape letters: `shapes.py`; the contract: SEMANTICS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Record = TypeVar("Record")


class Kind(IntEnum):
    """What stands at a position of the Atto's sequence."""

    PAD = 0
    START = 1
    TEXT = 2
    HEADER = 3
    NOISED = 4
    CLEAN = 5
    CLOSING = 6
    RECURRENT = 7


@dataclass(frozen=True, slots=True)
class Grid:
    """Who stands where in the Atto's sequences: all that mask and positions need.

    modality: index into the config's modalities (text is 0), -1 at start and padding.
    document: counts documents of the sequence from 0 (a continuation is a document of its own), -1 at padding.
    span: number of the bidirectional span (noised and clean copies have different ones), unique in its sequence,
        -1 at causal positions.
    media: number of the media span that a header, copy or closing belongs to, unique in its sequence, else -1.
    blind: headers and noised copies of spans that are generated without their condition (guidance).
    axes: positions on document, t, y, x. Positions of the document axis restart in every sequence at 0.
    causal_runs: on a device, and only where every mask of this grid is plain causal: lengths of the runs of positions,
        in flat order, of which each sees the earlier ones of its own (`plain_causal_runs`).
    """

    kind_BS: Int[Tensor, "B S"]
    modality_BS: Int[Tensor, "B S"]
    document_BS: Int[Tensor, "B S"]
    span_BS: Int[Tensor, "B S"]
    media_BS: Int[Tensor, "B S"]
    blind_BS: Bool[Tensor, "B S"]
    axes_BSX: Int[Tensor, "B S X"]
    causal_runs: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> Grid:
        """The same grid on a device, which need not be asked any more whether its masks are plain causal."""
        return replace(_moved(self, device), causal_runs=self.plain_causal_runs())

    def plain_causal_runs(self) -> tuple[int, ...] | None:
        """Lengths of documents and paddings, one after the other; None if a mask has more in it than their order."""
        if bool((self.span_BS >= 0).any() | self.blind_BS.any() | (self.kind_BS == Kind.NOISED).any()):
            return None
        row_BS = torch.arange(len(self.kind_BS), device=self.kind_BS.device)[:, None].expand_as(self.kind_BS)
        both = torch.stack((row_BS.flatten(), self.document_BS.flatten()))
        return tuple(torch.unique_consecutive(both, dim=1, return_counts=True)[1].tolist())


@dataclass(frozen=True, slots=True)
class TextUnits:
    """All text symbols of a microbatch, one after the other, none padded.

    A piece is a text span, or the part of one that fell into this sequence; its symbols are its bytes and, unless
    the span goes on in a later sequence, `<end>`. Local attention, n-grams and the Coda never leave a piece.
    symbol: 0..255 bytes, 256 `<end>`: the Preludio's input and the Coda's target alike.
    coda_input: `<begin>` at the first symbol of a piece, else the symbol before.
    place: 0, 1, 2, ... inside the piece. piece: ascending from 0. patch: ascending from 0, one number a patch.
    slot: flat position b * S + s of each patch; the latent that decodes a patch stands at slot - 1.
    document: number of the document in the microbatch (0 .. num_documents - 1), for held-out sums.
    token: the number of each patch where text is pieces of a vocabulary, else empty.

    Under a diffusion objective a piece is one block's noised or clean copy, coda_input is what is seen of each
    symbol (itself or `<mask>`), and the latent that decodes a patch stands at its own slot.
    scored: whether a symbol counts (padding behind `<end>` does not). weight: of its nats in the loss; 1 under `ar`,
    else 1 / p where it is masked and scored. header_slot, closing_slot: flat positions around diffused spans.
    """

    symbol_U: Int[Tensor, " U"]
    coda_input_U: Int[Tensor, " U"]
    piece_U: Int[Tensor, " U"]
    place_U: Int[Tensor, " U"]
    patch_U: Int[Tensor, " U"]
    document_U: Int[Tensor, " U"]
    slot_P: Int[Tensor, " P"]
    token_P: Int[Tensor, " P"]
    scored_U: Bool[Tensor, " U"]
    weight_U: Float[Tensor, " U"]
    header_slot_J: Int[Tensor, " J"]
    closing_slot_J: Int[Tensor, " J"]


@dataclass(frozen=True, slots=True)
class MediaUnits:
    """All spans of one latent modality in a microbatch. Rows N run over the patches of every span once.

    value: the clean patches x, normalised. place: each patch's t, y, x in its span's grid of patches (0 on axes that
    the modality lacks).
    noised_row: row in N of every noised patch; noised_slot: flat position b * S + s of the latent that decodes it;
    noise: its epsilon; time_of: which of the times T is its own (1 is noise). clean_*: row and slot of clean copies.
    noised_level / clean_level: level of the patch's leaf under a budget: 2^(rank * level) patches share a slot; else 0.
    T are the spans J (a span that is only given has t = 0), and a noised patch stands at its slot.
    Under `next_latent` no noised patch stands in the sequence: its slot is the position before its clean one, every
    patch of a generated span is noised several times, and T are the noised patches.
    header_slot, closing_slot: flat positions of each span's header and closing; bucket: its shape bucket.
    weight: of the squared errors at each time in the loss; 1 in held-out batches.
    time_span / time_slot: span and flat position of each position that holds nothing but t (conditioning `token`).
    patches_of_levels: on a device, how many patches of both copies stand in leaves of each level: the host knows.
    What is predicted of a noised row is noise - value under `flow`; `layers/noise_levels.py` has the others.
    """

    value_NF: Float[Tensor, "N F"]
    place_NX: Int[Tensor, "N 3"]
    span_N: Int[Tensor, " N"]
    bucket_J: Int[Tensor, " J"]
    header_slot_J: Int[Tensor, " J"]
    closing_slot_J: Int[Tensor, " J"]
    document_J: Int[Tensor, " J"]
    noised_row_Q: Int[Tensor, " Qn"]
    noised_slot_Q: Int[Tensor, " Qn"]
    noised_level_Q: Int[Tensor, " Qn"]
    noise_QF: Float[Tensor, "Qn F"]
    time_of_Q: Int[Tensor, " Qn"]
    time_T: Float[Tensor, " T"]
    weight_T: Float[Tensor, " T"]
    clean_row_Q: Int[Tensor, " Qc"]
    clean_slot_Q: Int[Tensor, " Qc"]
    clean_level_Q: Int[Tensor, " Qc"]
    time_span_Q: Int[Tensor, " Qt"]
    time_slot_Q: Int[Tensor, " Qt"]
    patches_of_levels: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> MediaUnits:
        """The same units on a device, which need not be asked any more how many patches a level has."""
        return replace(_moved(self, device), patches_of_levels=self.count_levels())

    def count_levels(self) -> tuple[int, ...]:
        """Patches of both copies by the level of their leaf, from 0 to the last that is there."""
        if self.patches_of_levels is not None:
            return self.patches_of_levels
        return tuple(torch.bincount(torch.cat((self.noised_level_Q, self.clean_level_Q))).tolist())


@dataclass(frozen=True, slots=True)
class TreeUnits:
    """The trees that noised copies of one modality stand in, as questions to their headers: is this block split?

    A block is 2^level patches a side; those inside a leaf are not asked. Empty where noised copies have every patch.
    slot: flat position of each tree's header; document: whose it is. tree: which tree a block is of; place: t, y, x of
    its first patch.
    """

    slot_J: Int[Tensor, " J"]
    document_J: Int[Tensor, " J"]
    tree_K: Int[Tensor, " K"]
    level_K: Int[Tensor, " K"]
    place_KX: Int[Tensor, "K 3"]
    split_K: Bool[Tensor, " K"]


@dataclass(frozen=True, slots=True)
class RouterUnits:
    """The questions "what comes next?": at start, text patches and closings, unless the answer lies elsewhere.

    target: 0..M-1 a modality (text 0), M end of document, M + 1 recurrent. legal: what may be answered.
    span_end: the question stands at the end of a span (its last text patch, or closing).
    bucket: shape bucket of the next span where the target is media, else -1.
    """

    slot_R: Int[Tensor, " R"]
    target_R: Int[Tensor, " R"]
    legal_RM: Bool[Tensor, "R M2"]
    span_end_R: Bool[Tensor, " R"]
    bucket_R: Int[Tensor, " R"]
    document_R: Int[Tensor, " R"]


@dataclass(frozen=True, slots=True)
class PositionTimes:
    """The time of each position of the Atto whose layers are told of it.

    time: the different times of the microbatch. index: 1 + the row of `time` that a position has, 0 where it has none.
    """

    time_T: Float[Tensor, " T"]
    index_BS: Int[Tensor, "B S"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """How rows travel in a tensor-parallel group whose ranks encode and decode a share each (`parallel/shares.py`).

    The flat positions are cut into equal chunks, one a rank; own: this rank's. Numbers of rows are by rank, and rows
    are in ascending order of position.
    entering: what Preludi made, to the chunks where it stands; slot: places in the own chunk, as rows arrive.
    leaving: what Code and router read, from there; leaving_slot: places in the own chunk, as rows are sent;
    read_slot: flat positions, as rows arrive.
    """

    own: slice
    entering_sent: tuple[int, ...]
    entering_received: tuple[int, ...]
    entering_slot_R: Int[Tensor, " rows"]
    leaving_sent: tuple[int, ...]
    leaving_received: tuple[int, ...]
    leaving_slot_R: Int[Tensor, " rows"]
    read_slot_R: Int[Tensor, " rows"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch: what a rank's forward reads.

    text: what the Coda decodes. read: what the Preludio reads: the same under `ar`, under a diffusion objective the
    noised copies as they are seen, and after them the clean ones.
    num_bytes: raw bytes that the text symbols stand for (`<end>` is none): the divisor of bits per byte.
    trees: of modalities whose noised copies stand in trees.
    num_documents: E, documents numbered over the microbatch; document_keys names them for reports ("source/key").
    flops: of its forward and backward, estimated; 0 where nobody asked.
    exchange: set where text, read, media and route are one rank's share of the microbatch; then times: those that the
    Atto's layers are told, of all of it.
    """

    grid: Grid
    text: TextUnits
    read: TextUnits
    media: Mapping[str, MediaUnits]
    trees: Mapping[str, TreeUnits]
    route: RouterUnits
    num_bytes: int
    num_documents: int
    document_keys: tuple[str, ...]
    flops: int = 0
    exchange: Exchange | None = None
    times: PositionTimes | None = None

    def to(self, device: torch.device) -> Batch:
        """The same microbatch with every tensor on `device`."""
        if self.grid.kind_BS.device == device:
            return self
        text = _moved(self.text, device)
        return replace(
            self,
            grid=self.grid.to(device),
            text=text,
            read=text if self.read is self.text else _moved(self.read, device),
            media={name: units.to(device) for name, units in self.media.items()},
            trees={name: _moved(units, device) for name, units in self.trees.items()},
            route=_moved(self.route, device),
            exchange=self.exchange and _moved(self.exchange, device),
            times=self.times and _moved(self.times, device),
        )

    def counts(self) -> dict[str, float]:
        """Terms that each loss sums here, known before the forward: symbols, scalars of noised patches, questions.

        The router's nats of trees are divided by its questions too; they are none themselves.
        """
        symbols = self.text.token_P.numel() or int(self.text.scored_U.sum())
        counts = {"text": float(symbols), "router": float(self.route.slot_R.numel())}
        for name, units in self.media.items():
            counts[name] = float(units.noised_row_Q.numel() * units.value_NF.shape[1])
        return counts


def _moved(record: Record, device: torch.device) -> Record:
    values = {field.name: getattr(record, field.name) for field in fields(record)}  # pyright: ignore
    return type(record)(**{key: _sent(x, device) if isinstance(x, Tensor) else x for key, x in values.items()})


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """On a GPU from pinned memory: the host does not wait until the device has done all that it was told before."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
