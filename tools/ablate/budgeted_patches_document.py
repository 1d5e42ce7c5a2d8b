"""Results of the ablation of budgets -> a document with tables, and a picture beside it.

    python tools/ablate/budgeted_patches_document.py runs/ablation/budget/results.json --out docs/results/new.md

Reads nothing but the results, so that the words can be changed without a run.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper import COLOURS, MUTED, SHORT_STEPS, Paper, Results, dress, short_runs
from tables import CLEAR, markdown, sorted_out, spread, with_spread

CLEAN = {
    "full": "every patch",
    "half": "a budget of half the patches",
    "quarter": "a quarter",
    "ninth": "12 %, leaves of up to 8 x 8 patches",
    "coarse": "patches of 2 x 2 cells, no tree",
    "blank": "captions without pictures",
}
"""Arms whose clean copies differ; the first is the reference."""
NOISED = {
    "grid": "every patch",
    "tree_half": "own trees of half the patches",
    "tree_quarter": "own trees of a quarter",
    "shuffled_quarter": "trained in other pictures' trees of a quarter",
    "coarse_grid": "patches of 2 x 2 cells, no tree",
}
"""Arms whose noised copies differ; the first is the reference."""
TREES = {"flow": "none", "own": "its own", "predicted": "predicted", "shuffled": "another picture's"}
"""Below, a run is called short."""
DIGITS = 4


def render(results: Results, *, picture: str) -> str:
    """The whole document."""
    parts = ["# A budget of latents on the demo's pictures", _how(results), f"![Loss over latents]({picture})"]
    if "full" in results["arms"]:
        parts += ["## Clean copies: captions of given pictures", clean_table(results), came_out(results, "captions")]
        parts += ["The same runs draw pictures, whose noised copies keep every patch:", flow_table(results)]
    if "grid" in results["arms"]:
        parts += ["## Noised copies: pictures behind their captions", noised_table(results)]
        parts += [came_out(results, "predicted"), came_out(results, "flow", of=NOISED)]
    return "\n\n".join([*(part for part in parts if part), "## How it was measured", _measuring(results)]) + "\n"


def clean_table(results: Results) -> str:
    """A row an arm: latents saved, bits a byte of captions, and how far above every patch's."""
    head = ["clean copies", "", "latents of a picture", "saved", "latents a document", "bits a byte"]
    rows = [
        [*_named(arm, CLEAN), *_latents(results, arm), *_scores(results, arm, "captions")]
        for arm in CLEAN
        if arm in results["arms"]
    ]
    return markdown([*head, *_difference_head("full")], rows)


def flow_table(results: Results) -> str:
    """A row an arm: the flow loss of pictures."""
    rows = [[*_named(arm, CLEAN), *_scores(results, arm, "flow")] for arm in CLEAN if arm in results["arms"]]
    return markdown(["clean copies", "", "flow loss", *_difference_head("full")], rows)


def noised_table(results: Results) -> str:
    """A row an arm and a tree that its pictures are scored in."""
    head = ["noised copies", "", "latents of a picture", "saved", "latents a document", "scored in the tree"]
    rows = []
    for arm in (arm for arm in NOISED if arm in results["arms"]):
        for part, words in TREES.items():
            if part in results["losses"][arm]:
                scores = _scores(results, arm, part)
                rows.append([*_named(arm, NOISED), *_latents(results, arm), words, *scores])
    return markdown([*head, "flow loss", *_difference_head("grid")], rows)


def came_out(results: Results, part: str, *, of: Mapping[str, str] | None = None) -> str:
    """In words: which arms lost or won in this part, as far as that is clear; empty where none has it."""
    paired = {
        arm: parts[part] for arm, parts in results["differences"].items() if part in parts and (of is None or arm in of)
    }
    if not paired:
        return ""
    reference = "full" if next(iter(paired)) in CLEAN else "grid"
    said = {"captions": "Captions", "predicted": "In predicted trees", "flow": "Without trees"}[part]
    return f"{said}: {sorted_out(paired, reference=reference)} (from {CLEAR:g} standard errors on, if all seeds agree)."


def _named(arm: str, words: Mapping[str, str]) -> list[str]:
    return [f"`{arm}`", words[arm]]


def _latents(results: Results, arm: str) -> list[str]:
    facts, whole = results["arms"][arm], results["arms"]["full" if arm in CLEAN else "grid"]
    saved = 1 - facts["latents"] / whole["latents"]
    return [f"{facts['latents']:.1f}", f"{saved:.0%}", f"{facts['latents_a_document']:.1f}"]


def _scores(results: Results, arm: str, part: str) -> list[str]:
    """The loss, and the difference with its errors; no difference of the reference."""
    loss = with_spread(results["losses"][arm][part], DIGITS)
    paired = results["differences"].get(arm, {}).get(part)
    return [loss, *(_difference(paired) if paired else ["", "", ""])]


