"""One picture of what runs learned, for the README: curves of all of them, samples of the first.

    python tools/draw_demo.py RUN [RUN ...] --out docs/results/demo.png

Runs are finished run folders of one config under several seeds. Curves are held-out numbers of the averaged weights;
dashed lines need no model.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from matformer.observe.sinks import read_metrics

CURVES = (
    ("text: bits per byte", "text/bits_per_byte", (("order-2 bytes", "text/order2"), ("xz -9e", "text/xz"))),
    ("images: flow loss", "image/flow_loss", (("best linear denoiser", "image/gaussian"),)),
    ("audio: flow loss", "audio/flow_loss", (("best linear denoiser, by channel", "audio/gaussian_channel"),)),
    ("router at ends of spans: share right", "router/span_end_accuracy", ()),
)
MUTED, GRID = "#6b7280", "#e5e7eb"


def main() -> int:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    figure = Figure(figsize=(13, 7.4), layout="constrained", dpi=100)
    above, below = _parts(figure, heights=(1, 1.55))
    for axes, curve in zip(above.subplots(1, len(CURVES)), CURVES, strict=True):
        _draw_curve(axes, asked.runs, *curve)
    _draw_samples(below, asked.runs[0])
    figure.savefig(asked.out)
    sys.stdout.write(f"{asked.out}\n")
    return 0


def _parts(
    figure: Figure | SubFigure, *, heights: Sequence[float] = (1,), widths: Sequence[float] = (1,)
) -> list[SubFigure]:
    parts = figure.subfigures(len(heights), len(widths), squeeze=False, height_ratios=heights, width_ratios=widths)  # pyright: ignore
    return np.ravel(np.asarray(parts)).tolist()


def _draw_curve(axes: Axes, runs: list[Path], title: str, key: str, rivals: tuple[tuple[str, str], ...]) -> None:
    for run in runs:
        rows = [row for row in read_metrics(run / "metrics.jsonl") if f"heldout_ema/{key}" in row]
        steps, values = [row["step"] for row in rows], [row[f"heldout_ema/{key}"] for row in rows]
        axes.plot(steps, values, "o-", color="#2563eb", markersize=3, linewidth=1.2, alpha=0.8)
    baselines = _json(runs[0] / "baselines.json")
    lines = [(label, baselines[name]) for label, name in rivals if name in baselines]
    if not rivals:
        lines = [("always the commonest", _json(runs[0] / "evaluation.json")["heldout_ema/router/majority"])]
    for label, value in lines:
        axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(label, (0.98, value), xycoords=("axes fraction", "data"), xytext=(0, 2), fontsize=8, color=MUTED,
                      textcoords="offset points", ha="right")  # fmt: skip
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(axis="y", color=GRID)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_samples(figure: SubFigure, run: Path) -> None:
    samples = _json(run / "samples" / "samples.json")
    pictures, words = _parts(figure, widths=(1.35, 1))
    shown = samples["image"][:8]
    grid = pictures.subplots(3, len(shown), squeeze=False)
    for column, sample in enumerate(shown):
        for row, kind in enumerate(("real", "reconstructed", "generated")):
            axes = grid[row][column]
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color(GRID)
            if column == 0:
                axes.set_ylabel(kind, fontsize=9, color=MUTED)
            if sample[kind]:
                axes.imshow(Image.open(run / "samples" / sample[kind]))
        grid[0][column].set_title("\n".join(textwrap.wrap(sample["caption"], 14)[:3]), fontsize=8)
    lines = [_continued(sample) for sample in samples["text"][:4]]
    said = [f"[picture of {one['truth']}] → {one['generated']}" for one in samples["caption"][:4]]
    text = "\n\n".join("\n".join(textwrap.wrap(line, 74)) for line in [*lines, *said])
    words.text(0.02, 0.97, text.replace("$", r"\$"), fontsize=8.5, va="top", family="DejaVu Sans", linespacing=1.25)


def _continued(sample: dict[str, Any]) -> str:
    """A held-out beginning, and what the model wrote after it; patches that are no UTF-8 by themselves are dots."""
    patches = [patch if isinstance(patch, str) else "·" for patch in sample["patches"][sample["prompt_patches"] :]]
    return f"{sample['label']}: {' '.join(sample['prompt'].split())} ▸ {' '.join(''.join(patches).split())}"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
