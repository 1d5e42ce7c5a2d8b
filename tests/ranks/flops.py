"""FLOPs that a rank's step multiplies, by torch's own counter, and what it sends to those that hold its microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from matformer.config.schema import RunConfig
from matformer.engine.step import optimizer_step
from matformer.parcels import Batch
from tests.ranks.cases import hosted, share

CALLS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}  # a sum is a scatter and a gather


class Done(NamedTuple):
    """Of a step: FLOPs, bytes sent in tensors as large as a microbatch's stream, bytes sent in equal all-to-alls."""

    flops: int
    summed: int
    exchanged: int


class Sent(TorchDispatchMode):
    """Inside, what two ranks send: in rings, of tensors of `size` numbers; in all-to-alls, of equal parts.

    Rows of small encoders travel in all-to-alls too, whose parts have sizes of their own.
    """

    def __init__(self, *, size: int) -> None:
        super().__init__()
        self.summed = self.exchanged = 0
        self.size = size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            whole = max((leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)), key=torch.numel)
            if whole.numel() == self.size:
                self.summed += CALLS.get(name, 0) * whole.nbytes // 2
            if name == "alltoall_base_" and not any(isinstance(leaf, list) and leaf for leaf in args):
                self.exchanged += whole.nbytes // 2
        return func(*args, **(kwargs or {}))


def step_of(config: RunConfig, batches: Sequence[Batch]) -> Done:
    """What one step of this rank did."""
    torch.set_num_threads(1)
    size = batches[0].grid.kind_BS.numel() * config.model.atto.width
    with hosted(config) as host, FlopCounterMode(display=False) as flops, Sent(size=size) as sent:
        optimizer_step(host, share(batches, host.groups), config=config, step=0)
    return Done(flops.get_total_flops(), sent.summed, sent.exchanged)
