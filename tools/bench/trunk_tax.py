"""What megatron-core costs the trunk alone: forward and backward of its layers against the same in plain PyTorch.

    python tools/bench/trunk_tax.py [--shapes 128x64 256x256 512x1024 768x1024] [--layers 2] [--steps 11] [--json]

One process, one thread, no DeepSpeed, no optimizer. Both hold the same weights and take the same latents, mask and
rotary tables (a packed row of text, pictures and sounds), in turn: A B, B A, ... A shape is width x latents. For small
shapes the difference in microseconds a layer says more than the ratio: it does not grow with the shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import cpu_seconds, finish, in_turn, ratios, shown
from rich.table import Table
from synthetic import batch_of, packed_rows
from torch import Tensor, nn

from matformer.atto.trunk import atto_view
from matformer.config.load import load_run
from matformer.config.schema import AttoConfig, ModelConfig, ParallelConfig
from matformer.hosts.base import Trunk
from matformer.hosts.layout import drawn, layouts
from matformer.hosts.megatron import MegatronTrunk
from matformer.hosts.megatron_groups import build_groups
from matformer.hosts.plain import PlainTrunk
from matformer.layers.attention import AttoView
from matformer.parallel.groups import Groups
from matformer.parallel.process import settle

WARM_UP = 4  # the first steps fault in the memory that later ones find
DEMO = Path(__file__).parents[2] / "configs" / "run" / "demo.yaml"
SHAPES = ("128x64", "256x256", "512x1024", "768x1024")
HEAD, FEED_FORWARD = 64, 2.75  # size of a head, width of the feed-forward over the trunk's, as in the demo


@dataclass(frozen=True)
class Given:
    """What both trunks take: latents `[L, H]`, the gradient of what leaves them, and the view."""

    hidden: Tensor
    gradient: Tensor
    view: AttoView


def model_of(width: int, layers: int) -> ModelConfig:
    """The demo's model with another trunk."""
    demo = load_run(DEMO).model
    heads = width // HEAD
    sizes = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads // 2 if heads % 2 == 0 else heads,
        "ffn_width": int(FEED_FORWARD * width),
    }
    return demo.model_copy(update={"atto": demo.atto.model_copy(update=sizes)})


def given(model: ModelConfig, latents: int) -> Given:
    """One packed row."""
    batch = batch_of(model, packed_rows(model, rows=1, length=latents), length=latents)
    dice = torch.Generator().manual_seed(0)
    hidden, gradient = (torch.randn(latents, model.atto.width, generator=dice) for _ in range(2))
    return Given(hidden, gradient, atto_view(batch.grid, model.atto))


@torch.no_grad()
def trunks(atto: AttoConfig) -> dict[str, Trunk]:
    """Both, with the same weights."""
    plan = ParallelConfig()
    found: dict[str, Trunk] = {
        "megatron": MegatronTrunk(atto, plan=plan, groups=build_groups(plan)),
        "plain": PlainTrunk(atto),
    }
    for trunk in found.values():
        named = nn.ModuleDict({"atto": trunk})  # as a model names its trunk
        laid = layouts(named, atto=atto, first_layers=[0])
        for name, parameter in named.named_parameters():
            parameter.copy_(drawn(laid[name], groups=Groups(), seed=0, depth=atto.layers))
    return found


def step(trunk: Trunk, took: Given) -> tuple[Tensor, Tensor]:
    """Forward and backward: what leaves, and the gradient of what entered."""
    trunk.zero_grad(set_to_none=True)
    hidden = took.hidden.clone().requires_grad_()
    leaving = trunk(hidden, took.view)
    leaving.backward(took.gradient)
    assert hidden.grad is not None
    return leaving.detach(), hidden.grad


def measure(shape: str, *, layers: int, steps: int) -> dict[str, Any]:
    """Both trunks at one shape."""
    width, latents = (int(number) for number in shape.split("x"))
    model = model_of(width, layers)
    took, pair = given(model, latents), trunks(model.atto)
    answers = [step(trunk, took) for trunk in pair.values()]
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    arms = {name: partial(_timed, trunk, took) for name, trunk in pair.items()}
    seconds = in_turn(arms, steps, warm_up=WARM_UP)
    extra = [hosted - plain for hosted, plain in zip(seconds["megatron"], seconds["plain"], strict=True)]
    return {
        "width": width,
        "latents": latents,
        "layers": layers,
        "hosted_cpu_s": statistics.median(seconds["megatron"]),
        "plain_cpu_s": statistics.median(seconds["plain"]),
        **ratios(seconds["megatron"], seconds["plain"]),
        "extra_us_a_layer": 1e6 * statistics.median(extra) / layers,
        "steps": steps,
        "torch": torch.__version__,
    }


def _timed(trunk: Trunk, took: Given, _: int) -> float:
    return cpu_seconds(lambda: step(trunk, took))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; with --json one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="WIDTHxLATENTS")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    settle(1)
    rows = [measure(shape, layers=asked.layers, steps=asked.steps) for shape in asked.shapes]
    table = Table(
        *("width x latents", "megatron-core, ms", "plain, ms", "ratio (min … max)", "more, µs a layer"),
        title=f"forward and backward of {asked.layers} layers, one thread, {asked.steps} pairs",
    )
    for row in rows:
        table.add_row(
            f"{row['width']} x {row['latents']}",
            f"{1e3 * row['hosted_cpu_s']:.2f}",
            f"{1e3 * row['plain_cpu_s']:.2f}",
            shown(row),
            f"{row['extra_us_a_layer']:.0f}",
        )
    return finish(table, {"cases": rows}, as_json=asked.json, width=120)


if __name__ == "__main__":
    sys.exit(main())
