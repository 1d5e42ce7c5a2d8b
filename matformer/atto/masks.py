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

import torch
from jaxtyping import Bool
from torch import Tensor

from matformer.parcels import Grid, Kind

TEXT = 0  # index of the modality


def visible(grid: Grid) -> Bool[Tensor, "B S S"]:
    """The whole mask: each rule below in turn. Padding sees itself. Source: SEMANTICS, Mask."""
    return _with_private_keys(grid, noised_key(grid))


def visible_with_noised_context(grid: Grid) -> Bool[Tensor, "B S S"]:
    """The mask under `media_context: noised`: what follows sees a noised medium, which has no clean copy.

    Noised text keeps its clean copies, and stays hidden. Source: Transfusion (Zhou 2024), section 3.
    """
    return _with_private_keys(grid, noised_key(grid) & (grid.modality_BS == TEXT)[:, None, :])


def _with_private_keys(grid: Grid, private: Bool[Tensor, "B 1 S"]) -> Bool[Tensor, "B S S"]:
    mask = same_document(grid) & (causal(grid) | same_span(grid))
    mask &= ~private | same_span(grid)
    mask &= ~grid.blind_BS[:, :, None] | own_or_start(grid)
    return mask & seen_header(grid)


def same_document(grid: Grid) -> Bool[Tensor, "B S S"]:
    """Nothing crosses documents; padding (document -1) is a document of its own, of which each sees the earlier."""
    return grid.document_BS[:, :, None] == grid.document_BS[:, None, :]


def causal(grid: Grid) -> Bool[Tensor, "B S S"]:
    """k <= q, and for padding k == q only."""
    size = grid.kind_BS.shape[1]
    place = torch.arange(size, device=grid.kind_BS.device)
    below = place[None, :, None] >= place[None, None, :]
    same = place[None, :, None] == place[None, None, :]
    padding = (grid.kind_BS == Kind.PAD)[:, :, None]
    return (below & ~padding) | same


def same_span(grid: Grid) -> Bool[Tensor, "B S S"]:
    """Both stand in one bidirectional span: one copy of one media span."""
    span = grid.span_BS
    return (span[:, :, None] == span[:, None, :]) & (span >= 0)[:, :, None]


def noised_key(grid: Grid) -> Bool[Tensor, "B 1 S"]:
    """Keys that only their own span may see."""
    return (grid.kind_BS == Kind.NOISED)[:, None, :]


def own_or_start(grid: Grid) -> Bool[Tensor, "B S S"]:
    """What a blind query may see: the start, its own header and its own noised copy (guidance without condition)."""
    own_media = grid.media_BS[:, :, None] == grid.media_BS[:, None, :]
    own = own_media & grid.blind_BS[:, None, :]
    return own | (grid.kind_BS == Kind.START)[:, None, :]


def seen_header(grid: Grid) -> Bool[Tensor, "B S S"]:
    """A blind header has not read its document: only blind positions (by the rule above, its own) see it."""
    blind_header = (grid.blind_BS & (grid.kind_BS == Kind.HEADER))[:, None, :]
    return ~blind_header | grid.blind_BS[:, :, None]
