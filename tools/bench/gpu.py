"""The bar of one GPU: model FLOPs utilisation of a training step at 8,192 latents, and where its time and memory go.

    python tools/bench/gpu.py [--config configs/run/1b.yaml] [--latents 8192] [--steps 10] [--device auto|cuda|cpu]
        [--microbatches 4] [--small] [--skip step parts trunks] [--json] [key=value ...]

Measured are: the best rate of a plain product; whole steps through the host of the config (megatron + DeepSpeed) over
packed rows of text, pictures and sounds, and of text alone; each part by itself, forward and backward; our trunk beside
megatron-core's own causal decoder of the same sizes. Rows are random numbers in real packing (synthetic.py): no data.

Utilisation counts the model's FLOPs under the actual mask (parallel/flops.py, `seen` pairs) over `--peak-tflops`, the
dense bfloat16 peak. Without a GPU it prints what it would run and ends, with 0. `--small` is the demo's model at 256
latents; with `--device cpu` it is how the tests run this file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import finish
from rich.console import Console
from rich.table import Table
from synthetic import Mixture, batches_of
from torch import Tensor, nn

from matformer.config.load import load_run
from matformer.config.schema import RunConfig
from matformer.data.counts import counts_of
from matformer.door import door
from matformer.engine.loop import build_host, build_model, build_stages
from matformer.engine.step import loss_weights, optimizer_step
from matformer.errors import ConfigError
from matformer.hosts.base import Host, build_optimizer, parameter_groups
from matformer.hosts.plain import plain_trunk
from matformer.losses.total import total_loss
from matformer.model import Matformer
from matformer.parallel.counts import Counts, Pairs
from matformer.parallel.flops import Flops, added, flops_by_part, part_flops
from matformer.parallel.memory import rank_memory, stages
from matformer.parallel.parameters import parameters_by_part
from matformer.parallel.parts import atto_layer
from matformer.parallel.process import settle
from matformer.parallel.tables import gib, large, seconds
from matformer.parcels import Batch

RUNS = Path(__file__).parents[2] / "configs" / "run"
WARM_UP = 3
BAR = 0.50
MIXTURES: tuple[Mixture, ...] = ("mixed", "text")
STAGES = ("step", "parts", "trunks")


@dataclass(frozen=True)
class Clock:
    """Seconds and bytes of work on a device; bytes are None where torch does not count them."""

    device: torch.device
    steps: int

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, everything it started included."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3

    def median(self, work: Callable[[], object]) -> float:
        """Of some calls, after some that do not count."""
        warm_up = WARM_UP if self.device.type == "cuda" else 1
        return statistics.median([self.seconds(work) for _ in range(warm_up + self.steps)][warm_up:])

    def peak_bytes(self, work: Callable[[], object]) -> int | None:
        """Most bytes at once during a call, over those that were there before it."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def run_of(asked: argparse.Namespace) -> RunConfig:
    """The config of the bench: one rank, microbatches of one row, in the device's dtype."""
    path = RUNS / "demo.yaml" if asked.small else asked.config
    latents = asked.latents or (256 if asked.small else 8192)
    keys = ("tp=1", "pp=1", "dp=1", f"dtype={'float32' if asked.device == 'cpu' else 'bfloat16'}")
    ours = [f"parallel.{key}" for key in keys]
    ours += ["train.global_batch=1", "train.micro_batch=1", f"data.sequence_latents={latents}"]
    config = load_run(path, [*ours, *asked.overrides])
    rows = asked.microbatches * config.train.micro_batch
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch": rows})})


def flops_of(config: RunConfig, batches: Sequence[Batch]) -> dict[str, Flops]:
    """By part, of all these batches, under their masks."""
    found: dict[str, Flops] = {}
    for batch in batches:
        for name, one in flops_by_part(config.model, counts_of(batch, config.model)).items():
            found[name] = found.get(name, Flops()) + one
    return found


def expected(config: RunConfig, batches: Sequence[Batch], *, peak: float) -> dict[str, Any]:
    """What arithmetic says before anything runs. peak: FLOPs a second."""
    flops, parameters = flops_of(config, batches), parameters_by_part(config.model)
    whole = added(flops).total
    memories = [rank_memory(config, counts_of(batch, config.model), stages(config)[0]) for batch in batches]
    memory = max(memories, key=lambda one: one.peak)
    return {
        "parameters": sum(parameters.values()),
        "parameters_by_part": parameters,
        "flops": whole,
        "flops_by_part": {name: one.total for name, one in flops.items()},
        "memory_bytes": memory.peak,
        "memory_by_kind": asdict(memory),
        "step_s_at_the_bar": whole / (BAR * peak),
    }


