"""Rotary positions on several axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    turn(x, cos, sin, sign=sign, out=turned)
    return turned


def turn(x: Tensor, cos: Tensor, sin: Tensor, *, sign: int, out: Tensor) -> None:
    """Writes `x` turned by sign times the angles into `out`, of the same shape; no part of the graph."""
    first, second = x.chunk(2, dim=-1)
    lower, upper = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=lower).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=upper).addcmul_(first, sin, value=sign)
