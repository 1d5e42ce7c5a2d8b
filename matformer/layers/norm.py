"""Root-mean-square norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim. Source: Zhang and Sennrich 2019, section 4."""

    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.weight, epsilon=self.epsilon)


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], *, epsilon: float) -> Float[Tensor, "... D"]:
    """torch's own norm; on CPU, where that is a chain of small operations, the same in fewer passes over memory."""
    if x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        return _OnCpu.apply(x, weight, epsilon)  # pyright: ignore[reportReturnType]
    return F.rms_norm(x, (x.shape[-1],), weight, epsilon)


class _OnCpu(torch.autograd.Function):
    """y = x r w with r = 1 / rms; back: dx = g w r - x r^3 mean(g x w), dw = sum(g x r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # noqa: ANN401 - torch's contract
        rows = x.reshape(-1, x.shape[-1])
        inverse = (
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(rows.shape[1]).add_(epsilon).rsqrt_()
        )
        ctx.save_for_backward(rows, inverse, weight)
        return (rows * inverse).mul_(weight).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        rows, inverse, weight = ctx.saved_tensors
        grad = grads[0].reshape(rows.shape)
        product = grad * rows  # both sums over it are products with a vector
        of_weight = product.t().mv(inverse[:, 0])
        share = product.mv(weight)[:, None].mul_(inverse.pow(3)).div_(-rows.shape[1])
        of_rows = (grad * weight).mul_(inverse).addcmul_(rows, share)
        return of_rows.view(grads[0].shape), of_weight, None
