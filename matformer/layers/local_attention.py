"""Attention inside a window over one long row of symbols: memory linear in their number.

The row holds many pieces, one after the other. It is folded into chunks; a query sees its own chunk and as many before
it as a window reaches back, so that no window is ever missed and no matrix over all symbols exists. A window of up to
LONGEST_CHUNK symbols is a chunk, and one chunk before it is enough:

    chunk c      keys of chunk c-1   keys of chunk c
    query 0      . x x x             x . . .
    query 1      . . x x             x x . .
    query 2      . . . x             x x x .
    query 3      . . . .             x x x x          (W = 4, one piece)

Where symbols look both ways (text diffusion), as many chunks after it are seen as before it. On CPU there are tiles
instead of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from matformer.layers.feed_forward import SwiGLU
from matformer.layers.norm import RMSNorm
from matformer.layers.rotary import Rotary, rotary_tables, rotate
from matformer.layers.tiles import Tile, run_tiles, self_attention

LONGEST_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Folded:
    """Who sees whom once the row is folded into chunks, each with its neighbours as keys."""

    visible_CWT: Bool[Tensor, "C W T"]
    back: int
    ahead: int


@dataclass(frozen=True, slots=True)
class LocalView:
    """What all local layers of one forward share: who sees whom, and the rotary tables of the symbols."""

    seen: Folded | Sequence[Tile]
    rotary: Rotary


def local_view(
    piece_U: Int[Tensor, " U"],
    place_U: Int[Tensor, " U"],
    *,
    window: int,
    head_size: int,
    rotary_base: float = 10_000.0,
    both_ways: bool = False,
    tiled: bool | None = None,
) -> LocalView:
    """A symbol sees itself and the window - 1 symbols before it, and those after it if `both_ways`, in its own piece.

    Pieces are runs of the row. `tiled`: by tiles (see layers/tiles.py) and not folded; by default where the CPU is.
    """
    rotary = rotary_tables(place_U[:, None], pairs=(head_size // 2,), bases=(rotary_base,))
    return LocalView(window_of(piece_U, window=window, both_ways=both_ways, tiled=tiled), rotary)


def window_of(
    piece_U: Int[Tensor, " U"], *, window: int, both_ways: bool, tiled: bool | None = None
) -> Folded | Sequence[Tile]:
    """Who sees whom, as `local_view` says it."""
    if tiled or (tiled is None and piece_U.device.type == "cpu"):
        return _tiles(piece_U, window=window, both_ways=both_ways)
    return _folded(piece_U, window=window, both_ways=both_ways)


def _tiles(piece_U: Int[Tensor, " U"], *, window: int, both_ways: bool) -> Sequence[Tile]:
    """Of the run of symbols that each symbol sees."""
    size = torch.unique_consecutive(piece_U, return_counts=True)[1]
    end = size.cumsum(0)
    first_U, end_U = (x.repeat_interleave(size) for x in (end - size, end))
    place = torch.arange(piece_U.numel(), device=piece_U.device)
    newest = torch.minimum(end_U, place + window) if both_ways else place + 1
    return run_tiles(torch.maximum(first_U, place - window + 1), newest)


def _folded(piece_U: Int[Tensor, " U"], *, window: int, both_ways: bool) -> Folded:
    """An empty row gives one chunk of padding, so that every layer runs and every weight has a gradient."""
    chunk = min(window, LONGEST_CHUNK)
    num_chunks = max(1, -(-piece_U.numel() // chunk))
    back = min(-(-(window - 1) // chunk), num_chunks - 1) if window > chunk else 1
    ahead = back if both_ways else 0
    missing = num_chunks * chunk - piece_U.numel()
    piece = F.pad(piece_U, (0, missing), value=-1).view(num_chunks, chunk)
    place = torch.arange(num_chunks * chunk, device=piece_U.device).view(num_chunks, chunk)
    keys_piece, keys_place = (_with_neighbours(x, back=back, ahead=ahead, fill=-2) for x in (piece, place))
    distance = place[:, :, None] - keys_place[:, None, :]
    near = distance.abs() < window if both_ways else (distance >= 0) & (distance < window)
    return Folded((piece[:, :, None] == keys_piece[:, None, :]) & near, back, ahead)


def _with_neighbours(x_CW: Tensor, *, back: int, ahead: int, fill: int) -> Tensor:
    """Each chunk between the chunks before and after it: `[C, W, ...] -> [C, (back + 1 + ahead) W, ...]`."""
    before, after = (x_CW.new_full((count, *x_CW.shape[1:]), fill) for count in (back, ahead))
    row = torch.cat((before, x_CW, after))
    return torch.cat([row[first : first + len(x_CW)] for first in range(back + 1 + ahead)], dim=1)


class LocalAttention(nn.Module):
    """Multi-head attention of symbols over the window that their view shows."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_UD: Float[Tensor, "U D"], view: LocalView) -> Float[Tensor, "U D"]:
        rows_UE = self.query_key_value(x_UD)
        if isinstance(view.seen, Folded):
            return self.output(_folded_attention(rows_UE, view.seen, view.rotary, heads=self.heads))
        return self.output(self_attention(rows_UE, view.rotary, heads=self.heads, tiles=view.seen))


def _folded_attention(
    rows_UE: Float[Tensor, "U E"], seen: Folded, rotary: Rotary, *, heads: int
) -> Float[Tensor, "U D"]:
    """Over rows of queries, keys and values side by side."""
    num_units, width = len(rows_UE), rows_UE.shape[1] // 3
    num_chunks, chunk, _ = seen.visible_CWT.shape
    query, key, value = rows_UE.view(num_units, 3, heads, width // heads).unbind(1)
    missing = num_chunks * chunk - num_units
    query, key, value = (
        F.pad(x, (0, 0, 0, 0, 0, missing)).view(num_chunks, chunk, heads, -1)
        for x in (rotate(query, rotary), rotate(key, rotary), value)
    )
    key, value = (_with_neighbours(x, back=seen.back, ahead=seen.ahead, fill=0) for x in (key, value))
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=seen.visible_CWT[:, None]
    )
    return out.transpose(1, 2).reshape(num_chunks * chunk, width)[:num_units]


class LocalBlock(nn.Module):
    """Pre-norm local attention and feed-forward."""

    def __init__(self, width: int, heads: int, *, inner: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = LocalAttention(width, heads)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = SwiGLU(width, inner)

    def forward(self, x_UD: Float[Tensor, "U D"], view: LocalView) -> Float[Tensor, "U D"]:
        x_UD = x_UD + self.attention(self.attention_norm(x_UD), view)
        return x_UD + self.feed_forward(self.feed_forward_norm(x_UD))
