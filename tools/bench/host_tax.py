"""What the real host costs on one rank: CPU seconds of a training step, megatron + DeepSpeed against plain PyTorch.

    python tools/bench/host_tax.py [--config configs/run/demo.yaml] [--steps 12] [--json] [key=value ...]

Each arm is a process of its own (the plain one never imports megatron, DeepSpeed or the CPU shim), both take the same
global batches with one thread, in turn: A B, B A, A B, ... The ratio is taken pair by pair.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection

from common import finish, in_turn, ratios, shown
from rich.table import Table

from matformer.config.check import check
from matformer.config.load import load_run

WARM_UP = 2


def arm(pipe: Connection, config_file: str, overrides: list[str]) -> None:
    """One arm's process: a step for each request, its CPU and wall seconds in answer."""
    import torch

    from matformer.data.loader import Loader
    from matformer.engine.loop import build_host, build_model
    from matformer.engine.step import optimizer_step
    from matformer.parallel.process import settle

    settle(1)
    config = load_run(config_file, overrides)
    host = build_host(config)
    model = build_model(host, config)
    loader = Loader(config, prefetch=False)
    pipe.send({"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__})
    while (step := pipe.recv()) is not None:
        batches = loader.next_global_batch(step)
        cpu, wall = time.process_time(), time.perf_counter()
        optimizer_step(host, batches, config=config, step=step)
        pipe.send((time.process_time() - cpu, time.perf_counter() - wall))


def start(host: str, config_file: str, overrides: list[str]) -> Connection:
    """An arm, ready to step."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    asked = [*overrides, f"parallel.host={host}"]
    context.Process(target=arm, args=(theirs, config_file, asked), daemon=True).start()
    return ours


def measure(config_file: str, overrides: list[str], steps: int) -> dict[str, object]:
    """Seconds of both arms, step by step in turn."""
    arms = {name: start(name, config_file, overrides) for name in ("megatron", "plain")}
    facts = {name: pipe.recv() for name, pipe in arms.items()}

    def step_of(pipe: Connection, number: int) -> float:
        pipe.send(number)
        return pipe.recv()[0]

    turns = {name: functools.partial(step_of, pipe) for name, pipe in arms.items()}
    seconds = in_turn(turns, steps, warm_up=WARM_UP)
    for pipe in arms.values():
        pipe.send(None)
    return {
        "hosted_cpu_s": statistics.median(seconds["megatron"]),
        "plain_cpu_s": statistics.median(seconds["plain"]),
        **ratios(seconds["megatron"], seconds["plain"]),
        "steps": steps,
        **facts["plain"],
    }


def main() -> int:
    """Prints a table; with --json one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/run/demo.yaml")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args()
    check(load_run(asked.config, asked.overrides))
    result = measure(asked.config, asked.overrides, asked.steps)
    table = Table("arm", "CPU seconds a step (median)", title=f"one rank, one thread, {asked.config}")
    table.add_row("megatron-core + DeepSpeed", f"{result['hosted_cpu_s']:.3f}")
    table.add_row("plain PyTorch", f"{result['plain_cpu_s']:.3f}")
    table.add_row("ratio, pair by pair", shown(result))
    return finish(table, result, as_json=asked.json)


if __name__ == "__main__":
    sys.exit(main())
