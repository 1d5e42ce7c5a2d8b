"""Do optimizer steps leave Python objects or memory behind? AdamW fused, foreach and looped, on plain and on DTensors.

    python tools/bench/growth.py [--steps 200] [--tensors 60] [--json]

Each arm in turn on the same parameters: after a tenth of the steps the objects that Python tracks are counted (after a
collection, and without one) and the resident memory, and again at the end. DTensors are sharded over one rank, as
FSDP2 shards; this project has none (DeepSpeed's partitions are plain tensors).
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import finish
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from matformer.parallel.process import settle

PAGE = 4096
SHAPE = (64, 64)
KINDS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "looped": {"foreach": False},
}


def plain(value: Tensor) -> Tensor:
    """As it is."""
    return value


def sharded(value: Tensor) -> Tensor:
    """Over a world of one rank."""
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return distribute_tensor(value, init_device_mesh("cpu", (1,)), [Shard(0)])


PLACES: dict[str, Callable[[Tensor], Tensor]] = {"plain tensors": plain, "DTensors": sharded}


def objects(*, collected: bool) -> int:
    """That the collector tracks."""
    if collected:
        gc.collect()
    return len(gc.get_objects())


def resident_bytes() -> int:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def grown(step: Callable[[], object], *, steps: int) -> dict[str, float]:
    """A step's growth, from a tenth of the steps on."""
    first = max(1, steps // 10)
    for _ in range(first):
        step()
    gc.collect()
    gc.disable()
    try:
        kept, memory = objects(collected=True), resident_bytes()
        for _ in range(steps - first):
            step()
        loose, memory = objects(collected=False) - kept, resident_bytes() - memory
        kept = objects(collected=True) - kept
    finally:
        gc.enable()
    each = steps - first
    return {"objects": kept / each, "objects_uncollected": loose / each, "bytes": memory / each}


def measure(place: str, kind: str, *, tensors: int, steps: int) -> dict[str, Any]:
    """AdamW on so many small tensors."""
    dice = torch.Generator().manual_seed(0)
    make = PLACES[place]
    held = [nn.Parameter(make(torch.randn(SHAPE, generator=dice))) for _ in range(tensors)]
    optimizer = torch.optim.AdamW(held, lr=1e-3, **KINDS[kind])

    def step() -> None:
        for parameter in held:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"on": place, "optimizer": kind, **grown(step, steps=steps), "steps": steps, "torch": torch.__version__}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; with --json one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tensors", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    settle(1)
    rows = [measure(place, kind, tensors=asked.tensors, steps=asked.steps) for place in PLACES for kind in KINDS]
    table = Table(
        *("on", "AdamW", "objects a step", "before a collection", "bytes a step"),
        title=f"what {asked.steps} steps leave behind, {asked.tensors} tensors, torch {torch.__version__}",
    )
    for row in rows:
        numbers = (f"{row[key]:+.2f}" for key in ("objects", "objects_uncollected"))
        table.add_row(row["on"], row["optimizer"], *numbers, f"{row['bytes']:+,.0f}")
    return finish(table, {"cases": rows}, as_json=asked.json, width=110)


if __name__ == "__main__":
    sys.exit(main())
