"""Forward, loss and backward of our byte path against transformers' BLT: CPU seconds a step, one thread, in turn.

    python tools/bench/train_step_vs_blt.py [--steps 9] [--shapes small large] [--dtypes float32 bfloat16] [--json]

Ours is the same function with the same number of parameters (BLT's pooling, Coda input and trunk; `engine/from_blt.py`
loads its weights), with the router beside it. Patches of 4 on both sides: theirs is then the mode that leaks
bytes within a patch, so the losses are not compared. bfloat16 is autocast over float32 weights. Memory is the growth of
the process's peak over three steps, each arm in a process of its own. The share of the peak is that of plain float32 or
bfloat16 products of the sizes of our matrices, one after the other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import cpu_seconds, finish, in_turn, ratios, shown
from rich.table import Table
from torch import Tensor, nn
from training_steps import Step, flops_of, matmul_gflops, training_step

from matformer.data.packing import build_batch
from matformer.data.patching import StaticPatcher
from matformer.data.sources import Document, text_span
from matformer.engine.from_blt import load_blt, model_config_of
from matformer.hosts.plain import PlainTrunk
from matformer.losses.total import total_loss
from matformer.model import Matformer
from matformer.parallel.process import settle

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import BltConfig, BltForCausalLM

WARM_UP, PATCH, ROWS = 2, 4, 2


@dataclass(frozen=True)
class Shape:
    """One size of both models. Source: ../shared/research/anchors_model.md, section 3."""

    symbols: int
    local: int
    width: int
    layers: int
    ffn_width: int
    inner: int


SHAPES = {
    "small": Shape(symbols=256, local=128, width=256, layers=2, ffn_width=512, inner=256),
    "large": Shape(symbols=1024, local=256, width=512, layers=8, ffn_width=512, inner=512),
}


def blt(shape: Shape) -> BltForCausalLM:
    """transformers' model, weights drawn."""
    slots = shape.width // shape.local
    local = {"hidden_size": shape.local, "num_attention_heads": 4, "intermediate_size": shape.inner}
    local |= {"hidden_size_global": shape.width, "cross_attn_k": slots}
    library: Any = BltConfig
    config = library(
        patch_in_forward=False,
        cross_attn_k=slots,
        encoder_hash_byte_group_vocab=5000,
        encoder_config=local | {"num_hidden_layers": 1},
        decoder_config=local | {"num_hidden_layers": 2},
        global_config={
            "hidden_size": shape.width,
            "num_attention_heads": 4,
            "num_hidden_layers": shape.layers,
            "intermediate_size": shape.ffn_width,
        },
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return BltForCausalLM(config)


def their_step(shape: Shape, dtype: str) -> tuple[nn.Module, Step]:
    """Their model and its step over random bytes."""
    model = blt(shape)
    symbols = torch.randint(4, 260, (ROWS, shape.symbols), generator=torch.Generator().manual_seed(1))
    lengths = torch.full((ROWS, shape.symbols // PATCH), PATCH)

    def loss() -> Tensor:
        return model(symbols, labels=symbols, use_cache=False, patch_lengths=lengths).loss

    return model, training_step(model, loss, dtype=dtype)


def our_step(shape: Shape, dtype: str) -> tuple[nn.Module, Step]:
    """Ours with the same weights, over as many symbols (bytes and `<end>`) in the same patches."""
    theirs = blt(shape)
    settings: Any = theirs.config
    config = model_config_of(settings, window=shape.symbols)
    model = Matformer(config, trunk=PlainTrunk(config.atto))
    load_blt(model, settings, theirs.state_dict())
    dice = np.random.default_rng(1)
    patcher = StaticPatcher(PATCH)
    documents = [Document(str(i), (text_span(dice.bytes(shape.symbols - 1), patcher),)) for i in range(ROWS)]
    batch = build_batch(documents, model=config, sequence_latents=1 + shape.symbols // PATCH)
    counts, weights = batch.counts(), {"text": 1.0, "router": 0.1}

    def loss() -> Tensor:
        return total_loss(model(batch), counts=counts, weights=weights)

    return model, training_step(model, loss, dtype=dtype)


ARMS = {"ours": our_step, "theirs": their_step}


def peak_growth(arm: str, shape: str, dtype: str) -> float:
    """MiB that three steps add to the peak of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_growth, (arm, shape, dtype))


def _peak_growth(arm: str, shape: str, dtype: str) -> float:
    torch.set_num_threads(1)
    _, step = ARMS[arm](SHAPES[shape], dtype)
    before = _resident_now()
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _resident_now() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def measure(name: str, dtype: str, steps: int) -> dict[str, Any]:
    """Both arms at one shape, step by step in turn."""
    shape = SHAPES[name]
    models, made = {}, {}
    for arm, build in ARMS.items():
        models[arm], made[arm] = build(shape, dtype)
    arms = {arm: lambda _, step=step: cpu_seconds(step) for arm, step in made.items()}
    seconds = in_turn(arms, steps, warm_up=WARM_UP)
    ours, theirs = (statistics.median(seconds[arm]) for arm in ("ours", "theirs"))
    flops = {arm: flops_of(step) for arm, step in made.items()}
    return {
        "shape": name,
        "dtype": dtype,
        "ours_cpu_s": ours,
        "theirs_cpu_s": theirs,
        **ratios(seconds["ours"], seconds["theirs"]),
        "ours_gflops": flops["ours"] / ours / 1e9,
        "theirs_gflops": flops["theirs"] / theirs / 1e9,
        "matmul_gflops": matmul_gflops(models["ours"], made["ours"], dtype),
        "ours_gflop": flops["ours"] / 1e9,
        "theirs_gflop": flops["theirs"] / 1e9,
        "ours_parameters": sum(p.numel() for p in models["ours"].parameters()),
        "theirs_parameters": sum(p.numel() for p in models["theirs"].parameters()),
        "ours_peak_mib": peak_growth("ours", name, dtype),
        "theirs_peak_mib": peak_growth("theirs", name, dtype),
    }


def table(cases: list[dict[str, Any]]) -> Table:
    """A row a case."""
    names = ("shape", "dtype", "parameters, M", "ours, ms", "BLT, ms", "ratio (min … max)", "GFLOP a step", "GFLOP/s")
    found = Table(
        *names, "of matmul peak", "peak, MiB", title="one training step, one thread: ours / transformers' BLT"
    )
    for case in cases:
        found.add_row(
            case["shape"],
            case["dtype"],
            f"{case['ours_parameters'] / 1e6:.2f} / {case['theirs_parameters'] / 1e6:.2f}",
            f"{1e3 * case['ours_cpu_s']:.1f}",
            f"{1e3 * case['theirs_cpu_s']:.1f}",
            shown(case),
            f"{case['ours_gflop']:.1f} / {case['theirs_gflop']:.1f}",
            f"{case['ours_gflops']:.0f} / {case['theirs_gflops']:.0f}",
            f"{case['ours_gflops'] / case['matmul_gflops']:.0%} of {case['matmul_gflops']:.0f}",
            f"{case['ours_peak_mib']:.0f} / {case['theirs_peak_mib']:.0f}",
        )
    return found


def main() -> int:
    """Prints a table; with --json one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    settle(1)
    warnings.simplefilter("ignore")
    cases = [measure(shape, dtype, asked.steps) for shape in asked.shapes for dtype in asked.dtypes]
    return finish(table(cases), {"cases": cases}, as_json=asked.json, width=190)


if __name__ == "__main__":
    sys.exit(main())
