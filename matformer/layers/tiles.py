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
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from matformer.layers.precision import at_least_float32
from matformer.layers.rotary import Rotary, turn

ROWS = 64  # of a tile; at 128 a short window computes half in vain, at 32 the products are small


@dataclass(frozen=True, slots=True)
class Tile:
    """These queries see those keys where the bias is 0, and not where it is -inf."""

    queries: slice
    keys: slice
    bias_QT: Float[Tensor, "Q T"]


def run_tiles(first_Q: Int[Tensor, " Q"], end_Q: Int[Tensor, " Q"]) -> list[Tile]:
    """Query q sees keys first[q], ..., end[q] - 1, at least one; both ascend (not strictly)."""
    count = first_Q.numel()
    if not count:
        return []
    rows = even_rows(count)
    starts = range(0, count, rows)
    first, end = (F.pad(x.int(), (0, len(starts) * rows - count)).view(-1, rows, 1) for x in (first_Q, end_Q))
    lows = first_Q[::rows]
    highs = end_Q[[min(start + rows, count) - 1 for start in starts]]
    width = int((highs - lows).max())
    key = lows.int()[:, None, None] + torch.arange(width, dtype=torch.int32)  # all tiles at once: few operations
    bias = _bias((key < first) | (key >= end))
    return [
        Tile(slice(start, min(start + rows, count)), slice(low, high), one[: count - start, : high - low])
        for start, low, high, one in zip(starts, lows.tolist(), highs.tolist(), bias, strict=True)
    ]


def even_rows(count: int) -> int:
    """How many of these queries a tile holds: about ROWS, and no last tile of one or two."""
    return -(-count // max(1, round(count / ROWS)))


def _bias(hidden: Bool[Tensor, "... Q T"]) -> Float[Tensor, "... Q T"]:
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def mask_tiles(visible_BST: Bool[Tensor, "B S T"]) -> list[Tile]:
    """Of a mask of any pattern, of the rows of all B one after the other: keys from first to last."""
    tiles = []
    _, num_queries, num_keys = visible_BST.shape
    rows = even_rows(num_queries)
    for row, visible_ST in enumerate(visible_BST):
        for number, visible_QT in enumerate(visible_ST.split(rows)):
            seen = visible_QT.any(0).nonzero()
            low, high = int(seen[0]), int(seen[-1]) + 1
            first, hidden = row * num_queries + number * rows, ~visible_QT[:, low:high]
            keys = slice(row * num_keys + low, row * num_keys + high)
            tiles.append(Tile(slice(first, first + len(hidden)), keys, _bias(hidden)))
    return tiles


def tile_attention(
    query_QAK: Float[Tensor, "Q A K"],
    key_TAK: Float[Tensor, "T A K"],
    value_TAK: Float[Tensor, "T A K"],
    *,
    tiles: Sequence[Tile],
) -> Float[Tensor, "Q A K"]:
    """Softmax attention of A heads, by tiles that hold each query once, in their order."""
    keep = torch.is_grad_enabled()
    return _Attention.apply(query_QAK, key_TAK, value_TAK, tiles, keep)  # pyright: ignore[reportReturnType]


def self_attention(
    rows_UE: Float[Tensor, "U E"], rotary: Rotary, *, heads: int, tiles: Sequence[Tile]
) -> Float[Tensor, "U D"]:
    """The same over rows of queries, keys and values side by side (E = 3 D), queries and keys turned first."""
    cos, sin = (table.unsqueeze(-2).to(at_least_float32(rows_UE.detach()).dtype) for table in rotary)
    keep = torch.is_grad_enabled()
    return _Self.apply(rows_UE, cos, sin, heads, tiles, keep)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    """The weights are kept for the way back: as many numbers as the tiles have entries."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's contract
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tiles: Sequence[Tile],
        keep: bool,
    ) -> Tensor:
        ctx.tiles, ctx.dtype = tiles, query.dtype
        read = tuple(at_least_float32(x) for x in (query, key, value))
        out = torch.empty_like(read[0], memory_format=torch.contiguous_format)
        weights = _attend(_by_head(*read), tiles, out=out.transpose(0, 1), keep=keep)
        ctx.save_for_backward(*read, *weights)
        return out.to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - by the decorator
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        query, key, value, *weights = ctx.saved_tensors
        into = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        (grad,) = _by_head(at_least_float32(grads[0]))
        _attend_back(grad, _by_head(query, key, value), weights, ctx.tiles, into=_by_head(*into))
        return *(x.to(ctx.dtype) for x in into), None, None


class _Self(torch.autograd.Function):
    """Queries and keys are turned into a tensor of their own, and their gradients back into the one of all three."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        tiles: Sequence[Tile],
        keep: bool,
    ) -> Tensor:
        ctx.tiles, ctx.dtype = tiles, rows.dtype
        pair, value = _pair_and_value(at_least_float32(rows), heads)
        turned, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (pair, value))
        turn(pair, cos, sin, sign=1, out=turned)
        weights = _attend(_by_head(*turned.chunk(2, dim=1), value), tiles, out=out.transpose(0, 1), keep=keep)
        ctx.save_for_backward(turned, value, cos, sin, *weights)
        return out.flatten(1).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - by the decorator
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        turned, value, cos, sin, *weights = ctx.saved_tensors
        of_rows = value.new_zeros(len(value), 3 * value.shape[1] * value.shape[2])
        of_pair, of_value = _pair_and_value(of_rows, value.shape[1])
        of_turned = torch.zeros_like(turned)
        (grad,) = _by_head(at_least_float32(grads[0]).unflatten(1, value.shape[1:]))
        _attend_back(
            grad,
            _by_head(*turned.chunk(2, dim=1), value),
            weights,
            ctx.tiles,
            into=_by_head(*of_turned.chunk(2, dim=1), of_value),
        )
        turn(of_turned, cos, sin, sign=-1, out=of_pair)
        return of_rows.to(ctx.dtype), None, None, None, None, None


