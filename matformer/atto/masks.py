"""Who sees whom in the Atto's sequence. Rows are queries, columns keys, x is visible.

A text of two patches (start, a, b) and an image of two patches that is generated and then spoken about
(header, n n noised, c c clean, closing, then text d):

          s a b h n n c c e d
    s     x . . . . . . . . .      start
    a     x x . . . . . . . .      text: causal
    b     x x x . . . . . . .
    h     x x x x . . . . . .      header: causal
    n     x x x x x x . . . .      noised copy: bidirectional inside itself,
    n     x x x x x x . . . .      and nobody after it sees it
    c     x x x x . . x x . .      clean copy: bidirectional inside itself, does not see the noised one
    c     x x x x . . x x . .
    e     x x x x . . x x x .      closing
    d     x x x x . . x x x x      what follows sees the clean copy
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from matformer.parcels import Grid, Kind

TEXT = 0  # index of the modality
# Plain numbers: torch's compiler takes `tensor == Kind.START`, of an enum, for False, and says nothing (torch 2.13).
PAD, START, HEADER, NOISED = (int(kind) for kind in (Kind.PAD, Kind.START, Kind.HEADER, Kind.NOISED))

Rule = Callable[["Positions", "Positions"], Tensor]  # (queries, keys), which broadcast -> who sees whom


@dataclass(frozen=True, slots=True)
class Positions:
    """What the rules read of some positions: fields of the grid, all of one shape, and the place in the sequence."""

    kind: Tensor
    modality: Tensor
    document: Tensor
    span: Tensor
    media: Tensor
    blind: Tensor
    place: Tensor

    @classmethod
    def of(cls, grid: Grid, index: tuple[Tensor | slice | None, ...], *, place: Tensor) -> Positions:
        """Of every row and position of a grid that `index` names, as torch indexes `[B, S]`."""
        return cls(
            kind=grid.kind_BS[index],
            modality=grid.modality_BS[index],
            document=grid.document_BS[index],
            span=grid.span_BS[index],
            media=grid.media_BS[index],
            blind=grid.blind_BS[index],
            place=place,
        )


def sees(query: Positions, key: Positions) -> Bool[Tensor, ...]:
    """Each rule below in turn. Padding sees itself. Source: SEMANTICS, Mask."""
    return _with_private_keys(query, key, noised(key))


def sees_noised_context(query: Positions, key: Positions) -> Bool[Tensor, ...]:
    """The rule under `media_context: noised`: what follows sees a noised medium, which has no clean copy.

    Noised text keeps its clean copies, and stays hidden. Source: Transfusion (Zhou 2024), section 3.
    """
    return _with_private_keys(query, key, noised(key) & (key.modality == TEXT))


def _with_private_keys(query: Positions, key: Positions, private: Tensor) -> Bool[Tensor, ...]:
    together = same_span(query, key)
    allowed = same_document(query, key) & (causal(query, key) | together)
    allowed = allowed & (~private | together)
    allowed = allowed & (~query.blind | own_or_start(query, key))
    return allowed & seen_header(query, key)


def same_document(query: Positions, key: Positions) -> Bool[Tensor, ...]:
    """Nothing crosses documents; padding (document -1) is a document of its own."""
    return query.document == key.document


def causal(query: Positions, key: Positions) -> Bool[Tensor, ...]:
    """k <= q, and for padding k == q only."""
    return ((query.place >= key.place) & (query.kind != PAD)) | (query.place == key.place)


def same_span(query: Positions, key: Positions) -> Bool[Tensor, ...]:
    """Both stand in one bidirectional span: one copy of one media span."""
    return (query.span == key.span) & (query.span >= 0)


def noised(key: Positions) -> Bool[Tensor, ...]:
    """Keys that only their own span may see."""
    return key.kind == NOISED


def own_or_start(query: Positions, key: Positions) -> Bool[Tensor, ...]:
    """What a blind query may see: the start, its own header and its own noised copy (guidance without condition)."""
    return ((query.media == key.media) & key.blind) | (key.kind == START)


def seen_header(query: Positions, key: Positions) -> Bool[Tensor, ...]:
    """A blind header has not read its document: only blind positions (by the rule above, its own) see it."""
    return ~(key.blind & (key.kind == HEADER)) | query.blind


def visible(grid: Grid, rule: Rule = sees) -> Bool[Tensor, "B S S"]:
    """The whole mask of a rule, which is `sees` unless told. For the CPU and for tests: it has S x S entries."""
    return mask_rows(grid, slice(None), rule=rule)


def mask_rows(grid: Grid, queries: slice, *, rule: Rule) -> Bool[Tensor, "B q S"]:
    """The mask's rows of some queries of every sequence."""
    place = torch.arange(grid.kind_BS.shape[1], device=grid.kind_BS.device)
    every = slice(None)
    asking = Positions.of(grid, (every, queries, None), place=place[queries, None])
    return rule(asking, Positions.of(grid, (every, None, every), place=place))


def mask_entry(grid: Grid, rule: Rule) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as FlexAttention asks for it: is this key of this row seen by this query, whatever the head?"""

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        return rule(Positions.of(grid, (row, query), place=query), Positions.of(grid, (row, key), place=key))

    return seen
