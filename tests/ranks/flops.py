"""FLOPs that a rank's step multiplies, by torch's own counter, and what it sends over its tensor-parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from matformer.config.schema import RunConfig
from matformer.engine.step import optimizer_step
from matformer.parcels import Batch
from tests.ranks.cases import hosted, share

CALLS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}  # a sum is a scatter and a gather


class Sent(TorchDispatchMode):
    """Inside, `bytes` is what collectives on tensors of `size` numbers send, as rings of two ranks do."""

    def __init__(self, *, size: int) -> None:
        super().__init__()
        self.bytes, self.size = 0, size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func.namespace == "c10d":
            whole = max((leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), key=torch.numel)
            if whole.numel() == self.size:
                self.bytes += CALLS.get(func.overloadpacket.__name__, 0) * whole.nbytes // 2
        return func(*args, **(kwargs or {}))


def step_of(config: RunConfig, batches: Sequence[Batch]) -> tuple[int, int]:
    """(FLOPs, bytes sent in tensors as large as the stream of a microbatch) of a step."""
    torch.set_num_threads(1)
    size = batches[0].grid.kind_BS.numel() * config.model.atto.width
    with hosted(config) as host, FlopCounterMode(display=False) as flops, Sent(size=size) as sent:
        optimizer_step(host, share(batches, host.groups), config=config, step=0)
    return flops.get_total_flops(), sent.bytes
