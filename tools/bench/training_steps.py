"""Training steps of models held against each other: forward, loss and backward, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import cpu_seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], object]


def training_step(model: nn.Module, loss: Callable[[], Tensor], *, dtype: str) -> Step:
    """One step without an optimizer; `loss` runs the forward. bfloat16 is autocast over float32 weights."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss()
        value.backward()

    return step


def flops_of(step: Step) -> int:
    """Of one step, as torch counts them: products and attention."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def matmul_gflops(model: nn.Module, step: Step, dtype: str) -> float:
    """Of plain products of the sizes of the model's matrices: what one core gives at best."""
    sizes: list[tuple[int, int, int]] = []

    def note(module: Any, inputs: tuple[torch.Tensor], _: object) -> None:  # noqa: ANN401 - torch's contract
        out, width = module.weight.shape
        sizes.append((inputs[0].numel() // width, out, width))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    step()
    for hook in hooks:
        hook.remove()
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    pairs = [
        (torch.randn(rows, width).to(kind), torch.randn(width, out).to(kind)) for rows, out, width in sizes if rows
    ]
    seconds = min(cpu_seconds(lambda: [a @ b for a, b in pairs]) for _ in range(7))
    return sum(2 * a.shape[0] * b.numel() for a, b in pairs) / seconds / 1e9