def plan_table(config: RunConfig, found: Mapping[str, Any], *, mixture: str) -> Table:
    """What would run."""
    train, length = config.train, config.data.sequence_latents
    table = Table(
        *("part", "parameters", "FLOPs a step", "of all"),
        title=f"{config.name}, {mixture}: {config.microbatches} microbatches of {train.micro_batch} x {length:,} "
        f"latents, {config.parallel.dtype}",
    )
    for name, number in found["parameters_by_part"].items():
        cost = found["flops_by_part"][name]
        table.add_row(name, large(number), large(cost), f"{cost / found['flops']:.1%}")
    table.add_row("all", large(found["parameters"]), large(found["flops"]), "100%")
    table.add_row("memory expected", gib(found["memory_bytes"]), "", "")
    table.add_row(f"a step at {BAR:.0%} of the peak", "", seconds(found["step_s_at_the_bar"]), "")
    return table


def matmul_rate(clock: Clock, config: RunConfig) -> float:
    """FLOPs a second of the best of some plain products."""
    sides = (4096, 8192, 16384) if clock.device.type == "cuda" else (256,)
    return max(_product_rate(clock, config, side) for side in sides)


def _product_rate(clock: Clock, config: RunConfig, side: int) -> float:
    a, b = (torch.randn(side, side, device=clock.device, dtype=dtype_of(config)) for _ in range(2))
    return 2 * side**3 / min(clock.seconds(lambda: a @ b) for _ in range(WARM_UP + clock.steps))


def dtype_of(config: RunConfig) -> torch.dtype:
    """Of the model's weights."""
    return torch.bfloat16 if config.parallel.dtype == "bfloat16" else torch.float32


def whole_steps(clock: Clock, host: Host, config: RunConfig, *, peak: float) -> list[dict[str, Any]]:
    """Of both mixtures, through the host."""
    build_model(host, config)
    return [_steps(clock, host, config, mixture, peak=peak) for mixture in MIXTURES]


def _steps(clock: Clock, host: Host, config: RunConfig, mixture: Mixture, *, peak: float) -> dict[str, Any]:
    batches, done = batches_of(config, mixture=mixture, count=config.microbatches), 0

    def step() -> None:
        nonlocal done
        optimizer_step(host, batches, config=config, step=done)
        done += 1

    taken, memory = clock.median(step), clock.peak_bytes(step)
    if memory is not None:  # what stands all the time counts too
        memory = torch.cuda.max_memory_allocated()
    whole = added(flops_of(config, batches)).total
    return {
        "mixture": mixture,
        "step_s": taken,
        "flops": whole,
        "mfu": whole / taken / peak,
        "latents_a_s": config.train.global_batch * config.data.sequence_latents / taken,
        "bytes_a_s": sum(batch.num_bytes for batch in batches) / taken,
        "memory_bytes": memory,
    }


@dataclass(frozen=True)
class Work:
    """A part by itself: forward and backward from and to leaves. flops: the part's own, under the mask."""

    name: str
    run: Callable[[], object]
    flops: int = 0


def backward(outputs: Sequence[Tensor]) -> None:
    """From a gradient of ones."""
    told = [one for one in outputs if one.requires_grad]
    torch.autograd.backward(told, [torch.ones_like(one) for one in told])


def richest(batches: Sequence[Batch]) -> Batch:
    """The one with most noised patches of the modality that has fewest."""
    return max(batches, key=lambda one: min(units.noised_row_Q.numel() for units in one.media.values()))