def _difference_head(reference: str) -> list[str]:
    return [f"minus `{reference}` (s.e.)", "seed by seed, ± s.e. over documents", "spread over seeds"]


def _difference(paired: Mapping[str, Any]) -> list[str]:
    stderr = "" if paired["stderr"] is None else f" ({paired['stderr']:.{DIGITS}f})"
    seeds = [
        f"{value:+.{DIGITS}f}" + ("" if error is None else f" ± {error:.{DIGITS}f}")
        for value, error in zip(paired["by_seed"], paired["stderr_by_seed"], strict=True)
    ]
    return [f"{paired['value']:+.{DIGITS}f}{stderr}", ", ".join(seeds), f"{spread(paired['by_seed']):.{DIGITS}f}"]


def _how(results: Results) -> str:
    made, seeds = results["made"], len(results["made"]["seeds"])
    first = next(iter(results["arms"].values()))
    said = (
        f"`{made['command']}`, {made['date']}. {first['parameters'] / 1e6:.1f} M parameters over the demo's pictures "
        f"alone, {first['patches']} patches each; {made['steps']} steps, {seeds} seed{'s' if seeds != 1 else ''}. "
        "Every arm of a kind has the same documents in each step, each a row, whatever they take in latents."
    )
    return said + short_runs(
        "what a small trunk loses while it begins to learn, not what a long one does.",
        short=made["steps"] < SHORT_STEPS,
    )


def _measuring(results: Results) -> str:
    made, arms = results["made"], results["arms"]
    seconds = sum(second for facts in arms.values() for second in facts["seconds"])
    steps = ", ".join(f"`{arm}` {statistics.fmean(facts['seconds_a_step']):.3f}" for arm, facts in arms.items())
    captions = (
        f"{made['captions']} captions ({made['bytes']:.0f} bytes) of given pictures and " if "captions" in made else ""
    )
    lines = [
        f"- **Held out**: {captions}{made['pictures']} pictures behind their captions at eight levels of noise, the "
        "same for every arm; the last weights.",
        "- **minus** is the difference document by document, each document's averaged over seeds first; its standard "
        "error is that over documents and that over seeds, as the root of the sum of squares. ± beside a loss and "
        "*spread over seeds* are standard deviations.",
        "- **Trees**: a medium's own tells the denoiser where detail is, which no sampler knows; the predicted one is "
        "what a sampler stands in; another picture's says what a wrong tree costs. All three by the same weights.",
        f"- **CPU seconds a step**, loading included, as measured on a shared machine: {steps}. {seconds:.0f} in all.",
        f"- {made['machine']}, torch {made['torch']}, one thread a run.",
    ]
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """Captions above `full` over latents of a picture; flow loss above `grid`, a row an arm and tree."""
    figure = Figure(figsize=(12, 4.0), layout="constrained", dpi=100)
    left, right = figure.subplots(1, 2)
    _captions(left, results)
    _flows(right, results)
    return figure


def _captions(axes: Axes, results: Results) -> None:
    for arm in (arm for arm in CLEAN if "captions" in results["differences"].get(arm, {})):
        paired, place = results["differences"][arm]["captions"], results["arms"][arm]["latents"]
        axes.errorbar(place, paired["value"], yerr=paired["stderr"] or 0.0, fmt="o", color=COLOURS[0], markersize=4)
        axes.plot([place] * len(paired["by_seed"]), paired["by_seed"], ".", color=MUTED, ms=3)
        axes.annotate(arm, (place, paired["value"]), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    axes.set_xlabel("latents of a picture", fontsize=9, color=MUTED)
    axes.set_ylabel("captions above full, bits a byte", fontsize=9, color=MUTED)
    axes.margins(x=0.15)
    dress(axes)


def _flows(axes: Axes, results: Results) -> None:
    rows = [(arm, part) for arm in NOISED for part in TREES if part in results["differences"].get(arm, {})]
    for place, (arm, part) in enumerate(rows):
        paired, colour = results["differences"][arm][part], COLOURS[list(TREES).index(part)]
        axes.errorbar(paired["value"], place, xerr=paired["stderr"] or 0.0, fmt="o", color=colour, markersize=4)
        axes.plot(paired["by_seed"], [place] * len(paired["by_seed"]), ".", color=MUTED, ms=3)
    axes.axvline(0.0, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [arm if part == "flow" else f"{arm}, {TREES[part]}" for arm, part in rows])
    axes.invert_yaxis()
    axes.set_xlabel("flow loss above grid, by the tree it is scored in", fontsize=9, color=MUTED)
    dress(axes)


PAPER = Paper(render, draw, out=Path("docs/results/budgeted_patches.md"), about=__doc__)
write, main = PAPER.write, PAPER.main


if __name__ == "__main__":
    sys.exit(main())
