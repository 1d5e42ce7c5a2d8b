"""Attention on CPU tile by tile: some queries, the keys that any of them sees, and nothing else.

For masks that leave most of the matrix empty: windows over a row of symbols, patches over their own symbols. Rows of
queries and keys lie one after the other, and what a query sees is one run of keys, later queries seeing later runs. A
tile is then some products of matrices that are views of the whole: nothing is padded, folded, repeated or gathered, and
no tile is larger than its mask makes it. On a GPU one kernel a tile would be slow: other roads lead there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from matformer.layers.attention import Rotary, turn
from matformer.layers.precision import at_least_float32

ROWS = 64  # of a tile; at 128 a short window computes half in vain, at 32 the products are small


@dataclass(frozen=True, slots=True)
class Tile:
    """These queries see those keys where the bias is 0, and not where it is -inf."""

    queries: slice
    keys: slice
    bias_QT: Float[Tensor, "Q T"]


def run_tiles(first_Q: Int[Tensor, " Q"], end_Q: Int[Tensor, " Q"]) -> list[Tile]:
    """Query q sees keys first[q], ..., end[q] - 1, at least one; both ascend (not strictly)."""
    starts = range(0, first_Q.numel(), ROWS)
    if not starts:
        return []
    last = torch.tensor([min(start + ROWS, first_Q.numel()) - 1 for start in starts])
    ends = end_Q[last].tolist()
    key = torch.arange(ends[-1])
    tiles = []
    for start, low, high in zip(starts, first_Q[::ROWS].tolist(), ends, strict=True):
        queries, keys = slice(start, min(start + ROWS, first_Q.numel())), slice(low, high)
        hidden = (key[keys] < first_Q[queries, None]) | (key[keys] >= end_Q[queries, None])
        tiles.append(Tile(queries, keys, torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)))
    return tiles


def cross_attention(
    query_QD: Float[Tensor, "Q D"], key_value_TE: Float[Tensor, "T E"], *, heads: int, tiles: Sequence[Tile]
) -> Float[Tensor, "Q D"]:
    """Multi-head attention of queries over rows of keys and values side by side (E = 2 D)."""
    keep = torch.is_grad_enabled()
    return _Cross.apply(query_QD, key_value_TE, heads, tiles, keep)  # pyright: ignore[reportReturnType]


def self_attention(
    rows_UE: Float[Tensor, "U E"], rotary: Rotary, *, heads: int, tiles: Sequence[Tile]
) -> Float[Tensor, "U D"]:
    """The same over rows of queries, keys and values side by side (E = 3 D), queries and keys turned first."""
    cos, sin = (table.unsqueeze(-2).to(at_least_float32(rows_UE.detach()).dtype) for table in rotary)
    keep = torch.is_grad_enabled()
    return _Self.apply(rows_UE, cos, sin, heads, tiles, keep)  # pyright: ignore[reportReturnType]


class _Cross(torch.autograd.Function):
    """The weights are kept for the way back: as many numbers as the tiles have entries."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, pair: Tensor, heads: int, tiles: Sequence[Tile], keep: bool) -> Tensor:  # noqa: ANN401 - torch's contract
        ctx.heads, ctx.tiles, ctx.dtypes = heads, tiles, (query.dtype, pair.dtype)
        query, pair = at_least_float32(query), at_least_float32(pair)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        read = (*_heads(query, 1, heads), *_heads(pair, 2, heads))
        weights = _attend(*read, tiles, out=_heads(out, 1, heads)[0], keep=keep)
        ctx.save_for_backward(query, pair, *weights)
        return out.to(ctx.dtypes[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        query, pair, *weights = ctx.saved_tensors
        of_query, of_pair = torch.empty_like(query, memory_format=torch.contiguous_format), torch.zeros_like(pair)
        read, written = (
            (*_heads(one, 1, ctx.heads), *_heads(two, 2, ctx.heads))
            for one, two in ((query, pair), (of_query, of_pair))
        )
        _attend_back(_heads(at_least_float32(grads[0]), 1, ctx.heads)[0], read, weights, ctx.tiles, into=written)
        return of_query.to(ctx.dtypes[0]), of_pair.to(ctx.dtypes[1]), None, None, None


class _Self(torch.autograd.Function):
    """Queries and keys are turned into a tensor of their own, and their gradients back into the one of all three."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        tiles: Sequence[Tile],
        keep: bool,  # noqa: ANN401
    ) -> Tensor:
        ctx.heads, ctx.tiles, ctx.dtype = heads, tiles, rows.dtype
        rows = at_least_float32(rows)
        width = rows.shape[1] // 3
        turned, out = rows.new_empty(len(rows), 2 * width), rows.new_empty(len(rows), width)
        pair, value = rows.split((2 * width, width), dim=1)
        turn(_by_head(pair, 2 * heads), cos, sin, sign=1, out=_by_head(turned, 2 * heads))
        read = (*_heads(turned, 2, heads), *_heads(value, 1, heads))
        weights = _attend(*read, tiles, out=_heads(out, 1, heads)[0], keep=keep)
        ctx.save_for_backward(turned, value, cos, sin, *weights)
        return out.to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        turned, value, cos, sin, *weights = ctx.saved_tensors
        heads, width = ctx.heads, value.shape[1]
        of_turned, of_rows = torch.zeros_like(turned), value.new_zeros(len(value), 3 * width)
        of_pair, of_value = of_rows.split((2 * width, width), dim=1)
        read, written = (
            (*_heads(two, 2, heads), *_heads(one, 1, heads)) for two, one in ((turned, value), (of_turned, of_value))
        )
        _attend_back(_heads(at_least_float32(grads[0]), 1, heads)[0], read, weights, ctx.tiles, into=written)
        turn(_by_head(of_turned, 2 * heads), cos, sin, sign=-1, out=_by_head(of_pair, 2 * heads))
        return of_rows.to(ctx.dtype), None, None, None, None, None


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """A view `[U, A, K]` of rows of A heads."""
    return rows.unflatten(1, (heads, rows.shape[1] // heads))


def _heads(rows: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """A view `[A, U, K]` of each of the parts that lie side by side."""
    return _by_head(rows, parts * heads).transpose(0, 1).chunk(parts)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, tiles: Sequence[Tile], *, out: Tensor, keep: bool
) -> list[Tensor]:
    """Writes `[A, Q, K]` into `out`; the weights `[A, q, t]` of each tile, if they are to be kept."""
    kept, scale = [], query.shape[2] ** -0.5
    with torch.autocast("cpu", enabled=False):
        for tile in tiles:
            score = torch.baddbmm(
                tile.bias_QT.to(query.dtype),
                query[:, tile.queries],
                key[:, tile.keys].transpose(1, 2),
                alpha=scale,
            )
            weight = score.softmax(-1)
            torch.bmm(weight, value[:, tile.keys], out=out[:, tile.queries])
            kept += [weight] * keep
    return kept


def _attend_back(
    grad: Tensor,
    read: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    tiles: Sequence[Tile],
    *,
    into: tuple[Tensor, ...],
) -> None:
    """Writes the gradient of the queries, and adds those of keys and values, `[A, ..., K]` each."""
    (query, key, value), (of_query, of_key, of_value) = read, into
    scale = query.shape[2] ** -0.5
    with torch.autocast("cpu", enabled=False):
        for tile, weight in zip(tiles, weights, strict=True):
            asked, answer, seen = query[:, tile.queries], grad[:, tile.queries], tile.keys
            of_weight = torch.bmm(answer, value[:, seen].transpose(1, 2))
            of_value[:, seen].baddbmm_(weight.transpose(1, 2), answer)
            of_score = torch._softmax_backward_data(of_weight, weight, -1, weight.dtype)
            written = of_query[:, tile.queries]
            torch.baddbmm(written, of_score, key[:, seen], beta=0, alpha=scale, out=written)
            of_key[:, seen].baddbmm_(of_score.transpose(1, 2), asked, alpha=scale)