def parts_of(model: Matformer, batch: Batch, config: RunConfig, *, flops: Mapping[str, Flops]) -> list[Work]:
    """Every part by itself on this batch. Whatever enters is a leaf."""
    sizes, weights = batch.grid.kind_BS.numel(), loss_weights(config)
    dtype, device = next(model.parameters()).dtype, batch.grid.kind_BS.device
    hidden_LH = torch.randn(sizes, config.model.atto.width, dtype=dtype, device=device, requires_grad=True)
    view, counts = model.view(batch), batch.counts()
    found = [Work("preludio/text", lambda: backward([model.preludi["text"](batch.read)[0]]))]
    for name in config.model.media:
        found.append(Work(f"preludio/{name}", lambda name=name: backward([model.preludi[name](batch.media[name])[0]])))
    found.append(Work("mask and positions", lambda: model.view(batch)))
    found.append(Work("atto", lambda: backward([model.atto(hidden_LH, view)])))
    found.append(Work("coda/text", lambda: backward([model.text_logits(hidden_LH, batch.text)])))
    for name in config.model.media:
        found.append(
            Work(f"coda/{name}", lambda name=name: backward([_answer(model, name, hidden_LH, batch)])),
        )

    def losses() -> None:
        total_loss(model.sums(hidden_LH, batch), counts=counts, weights=weights).backward()

    found.append(Work("all Code, router and loss", losses))
    alone = {name: one.total for name, one in flops.items()}
    alone["all Code, router and loss"] = sum(alone[name] for name in alone if name.startswith(("coda/", "router")))
    return [Work(one.name, one.run, alone.get(one.name, 0)) for one in found]


def _answer(model: Matformer, name: str, hidden_LH: Tensor, batch: Batch) -> Tensor:
    return model.code[name](hidden_LH, batch.media[name])


def measured_parts(clock: Clock, host: Host, config: RunConfig, *, peak: float) -> list[dict[str, Any]]:
    """Time and memory of every part, without the host's gradients and its optimizer, and AdamW by itself."""
    model = build_stages(host, config)
    assert isinstance(model, Matformer), "one rank holds the whole model"
    drawn(model.to(device=clock.device, dtype=dtype_of(config)))
    batch = richest(batches_of(config, mixture="mixed", count=8))
    flops = flops_by_part(config.model, counts_of(batch, config.model))
    works = parts_of(model, batch.to(clock.device), config, flops=flops)
    rows = [_part(clock, one, model, peak=peak) for one in works]
    del works, model
    return [*rows, _optimizer(clock, config)]


def _part(clock: Clock, work: Work, model: nn.Module, *, peak: float) -> dict[str, Any]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        work.run()

    taken = clock.median(run)
    model.zero_grad(set_to_none=True)
    memory = clock.peak_bytes(work.run)
    return {
        "part": work.name,
        "seconds": taken,
        "flops": work.flops,
        "mfu": work.flops / taken / peak,
        "memory_bytes": memory,
    }


def _optimizer(clock: Clock, config: RunConfig) -> dict[str, Any]:
    """AdamW over float32 masters of every parameter: the least that an update costs."""
    with torch.device("meta"):
        model = Matformer(config.model, trunk=plain_trunk(config.model))
    model = model.to_empty(device=clock.device)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(parameter_groups(model, weight_decay=config.train.weight_decay), config)
    return {
        "part": "optimizer",
        "seconds": clock.median(optimizer.step),
        "flops": 0,
        "mfu": 0.0,
        "memory_bytes": clock.peak_bytes(optimizer.step),
    }


@torch.no_grad()
def drawn(model: nn.Module) -> None:
    """Weights that leave numbers finite, whatever a host left in them."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        elif "norm" in name:
            nn.init.ones_(parameter)


def measured_trunks(clock: Clock, host: Host, config: RunConfig, *, peak: float) -> list[dict[str, Any]]:
    """Ours on a mixed row and on text alone, beside megatron-core's own decoder of the same sizes, causal."""
    from matformer.hosts.megatron_causal import MegatronCausal, causal_cores  # joins a world: where asked for alone

    model = build_stages(host, config)
    assert isinstance(model, Matformer), "one rank holds the whole model"
    drawn(model.to(device=clock.device, dtype=dtype_of(config)))
    rows = [_our_trunk(clock, model, config, mixture, peak=peak) for mixture in MIXTURES]
    del model
    for core in causal_cores():
        theirs = MegatronCausal(config.model.atto, plan=config.parallel, core=core)
        theirs.to(device=clock.device, dtype=dtype_of(config))
        rows.append(_their_trunk(clock, theirs, config, name=f"megatron-core's GPT, {core}'s attention", peak=peak))
    return rows


def _our_trunk(clock: Clock, model: Matformer, config: RunConfig, mixture: Mixture, *, peak: float) -> dict[str, Any]:
    batch = batches_of(config, mixture=mixture, count=1)[0]
    flops = flops_by_part(config.model, counts_of(batch, config.model))["atto"].total
    there = batch.to(clock.device)
    view = model.view(there)
    return _trunk(clock, f"ours, {mixture}", model, lambda x: model.atto(x, view), config, flops=flops, peak=peak)


