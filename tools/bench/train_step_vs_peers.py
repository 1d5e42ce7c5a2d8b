"""Forward, loss and backward of text and latents in one trunk, ours against other libraries: CPU seconds a step.

    python tools/bench/train_step_vs_peers.py [--steps 15] [--peers transfusion-pytorch vibevoice ...]
        [--dtypes float32 bfloat16] [--json]

One process, one thread, step by step in turn. Rows of 96 bytes, 64 latents and (transfusion-pytorch) 96 bytes more;
latents are given to both, the optimizer is left out. Packing a row and drawing its noise are in the step on both sides.

Ours is the demo's model with one medium, its feed-forward as wide as gives it the peer's number of parameters, and
patches of 4 bytes and of 4 latents. Controls stand beside it: without tables of n-grams, whose parameters cost no
products (the trunk is wider instead); under `next_latent`, which is VibeVoice's objective, with four noises a latent as
there; with patches of one and latents that stand noised alone, where our trunk sees as many positions as theirs; this
without tables; and VibeVoice with one noise a latent. `cases` of the JSON line holds what is no control, `controls` the
others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import cpu_seconds, finish, in_turn, ratios, shown
from peers import LATENTS, PEERS, ROWS, TEXT, Built, require
from rich.table import Table
from torch import Tensor, nn
from training_steps import Step, flops_of, matmul_gflops, training_step

from matformer.config.load import load_run
from matformer.config.schema import MediaConfig, MediaContext, ModelConfig
from matformer.data.packing import Piece, Place, document_positions, draw_training_noise, pack_batch
from matformer.data.patching import StaticPatcher
from matformer.data.sources import Document, media_span, text_span
from matformer.door import door
from matformer.hosts.plain import PlainTrunk
from matformer.losses.total import total_loss
from matformer.model import Matformer
from matformer.parallel.process import settle

WARM_UP = 2
DEMO = Path(__file__).parents[2] / "configs" / "run" / "demo.yaml"
WEIGHTS = {"text": 1.0, "audio": 1.0, "router": 0.1}
NARROWEST, ROUND = 128, 32  # of the feed-forward


@dataclass(frozen=True)
class Way:
    """How ours is configured: units of a patch, of bytes and latents alike; tables of n-grams; the media's keys."""

    patch: int
    tables: bool
    media_context: MediaContext = "clean_copy"
    objective: Literal["flow", "next_latent"] = "flow"


WAYS = {
    "ours": Way(4, tables=True),
    "no tables": Way(4, tables=False),
    "next_latent": Way(4, tables=True, objective="next_latent"),
    "patches of 1": Way(1, tables=True, media_context="noised"),
    "patches of 1, no tables": Way(1, tables=False, media_context="noised"),
}


def model_config(way: Way, peer: str, *, parameters: int) -> ModelConfig:
    """The demo's model with one medium, and with so many parameters."""
    demo = load_run(DEMO).model
    audio = MediaConfig(
        channels=PEERS[peer].channels,
        rank=1,
        patch=way.patch,
        buckets=((LATENTS,),),
        coda_width=demo.media["audio"].coda_width,
        objective=way.objective,
    )
    text = demo.text.model_copy(update={"ngram_rows": PEERS[peer].ngram_rows})
    if not way.tables:
        text = text.model_copy(update={"preludio_ngrams": (), "coda_ngrams": ()})
    atto = demo.atto.model_copy(update={"ffn_width": NARROWEST})
    sizes = {"text": text, "media": {"audio": audio}, "atto": atto, "media_context": way.media_context}
    narrow = demo.model_copy(update=sizes)
    missing = parameters - count(Matformer(narrow, trunk=PlainTrunk(atto)))
    wider = max(0, round(missing / (3 * atto.width * atto.layers * ROUND))) * ROUND
    return narrow.model_copy(update={"atto": atto.model_copy(update={"ffn_width": NARROWEST + wider})})


