"""Does torch.compile pay? Gain, seconds of compiling, and how often it would have to compile again.

    python tools/bench/compile.py [--config configs/run/demo.yaml] [--wide] [--dynamic] [--made]
        [--units preludio/text coda/text ...] [--ways "as it is" "plain operations"] [--rounds 11] [--batches 20]
        [--backend inductor|eager] [--json] [key=value ...]

Needs a C++ compiler (g++), which torch's inductor calls on a CPU, and the config's data. For each unit, forward and
backward on one batch, compiled (`dynamic=False`) against eager in turn, one thread; outputs and gradients must agree.
It is compiled twice: as it is, and in plain operations: norms and rotations as torch's own operations, attention with a
mask instead of tiles. Eager is as it is both times: it is what training runs.
Then the unit reads so many real batches, each of other shapes: after each it is asked how many graphs dynamo has traced
by then (by its `eager` backend, which generates no code: the number is the same). Then the batches' sizes are rounded
up to buckets, and different sizes and padding are counted. `--wide`: widths twice the config's. `--dynamic`: one code
for all shapes. `--made`: rows of random numbers (synthetic.py) instead of the config's data.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from common import cpu_seconds, finish, in_turn, ratios, shown
from rich.console import Console
from rich.table import Table
from synthetic import batches_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

from matformer.atto import trunk
from matformer.config.load import load_run
from matformer.config.schema import ModelConfig, RunConfig
from matformer.data.loader import Loader
from matformer.door import door
from matformer.errors import ConfigError
from matformer.hosts.plain import draw_weights, plain_trunk
from matformer.layers import attention, local_attention, norm
from matformer.model import Matformer
from matformer.parallel.process import settle
from matformer.parcels import Batch

WARM_UP = 2
MANY = 10_000_000  # graphs before dynamo gives up on a function: never
RTOL, ATOL = 1e-4, 1e-5


@dataclass(frozen=True)
class Unit:
    """A module, what it is called with for a batch, and the sizes that its shapes depend on."""

    module: nn.Module
    inputs: Callable[[Batch], tuple[Any, ...]]
    sizes: Callable[[Batch], tuple[int, ...]]


def units_of(model: Matformer) -> dict[str, Unit]:
    """The four that the issue asks about."""
    width = model.model_config.atto.width
    media = next(iter(model.model_config.media))
    atto: Any = model.atto

    def latents(batch: Batch) -> Tensor:
        made = torch.randn(batch.grid.kind_BS.numel(), width, generator=torch.Generator().manual_seed(0))
        return made.requires_grad_()

    def layer(batch: Batch) -> tuple[Any, ...]:
        return latents(batch).view(*batch.grid.kind_BS.shape, -1), model.view(batch)

    def media_sizes(batch: Batch) -> tuple[int, ...]:
        return batch.media[media].noised_row_Q.numel(), batch.media[media].bucket_J.numel()

    return {
        "preludio/text": Unit(model.preludi["text"], lambda batch: (batch.read,), text_sizes),
        "coda/text": Unit(model.code["text"], lambda batch: (latents(batch), batch.text), text_sizes),
        "atto layer": Unit(atto.layers[0], layer, lambda batch: tuple(batch.grid.kind_BS.shape)),
        f"coda/{media}": Unit(model.code[media], lambda batch: (latents(batch), batch.media[media]), media_sizes),
    }


@contextmanager
def plain_operations() -> Iterator[None]:
    """Inside, what was written by hand for the CPU is what torch has for every device."""
    window_of = local_attention.window_of
    ours = [
        (norm, "rms_norm", _torchs_norm),
        (attention, "rotate", _turned),
        (local_attention, "rotate", _turned),
        (local_attention, "window_of", lambda *rows, tiled, **keys: window_of(*rows, tiled=False, **keys)),
        (trunk, "ROWS", MANY),  # no sequence is long enough for tiles
    ]
    with ExitStack() as stack:
        for module, name, function in ours:
            stack.enter_context(patch.object(module, name, function))
        yield


def _torchs_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def _turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


WAYS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "as it is": nullcontext,
    "plain operations": plain_operations,
}


def text_sizes(batch: Batch) -> tuple[int, ...]:
    """Symbols and patches."""
    return batch.text.symbol_U.numel(), batch.text.slot_P.numel()


def widened(model: ModelConfig) -> ModelConfig:
    """Twice as wide everywhere; heads stay as large."""
    atto, text = model.atto, model.text
    media = {name: one.model_copy(update={"coda_width": 2 * one.coda_width}) for name, one in model.media.items()}
    wide = {"width": 2 * atto.width, "heads": 2 * atto.heads, "kv_heads": 2 * atto.kv_heads}
    local = {"width": 2 * text.width, "heads": 2 * text.heads, "ffn_width": 2 * text.ffn_width}
    return model.model_copy(
        update={
            "atto": atto.model_copy(update={**wide, "ffn_width": 2 * atto.ffn_width}),
            "text": text.model_copy(update=local),
            "media": media,
        }
    )


def real_batches(config: RunConfig, count: int) -> list[Batch]:
    """Those that training would read first. Raises DataError where the data are not there."""
    loader = Loader(config, prefetch=False)
    return [loader.next_global_batch(step)[0] for step in range(count)]


def model_of(config: RunConfig) -> Matformer:
    """In plain PyTorch, weights as a run draws them."""
    model = Matformer(config.model, trunk=plain_trunk(config.model))
    draw_weights(model, config)
    return model


def step(unit: Unit, module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Forward and backward; what left, and the gradient of every weight."""
    unit.module.zero_grad(set_to_none=True)
    out = module(*inputs)
    out = out[0] if isinstance(out, tuple) else out  # a Preludio also says where its rows go
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in unit.module.parameters() if p.grad is not None)]


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock, and of CPU with the compilers that were called."""

    wall: float
    cpu: float


def spent(work: Callable[[], object]) -> Spent:
    """Of a call and its children."""
    wall, cpu = time.perf_counter(), _all_cpu()
    work()
    return Spent(time.perf_counter() - wall, _all_cpu() - cpu)


def _all_cpu() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def gain(
    unit: Unit, batch: Batch, *, way: str, rounds: int, dynamic: bool = False, backend: str = "inductor"
) -> dict[str, Any]:
    """Of the compiled unit on one batch."""
    forget()
    inputs = unit.inputs(batch)
    expected = step(unit, unit.module, inputs)
    compiled: Any = torch.compile(unit.module, backend=backend, dynamic=dynamic)
    with WAYS[way]():
        inputs_there = unit.inputs(batch)
        first = spent(lambda: step(unit, compiled, inputs_there))
        found = step(unit, compiled, inputs_there)
    assert len(expected) == len(found), "the same weights have gradients"
    for one, other in zip(found, expected, strict=True):
        scale = max(float(other.abs().max()), 1e-12)
        torch.testing.assert_close(one / scale, other / scale, rtol=RTOL, atol=ATOL)

    def timed(_: int, *, module: nn.Module, given: tuple[Any, ...], way: str) -> float:
        with WAYS[way]():
            return cpu_seconds(lambda: step(unit, module, given))

    arms = {
        "eager": partial(timed, module=unit.module, given=inputs, way="as it is"),
        "compiled": partial(timed, module=compiled, given=inputs_there, way=way),
    }
    took = in_turn(arms, rounds, warm_up=WARM_UP)
    held = ratios(took["compiled"], took["eager"])
    eager, compiling = statistics.median(took["eager"]), first.cpu
    saved = eager * (1 - held["ratio"])  # pair by pair: medians of the arms apart are noisier
    return {
        "eager_cpu_s": eager,
        "compiled_cpu_s": statistics.median(took["compiled"]),
        **held,
        "compile_wall_s": first.wall,
        "compile_cpu_s": compiling,
        "steps_to_pay": math.ceil(compiling / saved) if saved > 0 else None,
    }


def graphs(unit: Unit, batches: Sequence[Batch], *, way: str, dynamic: bool | None) -> list[int]:
    """Graphs traced by the end of each batch."""
    forget()
    compiled: Any = torch.compile(unit.module, backend="eager", dynamic=dynamic)
    found = []
    for batch in batches:
        with WAYS[way]():
            compiled(*unit.inputs(batch))
        found.append(counters["stats"]["unique_graphs"])
    return found


def breaks() -> int:
    """Places where dynamo left off, since `forget`."""
    return sum(counters["graph_break"].values())


def forget() -> None:
    """Everything compiled and counted."""
    torch._dynamo.reset()
    counters.clear()


def bucketed(sizes: Sequence[tuple[int, ...]], *, steps: int) -> dict[str, Any]:
    """Sizes rounded up to `steps` buckets an octave (0: as they are): how many differ, and what is padded."""
    found = [tuple(rounded_up(size, steps=steps) for size in one) for one in sizes]
    real, padded = (sum(one[0] for one in every) for every in (sizes, found))
    return {"steps": steps, "shapes": len(set(found)), "waste": padded / real - 1 if real else 0.0}


def rounded_up(size: int, *, steps: int) -> int:
    """To the next of the numbers 2^(n / steps)."""
    return size if size == 0 or steps == 0 else math.ceil(2 ** (math.ceil(math.log2(size) * steps - 1e-9) / steps))


def measure(
    name: str,
    unit: Unit,
    batches: Sequence[Batch],
    *,
    way: str,
    rounds: int,
    dynamic: bool = False,
    backend: str = "inductor",
) -> dict[str, Any]:
    """Gain, graphs and buckets of a unit."""
    gained = gain(unit, batches[0], way=way, rounds=rounds, dynamic=dynamic, backend=backend)
    traced = graphs(unit, batches, way=way, dynamic=False)
    broken = breaks()
    symbolic = graphs(unit, batches, way=way, dynamic=None)
    return {
        "unit": name,
        "way": way,
        **gained,
        "graphs_first": traced[0],
        "graphs": traced[-1],
        "batches_that_compile": sum(b > a for a, b in zip([0, *traced], traced, strict=False)),
        "graphs_when_dynamic": symbolic[-1],
        "graph_breaks": broken,
        "buckets": [bucketed([unit.sizes(batch) for batch in batches], steps=steps) for steps in (0, 8, 4, 2)],
    }


def table_of(rows: Sequence[Mapping[str, Any]], *, title: str, batches: int) -> Table:
    """A row a unit."""
    table = Table(
        *(
            "unit",
            "compiled",
            "eager, ms",
            "compiled, ms",
            "ratio (min … max)",
            "compiling: CPU s",
            "steps until it pays",
        ),
        *("graphs: 1 batch", f"{batches} batches", "dynamic", "breaks"),
        title=title,
    )
    for row in rows:
        table.add_row(
            row["unit"],
            row["way"],
            f"{1e3 * row['eager_cpu_s']:.1f}",
            f"{1e3 * row['compiled_cpu_s']:.1f}",
            shown(row),
            f"{row['compile_cpu_s']:.0f}",
            "never" if row["steps_to_pay"] is None else f"{row['steps_to_pay']:,}",
            *(str(row[key]) for key in ("graphs_first", "graphs", "graphs_when_dynamic", "graph_breaks")),
        )
    return table


def bucket_table(rows: Sequence[Mapping[str, Any]], *, batches: int) -> Table:
    """Different shapes, and padding."""
    table = Table("unit", "as they are", "8 an octave", "4", "2", title=f"shapes over {batches} batches (padded rows)")
    for row in {row["unit"]: row for row in rows}.values():
        table.add_row(row["unit"], *(f"{one['shapes']} ({one['waste']:.0%})" for one in row["buckets"]))
    return table


def require_a_compiler() -> None:
    """Raises ConfigError where inductor would find none."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(f"torch.compile on a CPU needs a C++ compiler, found no {compiler}; apt-get install g++")


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints tables; with --json one JSON line last. 2 where there is no compiler or no data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/run/demo.yaml")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--dynamic", action="store_true", help="compile for all shapes at once, not for each")
    parser.add_argument("--made", action="store_true", help="needs no data")
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--units", nargs="+", default=None)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_args(arguments)
    settle(1)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MANY
    if asked.backend == "inductor":
        require_a_compiler()
    config = load_run(asked.config, asked.overrides)
    batches = batches_of(config, count=asked.batches) if asked.made else real_batches(config, asked.batches)
    if asked.wide:
        config = config.model_copy(update={"model": widened(config.model)})
    units = units_of(model_of(config))
    # A cache of its own: nothing compiled before is found.
    with (
        tempfile.TemporaryDirectory(prefix="inductor-") as cache,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache),
    ):
        rows = [
            measure(
                name,
                units[name],
                batches,
                way=way,
                rounds=asked.rounds,
                dynamic=asked.dynamic,
                backend=asked.backend,
            )
            for name in asked.units or units
            for way in asked.ways
        ]
    title = f"{config.name}{', twice as wide' if asked.wide else ''}: forward and backward, one thread"
    title += ", shapes as symbols" if asked.dynamic else ""
    Console(width=180).print(table_of(rows, title=title, batches=len(batches)))
    result = {"units": rows, "wide": asked.wide, "dynamic": asked.dynamic, "torch": torch.__version__}
    return finish(bucket_table(rows, batches=len(batches)), result, as_json=asked.json, width=180)


if __name__ == "__main__":
    sys.exit(main())
