"""What a rank's tensors take of its memory: every storage from the operation that makes it to its end.

torch's profiler would do, but for gloo: what its threads release, the profiler of this thread does not see.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matformer.config.schema import RunConfig
from matformer.engine.average import Average
from matformer.engine.loop import build_model
from matformer.engine.step import optimizer_step
from matformer.hosts.hosted import MegatronHost
from matformer.parcels import Batch
from tests.ranks.cases import parallel_state, share

STEPS = 2


@dataclass(frozen=True, slots=True)
class Traced:
    """Bytes of one phase: the most that were held at once, and what is held at its end."""

    peak: int
    left: int


class Held(TorchDispatchMode):
    """Inside, `bytes` is what storages made since then take, `peak` the most since the last look.

    With `of_device` set, copies that are asked for on the CPU by name do not count, as they would not on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of_device = False
        self.bytes = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.of_device and func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return out
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or storage.device.type == "meta":
            return
        self.alive.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.bytes -= size

    def look(self) -> Traced:
        """Of the time since the last look."""
        seen = Traced(self.peak, self.bytes)
        self.peak = self.bytes
        return seen


def trace_ranks(config: RunConfig, batches: Sequence[Batch]) -> dict[str, Traced]:
    """Building, then STEPS steps: a rank's bytes in the last one's phases, named as in RankMemory.phases."""
    torch.set_num_threads(1)
    found: dict[str, Traced] = {}
    with Held() as held:
        host = MegatronHost(config)
        build_model(host, config)
        average = Average(host, decay=0.9)
        found["state"] = held.look()
        update = host.engine.step

        def step() -> None:
            found["forward and backward"] = held.look()
            update()
            found["update"] = held.look()

        host.engine.step = step
        for number in range(STEPS):
            optimizer_step(host, share(batches, host.groups), config=config, step=number)
            held.look()
            average.update(number + 1)
            found["average"] = held.look()
    host.engine.destroy()
    parallel_state.destroy_model_parallel()
    return found


def trace_saving(config: RunConfig) -> tuple[Traced, int]:
    """What gathering a checkpoint adds on the device, and the bytes of the largest tensor that this rank writes."""
    torch.set_num_threads(1)
    with Held() as held:
        host = MegatronHost(config)
        build_model(host, config)
        average = Average(host, decay=0.9)
        before = held.look().left
        held.of_device = True
        weights, averages = host.state().weights, average.state()
        after = held.look()
    host.engine.destroy()
    parallel_state.destroy_model_parallel()
    largest = max((value.nbytes for value in [*weights.values(), *averages.values()]), default=0)
    return Traced(after.peak - before, after.left - before), largest
