"""Attention of the Atto, under a mask of who sees whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from matformer.layers.rotary import Rotary, rotate
from matformer.layers.tiles import Tile, tile_attention
from matformer.parcels import PositionTimes


def masked_attention(
    query_BSAK: Float[Tensor, "B S A K"],
    key_BTGK: Float[Tensor, "B T G K"],
    value_BTGK: Float[Tensor, "B T G K"],
    *,
    visible_BST: Bool[Tensor, "B S T"],
    tiles: Sequence[Tile] | None = None,
) -> Float[Tensor, "B S A K"]:
    """Softmax attention of A query heads over G key/value heads (A a multiple of G), only where `visible`.

    With `tiles`, which must say the same as `visible`, tile by tile.
    """
    groups = query_BSAK.shape[2] // key_BTGK.shape[2]
    if groups > 1:  # the fused CPU kernel wants equal heads; the copy is small beside the projections
        key_BTGK, value_BTGK = (x.repeat_interleave(groups, dim=2) for x in (key_BTGK, value_BTGK))
    if tiles is not None:
        rows = (x.flatten(0, 1) for x in (query_BSAK, key_BTGK, value_BTGK))
        return tile_attention(*rows, tiles=tiles).view_as(query_BSAK)
    query, key, value = (x.transpose(1, 2) for x in (query_BSAK, key_BTGK, value_BTGK))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible_BST[:, None])
    return out.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class AttoView:
    """What all layers of the Atto share in one forward: the mask, on CPU also as tiles, rotary tables, and times of
    positions if the layers ask for them.

    `qkv_format` is what megatron-core reads of the object that carries these through its layers.
    """

    visible_BSS: Bool[Tensor, "B S S"]
    rotary: Rotary
    tiles: Sequence[Tile] | None = None
    times: PositionTimes | None = None
    qkv_format: str = "bshd"


def atto_attention(
    query_BSAK: Float[Tensor, "B S A K"],
    key_BSGK: Float[Tensor, "B S G K"],
    value_BSGK: Float[Tensor, "B S G K"],
    *,
    view: AttoView,
) -> Float[Tensor, "B S A K"]:
    """The Atto's attention core, the same under every host: rotary positions, then the mask."""
    query, key = rotate(query_BSAK, view.rotary), rotate(key_BSGK, view.rotary)
    return masked_attention(query, key, value_BSGK, visible_BST=view.visible_BSS, tiles=view.tiles)