def count(model: nn.Module) -> int:
    """Parameters that learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def ours(way: Way, peer: str, *, parameters: int) -> Built:
    """Our model, and its loss over as many documents as their rows, of the same units."""
    torch.manual_seed(0)
    config = model_config(way, peer, parameters=parameters)
    trunk = PlainTrunk(config.atto)
    model = Matformer(config, trunk=trunk)
    documents = [
        document(number, config, patcher=StaticPatcher(way.patch), texts=PEERS[peer].texts) for number in range(ROWS)
    ]
    rows = [[Piece(one, Place(), Place(len(one.spans)))] for one in documents]
    length = max(document_positions(one, model=config) for one in documents)
    step = 0

    def loss() -> Tensor:
        nonlocal step
        step += 1
        draws = [
            draw_training_noise(seed=0, step=step, lane=lane, blind_probability=0.0, time_shift=1.0)
            for lane in range(ROWS)
        ]
        batch = pack_batch(rows, draws, model=config, sequence_latents=length)
        return total_loss(model(batch), counts=batch.counts(), weights=WEIGHTS)

    return Built(model, loss, trunk.final_norm)


def document(number: int, config: ModelConfig, *, patcher: StaticPatcher, texts: int) -> Document:
    """A text, a generated span of latents and, if there are two texts, another one."""
    dice = np.random.default_rng(number)
    media = config.media["audio"]
    latent = dice.standard_normal((media.channels, LATENTS)).astype(np.float32)
    spans = (text_span(dice.bytes(TEXT), patcher), media_span(latent, "audio", media=media, role="generate"))
    more = tuple(text_span(dice.bytes(TEXT), patcher) for _ in range(texts - 1))
    return Document(str(number), (*spans, *more))


@dataclass(frozen=True)
class Arm:
    """A model, its step, and what its step showed: positions of a row of the trunk, FLOPs."""

    model: nn.Module
    step: Step
    positions: int
    flops: int


def arm(built: Built, dtype: str) -> Arm:
    """The arm of a model, after a first step."""
    seen: list[int] = []
    hook = built.last_norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    step = training_step(built.model, built.loss, dtype=dtype if built.autocasts else "float32")
    flops = flops_of(step)
    hook.remove()
    idle = [name for name, one in built.model.named_parameters() if one.requires_grad and one.grad is None]
    assert not idle, f"every parameter that counts has a gradient, but for {idle}"
    return Arm(built.model, step, seen[0], flops)


def measure(name: str, dtype: str, steps: int) -> list[dict[str, Any]]:
    """A row for each way of ours: all of them and the peer at once, step by step in turn."""
    built = PEERS[name].build(dtype)
    arms = {name: arm(built, dtype)}
    parameters = count(built.model)
    for way, settings in WAYS.items():
        arms[way] = arm(ours(settings, name, parameters=parameters), dtype)
    seconds = in_turn({key: partial(timed, one) for key, one in arms.items()}, steps, warm_up=WARM_UP)
    peak = matmul_gflops(arms["ours"].model, arms["ours"].step, dtype)
    theirs, rows = arms[name], []
    for way in WAYS:
        one = arms[way]
        our_seconds, their_seconds = (statistics.median(seconds[key]) for key in (way, name))
        rows.append(
            {
                "peer": name,
                "ours": way,
                "dtype": dtype,
                "ours_cpu_s": our_seconds,
                "theirs_cpu_s": their_seconds,
                **ratios(seconds[way], seconds[name]),
                "ours_parameters": count(one.model),
                "theirs_parameters": parameters,
                "ours_positions": one.positions,
                "theirs_positions": theirs.positions,
                "ours_gflop": one.flops / 1e9,
                "theirs_gflop": theirs.flops / 1e9,
                "ours_gflops": one.flops / our_seconds / 1e9,
                "theirs_gflops": theirs.flops / their_seconds / 1e9,
                "matmul_gflops": peak,
            }
        )
    return rows


def timed(one: Arm, _: int) -> float:
    """CPU seconds of a step."""
    return cpu_seconds(one.step)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A row a case or control."""
    found = Table(
        *("peer", "ours", "dtype", "parameters, M", "positions", "GFLOP", "ours, ms", "theirs, ms"),
        *("ratio (min … max)", "GFLOP/s", "of matmul"),
        title=f"one training step of {ROWS} rows, one thread: ours / theirs",
    )
    for row in rows:
        found.add_row(
            row["peer"],
            row["ours"],
            row["dtype"],
            f"{row['ours_parameters'] / 1e6:.2f} / {row['theirs_parameters'] / 1e6:.2f}",
            f"{row['ours_positions']} / {row['theirs_positions']}",
            f"{row['ours_gflop']:.1f} / {row['theirs_gflop']:.1f}",
            f"{1e3 * row['ours_cpu_s']:.0f}",
            f"{1e3 * row['theirs_cpu_s']:.0f}",
            shown(row),
            f"{row['ours_gflops']:.0f} / {row['theirs_gflops']:.0f}",
            f"{row['ours_gflops'] / row['matmul_gflops']:.0%} of {row['matmul_gflops']:.0f}",
        )
    return found


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; with --json one JSON line last. 2 if a peer is not installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    for name in asked.peers:
        require(name)
    settle(1)
    warnings.simplefilter("ignore")
    rows = [row for name in asked.peers for dtype in asked.dtypes for row in measure(name, dtype, asked.steps)]
    cases = [row for row in rows if row["ours"] == "ours" and not PEERS[row["peer"]].control]
    result = {"cases": cases, "controls": [row for row in rows if row not in cases]}
    return finish(table(rows), result, as_json=asked.json, width=190)


if __name__ == "__main__":
    sys.exit(main())