def _pair_and_value(rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Views `[U, 2 A, K]` of queries and keys, and `[U, A, K]` of values."""
    pair, value = rows.unflatten(1, (3 * heads, rows.shape[1] // (3 * heads))).split((2 * heads, heads), dim=1)
    return pair, value


def _by_head(*rows: Tensor) -> tuple[Tensor, ...]:
    """`[U, A, K] -> [A, U, K]`, views."""
    return tuple(x.transpose(0, 1) for x in rows)


def _attend(read: tuple[Tensor, ...], tiles: Sequence[Tile], *, out: Tensor, keep: bool) -> list[Tensor]:
    """Writes `[A, Q, K]` into `out`; the weights `[A, q, t]` of each tile, if they are to be kept."""
    query, key, value = read
    kept, scale = [], query.shape[2] ** -0.5
    with torch.autocast("cpu", enabled=False):
        for tile, asked, answer in zip(tiles, _by_tile(query, tiles), _by_tile(out, tiles), strict=True):
            bias, seen = tile.bias_QT.to(query.dtype), tile.keys
            weight = torch.baddbmm(bias, asked, key[:, seen].transpose(1, 2), alpha=scale).softmax(-1)
            torch.bmm(weight, value[:, seen], out=answer)
            if keep:
                kept.append(weight)
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
    by_tile = (_by_tile(x, tiles) for x in (query, grad, of_query))
    with torch.autocast("cpu", enabled=False):
        for tile, weight, asked, answer, of_asked in zip(tiles, weights, *by_tile, strict=True):
            seen = tile.keys
            of_weight = torch.bmm(answer, value[:, seen].transpose(1, 2))
            # out= and not in place: torch's counter of FLOPs does not know baddbmm_
            torch.baddbmm(of_value[:, seen], weight.transpose(1, 2), answer, out=of_value[:, seen])
            of_score = torch.ops.aten._softmax_backward_data(of_weight, weight, -1, weight.dtype)
            torch.baddbmm(of_asked, of_score, key[:, seen], beta=0, alpha=scale, out=of_asked)
            torch.baddbmm(of_key[:, seen], of_score.transpose(1, 2), asked, alpha=scale, out=of_key[:, seen])


def _by_tile(rows: Tensor, tiles: Sequence[Tile]) -> tuple[Tensor, ...]:
    """Views `[A, q, K]` of the queries of each tile: all of them, in their order."""
    return rows.split([tile.queries.stop - tile.queries.start for tile in tiles], dim=1)
