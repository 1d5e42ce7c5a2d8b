"""Attention of the Atto, under a mask of who sees whom: one interface, and a core for each kind of mask and device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from matformer.layers.rotary import Rotary, rotate
from matformer.layers.tiles import Tile, tile_attention
from matformer.parcels import PositionTimes


class AttentionCore(ABC):
    """Softmax attention of A query heads over G key/value heads (A a multiple of G), where a mask allows it.

    One core serves all layers of a forward. Hosts hand it all positions of the microbatch and some of the heads.
    """

    @abstractmethod
    def attend(
        self,
        query_BSAK: Float[Tensor, "B S A K"],
        key_BSGK: Float[Tensor, "B S G K"],
        value_BSGK: Float[Tensor, "B S G K"],
    ) -> Float[Tensor, "B S A K"]:
        """What each position takes from those it sees."""


@dataclass(frozen=True, slots=True)
class DenseCore(AttentionCore):
    """By torch's kernel under the whole mask: short sequences on a CPU."""

    visible_BSS: Bool[Tensor, "B S S"]

    def attend(
        self,
        query_BSAK: Float[Tensor, "B S A K"],
        key_BSGK: Float[Tensor, "B S G K"],
        value_BSGK: Float[Tensor, "B S G K"],
    ) -> Float[Tensor, "B S A K"]:
        key, value = with_equal_heads(query_BSAK, key_BSGK, value_BSGK)
        query, key, value = (x.transpose(1, 2) for x in (query_BSAK, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.visible_BSS[:, None])
        return out.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class TiledCore(AttentionCore):
    """Tile by tile, and only where a tile holds something that is seen: long sequences on a CPU."""

    tiles: Sequence[Tile]

    def attend(
        self,
        query_BSAK: Float[Tensor, "B S A K"],
        key_BSGK: Float[Tensor, "B S G K"],
        value_BSGK: Float[Tensor, "B S G K"],
    ) -> Float[Tensor, "B S A K"]:
        key, value = with_equal_heads(query_BSAK, key_BSGK, value_BSGK)
        rows = (x.flatten(0, 1) for x in (query_BSAK, key, value))
        return tile_attention(*rows, tiles=self.tiles).view_as(query_BSAK)


def with_equal_heads(
    query_BSAK: Float[Tensor, "B S A K"], key_BSGK: Float[Tensor, "B S G K"], value_BSGK: Float[Tensor, "B S G K"]
) -> tuple[Float[Tensor, "B S A K"], Float[Tensor, "B S A K"]]:
    """Keys and values once a query head, as CPU kernels want them; the copy is small beside the projections."""
    groups = query_BSAK.shape[2] // key_BSGK.shape[2]
    if groups == 1:
        return key_BSGK, value_BSGK
    return key_BSGK.repeat_interleave(groups, dim=2), value_BSGK.repeat_interleave(groups, dim=2)


@dataclass(frozen=True, slots=True)
class AttoView:
    """What all layers of the Atto share in one forward: the attention core that knows the mask, rotary tables
    `[B, S, K/2]`, and times of positions if the layers ask for them.

    `qkv_format` is what megatron-core reads of the object that carries these through its layers.
    """

    core: AttentionCore
    rotary: Rotary
    times: PositionTimes | None = None
    qkv_format: str = "bshd"

    @property
    def rows(self) -> tuple[int, int]:
        """B and S."""
        return self.rotary[0].shape[0], self.rotary[0].shape[1]


def atto_attention(
    query_BSAK: Float[Tensor, "B S A K"],
    key_BSGK: Float[Tensor, "B S G K"],
    value_BSGK: Float[Tensor, "B S G K"],
    *,
    view: AttoView,
) -> Float[Tensor, "B S A K"]:
    """The Atto's attention, the same under every host: rotary positions, then the core."""
    query, key = rotate(query_BSAK, view.rotary), rotate(key_BSGK, view.rotary)
    return view.core.attend(query, key, value_BSGK)
