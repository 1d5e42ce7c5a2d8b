"""Weights that every tensor-parallel rank holds whole, of which each sees only its share of the units.

Their gradient is summed over the group inside the graph, before any hook or optimizer sees it; nothing reads `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matformer.layers.precision import at_least_float32


class SummedOverGroup(torch.autograd.Function):
    """The weights themselves; their gradients are summed over the group in one call, when the last of them is there."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *weights: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.group = group
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        flat = torch.cat([at_least_float32(gradient).flatten() for gradient in gradients])
        dist.all_reduce(flat, group=ctx.group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        return (None, *(part.view_as(of).to(of.dtype) for part, of in zip(parts, gradients, strict=True)))


class ReplicatedWeights:
    """The weights of these modules, and where they stand."""

    def __init__(self, modules: Sequence[nn.Module], *, group: dist.ProcessGroup) -> None:
        self.group = group
        self.places = [
            (module, name)
            for top in modules
            for module in top.modules()
            for name in module._parameters
            if module._parameters[name] is not None
        ]

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Inside, a forward's gradients of these weights are summed over the group, all in one bucket.

        For weights that are there whole (ZeRO 1 and 2). Every rank must go through the same forwards.
        """
        if not torch.is_grad_enabled() or not self.places:
            yield
            return
        kept = [module._parameters[name] for module, name in self.places]
        try:
            for (module, name), weight in zip(self.places, SummedOverGroup.apply(self.group, *kept), strict=True):
                module._parameters[name] = weight
            yield
        finally:
            for (module, name), weight in zip(self.places, kept, strict=True):
                module._parameters[name] = weight

    def sum_by_hooks(self) -> None:
        """From now on each gradient is summed as it comes, one call a weight: where weights come and go (ZeRO 3).

        Backward must meet the weights in the same order on every rank, which ZeRO 3 asks for by itself.
        """

        def summed(gradient: Tensor) -> Tensor:
            # Convolutions give theirs in one order of memory or another, rank by rank: the sum is over memory.
            total = at_least_float32(gradient).clone(memory_format=torch.contiguous_format)
            dist.all_reduce(total, group=self.group)
            return total.to(gradient.dtype)

        for module, name in self.places:
            weight = module._parameters[name]
            assert weight is not None
            weight.register_hook(summed)
