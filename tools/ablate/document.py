"""Results of the ablation of text front ends -> a document with two tables, and a picture beside it.

    python tools/ablate/document.py runs/ablation/text/results.json --out docs/results/text_frontends.md

Reads nothing but the results, so that the words can be changed without a run.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper import COLOURS, MUTED, Paper, Results, dress, line_with_range, short_runs
from tables import CLEAR, difference_cell, markdown, signs_cell, sorted_out, with_spread

Runs = Mapping[str, Sequence[Mapping[str, Any]]]

TABLES = {"bytes": "Equal bytes seen", "flops": "Equal FLOPs"}
HEAD = (
    "arm",
    "symbols a latent",
    "parameters, M",
    "MFLOPs a byte (Atto's share)",
    "steps",
    "MB seen",
    "TFLOPs",
    "bits per byte",
    "minus static's (stderr)",
    "seeds above / below static",
    "CPU s a MB",
)
BOUNDED = ("masked_diffusion", "block_diffusion")
"""Arms of which an upper bound is known: below the reference says something, above it does not."""
SHORT = 20.0
"""Bytes a parameter below which a run is called short."""


def render(results: Results, *, picture: str) -> str:
    """The whole document."""
    parts = ["# Text front ends", _how(results), f"![Held-out bits per byte]({picture})"]
    for name, title in TABLES.items():
        runs = results["tables"][name]
        parts += [f"## {title}", table(results, runs), came_out(results, runs)]
    return "\n\n".join([*parts, "## How it was measured", _measured(results)]) + "\n"


def table(results: Results, runs: Runs) -> str:
    """One row an arm, best first, and the baselines below."""
    order = sorted(runs, key=lambda arm: _mean(runs[arm], "bits_per_byte"))
    rows = [_row(results, arm, runs) for arm in order]
    for name, value in results["baselines"].items():
        blank = [""] * (len(HEAD) - HEAD.index("bits per byte") - 1)
        rows.append([f"*{name}*", *[""] * (HEAD.index("bits per byte") - 1), f"{value:.3f}", *blank])
    return markdown(HEAD, rows)


def came_out(results: Results, runs: Runs) -> str:
    """In words: who is clearly below and above the reference, and where everybody stands beside order 2."""
    reference = results["reference"]
    paired = results["paired"][_key(results, runs)]
    said = sorted_out({arm: paired[arm] for arm in runs if arm != reference}, reference=reference)
    best = min(runs, key=lambda arm: _mean(runs[arm], "bits_per_byte"))
    sentence = f"Lowest: `{best}`, {_mean(runs[best], 'bits_per_byte'):.3f} bits per byte."
    if said:
        sentence += f" {said} ({CLEAR:g} standard errors and one sign under all seeds)."
    beaten = [name for name, value in results["baselines"].items() if value < _mean(runs[best], "bits_per_byte")]
    return sentence + (f" Without a model, lower than every arm: {', '.join(beaten)}." if beaten else "")


def _row(results: Results, arm: str, runs: Runs) -> list[str]:
    facts, own = results["arms"][arm], runs[arm]
    return [
        f"`{arm}`",
        f"{facts['symbols_a_latent']:.2f}",
        f"{facts['parameters'] / 1e6:.2f}",
        f"{facts['flops_a_byte'] / 1e6:.2f} ({facts['atto_share']:.0%})",
        f"{_mean(own, 'steps'):.0f}",
        f"{_mean(own, 'bytes') / 1e6:.3f}",
        f"{_mean(own, 'flops') / 1e12:.2f}",
        f"{'≤ ' if arm in BOUNDED else ''}{with_spread([run['bits_per_byte'] for run in own])}",
        *_difference(results, arm, runs),
        f"{facts['cpu_seconds_a_mb']:.0f}",
    ]


def _difference(results: Results, arm: str, runs: Runs) -> tuple[str, str]:
    if arm == results["reference"]:
        return "", ""
    paired = results["paired"][_key(results, runs)][arm]
    return difference_cell(paired), signs_cell(paired)


def _key(results: Results, runs: Runs) -> str:
    return next(name for name in TABLES if results["tables"][name] is runs)


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _how(results: Results) -> str:
    made, reference = results["made"], results["arms"][results["reference"]]
    asked = made["bytes"]
    said = (
        f"`{made['command']}`, {made['date']}. Ways to hand text to one and the same Atto, each with the same bytes of "
        f"context ({reference['bytes_a_sequence']:.0f} a sequence) and about four symbols a latent (`space` as it "
        f"comes), {len(made['seeds'])} seed{'s' if len(made['seeds']) != 1 else ''}, on the demo's text."
    )
    steps = statistics.fmean(run["steps"] for run in results["tables"]["bytes"][results["reference"]])
    return said + short_runs(
        f"{asked / 1e6:g} MB of text in {steps:.0f} steps for {reference['parameters'] / 1e6:.1f} M parameters. They "
        "rank front ends by how fast they begin to learn; what a long run would say is open.",
        short=asked < SHORT * reference["parameters"],
    )


def _measured(results: Results) -> str:
    made = results["made"]
    shares = [facts["unseen_share"] for facts in results["arms"].values()]
    lines = [
        f"- **Held out**: the same {made['heldout_documents']:,} whole documents ({made['heldout_bytes'] / 1e3:.0f} "
        "kB) for every arm, `<end>` (and what an arm says of its patches' ends) paid for, divided by raw bytes. The "
        "last weights, not their average: the schedule (warm-up, constant, decay) ends inside every run, whatever its "
        "number of steps. Diffusion arms (≤) have an upper bound, in 16 draws, where the others have a likelihood: "
        "that they are above says less than that they are below.",
        "- **±** is the standard deviation over seeds. **minus static's** is the difference document by document, each "
        "document's averaged over seeds first; its standard error is that over documents and that over seeds, as the "
        "root of the sum of squares; negative is better.",
        f"- **The picture's curves** are of the first {made['curve_bytes'] / 1e3:.0f} kB of the held-out text: other "
        "numbers than the tables'.",
        "- **FLOPs** of a training step, forward and backward, by torch's FlopCounterMode: local models, Atto, heads, "
        "router, attention as it is computed; pooling and the Coda's reading in closed form "
        f"({min(shares):.1%} to {max(shares):.1%} of the whole); the entropy patcher's own model forward. Lookups and "
        "sums of embeddings have no products; norms, softmax and the optimizer are not counted.",
        f"- **Equal FLOPs**: the steps of an arm are those of `{results['reference']}` times the ratio of a step's "
        "FLOPs, each run with its own whole schedule; the optimizer's settings are the same for all.",
        f"- **CPU s a MB**: of training with one thread, the patcher included, without evaluation. {made['machine']}, "
        f"torch {made['torch']}.",
        "- **Vocabulary** of the arms with pieces: "
        + (f"{made['vocabulary']:,}" if made["vocabulary"] else "none")
        + "; **thresholds**: "
        + (", ".join(f"`{kind}` {value:g} nats" for kind, value in made["thresholds"].items()) or "none")
        + ". Both are picked for the wanted mean on 1 MB of train that the vocabulary is not learned from.",
        "- **Not in the bytes seen**: the vocabulary is learned from 8 MB of train, the entropy model (its training is "
        "not in the FLOPs either) from 3 MB. After so few tokens most rows of a large vocabulary are hardly trained.",
    ]
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """Held-out curves over bytes (runs of equal bytes) and over FLOPs (runs of equal FLOPs)."""
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2, sharey=True)
    _curves(left, results, results["tables"]["bytes"], scale={arm: 1e-6 for arm in results["arms"]})
    left.set_xlabel("MB of text seen", fontsize=9, color=MUTED)
    left.set_ylabel("held-out bits per byte", fontsize=9, color=MUTED)
    _curves(
        right,
        results,
        results["tables"]["flops"],
        scale={arm: facts["flops_a_byte"] / 1e12 for arm, facts in results["arms"].items()},
    )
    right.set_xlabel("TFLOPs of training", fontsize=9, color=MUTED)
    right.legend(fontsize=8, frameon=False)
    return figure


def _curves(axes: Axes, results: Results, runs: Runs, *, scale: Mapping[str, float]) -> None:
    """Means over seeds, and the range between them."""
    for colour, arm in zip(COLOURS, results["arms"], strict=False):
        if arm not in runs:
            continue
        points = list(zip(*(run["curve"] for run in runs[arm]), strict=False))  # one entry an evaluation
        places = [scale[arm] * statistics.fmean(at for at, _ in seeds) for seeds in points]
        values = [[value for _, value in seeds] for seeds in points]
        line_with_range(axes, places, values, colour=colour, label=arm)
    dress(axes)


PAPER = Paper(render, draw, out=Path("docs/results/text_frontends.md"), about=__doc__)
write, main = PAPER.write, PAPER.main


if __name__ == "__main__":
    sys.exit(main())
