"""Rotary positions on several axes, and attention under a mask of who sees whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from matformer.layers.modulation import PositionTimes

Rotary = tuple[Float[Tensor, "..."], Float[Tensor, "..."]]


def rotary_tables(axes_X: Int[Tensor, "... X"], *, pairs: Sequence[int], bases: Sequence[float]) -> Rotary:
    """Cosine and sine of each position's angles: `[..., K/2]`, axis by axis, pairs[i] of them for axis i.

    In float64, so that far positions turn by the right angle; `rotate` rounds the tables to its input's dtype.
    Frequencies of an axis fall geometrically from 1 to about 1/base. Source: RoFormer, section 3.2.2; one table an
    axis as in the multimodal rotary positions of Qwen2-VL, section 2.1.
    """
    angles = [
        axes_X[..., i, None].double() * _frequencies(count, base, device=axes_X.device)
        for i, (count, base) in enumerate(zip(pairs, bases, strict=True))
    ]
    angle = torch.cat(angles, dim=-1)
    return angle.cos(), angle.sin()


def _frequencies(count: int, base: float, *, device: torch.device) -> Float[Tensor, " pairs"]:
    return base ** (-torch.arange(count, device=device, dtype=torch.float64) / max(count, 1))


def rotate(x: Float[Tensor, "... A K"], rotary: Rotary) -> Float[Tensor, "... A K"]:
    """Turn pair i = (x[i], x[i + K/2]) by its angle; the tables lack the head dim and are broadcast over it."""
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in rotary)
    return _Rotate.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


class _Rotate(torch.autograd.Function):
    """Written into one tensor, half by half; the way back is the turn by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # noqa: ANN401 - torch's contract
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, sign=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, sign=-1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    lower, upper = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=lower).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=upper).addcmul_(first, sin, value=sign)
    return turned


def masked_attention(
    query_BSAK: Float[Tensor, "B S A K"],
    key_BTGK: Float[Tensor, "B T G K"],
    value_BTGK: Float[Tensor, "B T G K"],
    *,
    visible_BST: Bool[Tensor, "B S T"],
) -> Float[Tensor, "B S A K"]:
    """Softmax attention of A query heads over G key/value heads (A a multiple of G), only where `visible`."""
    groups = query_BSAK.shape[2] // key_BTGK.shape[2]
    if groups > 1:  # the fused CPU kernel wants equal heads; the copy is small beside the projections
        key_BTGK, value_BTGK = (x.repeat_interleave(groups, dim=2) for x in (key_BTGK, value_BTGK))
    query, key, value = (x.transpose(1, 2) for x in (query_BSAK, key_BTGK, value_BTGK))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible_BST[:, None])
    return out.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class AttoView:
    """What all layers of the Atto share in one forward: the mask, the rotary tables, and times if layers ask for them.

    `qkv_format` is what megatron-core reads of the object that carries these through its layers.
    """

    visible_BSS: Bool[Tensor, "B S S"]
    rotary: Rotary
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
    return masked_attention(query, key, value_BSGK, visible_BST=view.visible_BSS)