def _their_trunk(clock: Clock, trunk: nn.Module, config: RunConfig, *, name: str, peak: float) -> dict[str, Any]:
    positions = config.data.sequence_latents
    pairs = positions * (positions + 1) // 2
    layer = list(atto_layer(config.model, Counts(positions, Pairs(pairs, pairs))))
    flops = (part_flops(layer) * config.model.atto.layers).total
    return _trunk(clock, name, trunk, trunk, config, flops=flops, peak=peak)


def _trunk(
    clock: Clock,
    name: str,
    holder: nn.Module,
    forward: Callable[[Tensor], Tensor],
    config: RunConfig,
    *,
    flops: int,
    peak: float,
) -> dict[str, Any]:
    shape = (config.data.sequence_latents, config.model.atto.width)
    hidden = torch.randn(shape, dtype=dtype_of(config), device=clock.device, requires_grad=True)
    work = Work(name, lambda: backward([forward(hidden)]), flops)
    row = _part(clock, work, holder, peak=peak)
    return {"trunk": row.pop("part"), **row}


def measure(config: RunConfig, clock: Clock, *, peak: float, skip: Sequence[str]) -> dict[str, Any]:
    """All that is not skipped. The host comes last: its optimizer's state stays."""
    host, found = build_host(config), dict[str, Any]()
    found["matmul_tflops"] = matmul_rate(clock, config) / 1e12
    if "trunks" not in skip:
        found["trunks"] = measured_trunks(clock, host, config, peak=peak)
    if "parts" not in skip:
        found["parts"] = measured_parts(clock, host, config, peak=peak)
    if "step" not in skip:
        found["steps"] = whole_steps(clock, host, config, peak=peak)
        found["meets_the_bar"] = found["steps"][0]["mfu"] >= BAR
    return found


def measured_table(found: Mapping[str, Any], *, peak: float) -> Table:
    """One row a measurement."""
    best = found["matmul_tflops"] * 1e12
    table = Table(
        *("what", "time", "FLOPs", "of the peak", "of a plain product", "memory"),
        title=f"peak {large(peak)}FLOP/s, best plain product {large(best)}FLOP/s",
    )
    named = [(f"a step, {row['mixture']}", row["step_s"], row) for row in found.get("steps", [])]
    named += [(row["part"], row["seconds"], row) for row in found.get("parts", [])]
    named += [(f"trunk: {row['trunk']}", row["seconds"], row) for row in found.get("trunks", [])]
    for name, taken, row in named:
        rate = row["flops"] / taken
        shares = (f"{rate / peak:.1%}", f"{rate / best:.1%}") if row["flops"] else ("", "")
        memory = "" if row["memory_bytes"] is None else gib(row["memory_bytes"])
        table.add_row(name, seconds(taken), large(row["flops"]), *shares, memory)
    return table


def device_of(asked: str) -> torch.device | None:
    """None where nothing is to run. Raises ConfigError for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda needs a GPU that torch sees, got none; leave --device out to see what would run"
        )
    if asked == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else None
    return torch.device(asked)


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints tables; with --json one JSON line last. 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(RUNS / "1b.yaml"))
    parser.add_argument("--latents", type=int, default=0, help="of a row; 8,192, with --small 256")
    parser.add_argument("--microbatches", type=int, default=4, help="of a step: its update is paid once")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--small", action="store_true", help="the demo's model")
    parser.add_argument("--skip", nargs="+", choices=STAGES, default=[])
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 of H100 SXM and H200")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args(arguments)
    device, config = device_of(asked.device), run_of(asked)
    peak = asked.peak_tflops * 1e12
    plans = {
        mixture: expected(config, batches_of(config, mixture=mixture, count=config.microbatches), peak=peak)
        for mixture in MIXTURES
    }
    for mixture, found in plans.items():
        Console(width=120).print(plan_table(config, found, mixture=mixture))
    result: dict[str, Any] = {"ran": device is not None, "date": str(date.today()), "torch": torch.__version__}
    result |= {"expected": plans, "overrides": asked.overrides}
    if device is None:
        table = Table("no GPU that torch sees: nothing ran", title="the tables above are arithmetic")
        return finish(table, result, as_json=asked.json)
    settle(1 if device.type == "cpu" else 0)
    clock = Clock(device, asked.steps)
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result |= measure(config, clock, peak=peak, skip=asked.skip)
    return finish(measured_table(result, peak=peak), result, as_json=asked.json, width=140)


if __name__ == "__main__":
    sys.exit(main())
