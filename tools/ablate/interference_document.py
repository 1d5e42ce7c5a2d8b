"""Results of the interference ablation -> a document with tables, and a picture beside it.

    python tools/ablate/interference_document.py runs/ablation/interference/results.json --out docs/results/new.md

Reads nothing but the results, so that the words can be changed without a run.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper import COLOURS, MUTED, SHORT_STEPS, Paper, Results, dress, line_with_range, short_runs
from tables import CLEAR, clear_over_seeds, difference_cell, markdown, signs_cell, spread, verdict, with_spread

ARMS = {
    "text": "text only",
    "image": "pictures only",
    "audio": "sounds only",
    "joint": "joint: media behind their captions",
    "joint_apart": "joint: every document of one modality",
}
PARTS = {
    "text": "text, bits per byte",
    "image": "pictures, flow loss",
    "audio": "sounds, flow loss",
    "image captioned": "pictures behind captions",
    "audio captioned": "sounds behind captions",
}
UNITS = {"text": "kB of text", "image": "noised patches of pictures", "audio": "noised patches of sounds"}
PAIRS = ("text_media", "text_image", "text_audio", "image_audio", "text_router")
SELVES = ("text", "image", "audio", "media")
WHOLE = "atto"
"""Below, a run is called short."""
SIDES = {"below": "helped", "above": "hurt", "not clearly apart from": "neither"}


def render(results: Results, *, picture: str) -> str:
    """The whole document."""
    parts = [
        "# Interference: text by autoregression and media by diffusion in one trunk",
        _how(results),
        f"![Differences of losses, cosines and norm ratios of gradients]({picture})",
        "## What each arm saw",
        units_table(results),
        "## Held-out losses",
        losses_table(results),
        came_out(results),
    ]
    for arm in results["gradients"]:
        parts += [f"## Gradients on the Atto's layers, `{arm}`", cosines_table(results, arm)]
        parts += [ratios_table(results, arm), gradients_came_out(results, arm)]
    return "\n\n".join([*parts, "## How it was measured", _measuring(results)]) + "\n"


def units_table(results: Results) -> str:
    """Units of each modality that a run trained on, means over seeds."""
    rows = []
    for arm, facts in results["arms"].items():
        cells = []
        for name in UNITS:
            seen = [one[name] for one in facts["units"] if name in one]
            cells.append(f"{statistics.fmean(seen) / (1000 if name == 'text' else 1):,.0f}" if seen else "")
        rows.append([f"`{arm}`", *cells, f"{facts['parameters'] / 1e6:.2f}"])
    return markdown(["arm", *UNITS.values(), "parameters, M"], rows)


def losses_table(results: Results) -> str:
    """A row a part: every arm's loss, and the joint arms' above the single arm's."""
    joint = list(results["differences"])
    head = ["held out", "single", *(f"`{arm}`" for arm in joint)]
    head += [f"`{arm}` minus single (s.e.)" for arm in joint]
    head += [f"seeds above / below, `{arm}`" for arm in joint]
    rows = []
    for part, words in PARTS.items():
        if not any(part in results["losses"][arm] for arm in joint):
            continue
        cells = [results["losses"][arm].get(part) for arm in (part.split()[0], *joint)]
        single = results["losses"][part.split()[0]][part.split()[0]]
        shown = [with_spread(values) if values else "" for values in (single, *cells[1:])]
        paired = [parts.get(part) for parts in results["differences"].values()]
        rows.append([words, *shown, *map(difference_cell, paired), *map(signs_cell, paired)])
    return markdown(head, rows)


def came_out(results: Results) -> str:
    """In words: what each modality lost or won beside the others."""
    lines = []
    for arm, parts in results["differences"].items():
        said = [
            f"{PARTS[part].split(',')[0]} {SIDES[verdict(one)]} ({_percent(results, part, one['value'])})"
            for part, one in parts.items()
        ]
        lines.append(f"- `{arm}`: {', '.join(said)}.")
    rule = f"Helped and hurt are said from {CLEAR:g} standard errors on and one sign under all seeds."
    return "\n".join([*lines, "", rule])


def cosines_table(results: Results, arm: str) -> str:
    """A row a layer: mean cosines over looks, ± over seeds, and how often text and media pull against each other."""
    pairs = [pair for pair in PAIRS if _values(results, arm, WHOLE, f"{pair}_cosine")]
    head = ["cosine", *(_words(pair) for pair in pairs), "text–media below 0", "text–media without noise"]
    rows = []
    for place in places(results, arm):
        cells = [with_spread(_means(results, arm, place, f"{pair}_cosine")) for pair in pairs]
        looks = [value for seed in _values(results, arm, place, "text_media_cosine") for value in seed]
        negative = f"{sum(one < 0 for one in looks)} of {len(looks)}"
        rows.append([_place(place), *cells, negative, _number(without_noise(results, arm, place, "text", "media"))])
    return markdown(head, rows)


def ratios_table(results: Results, arm: str) -> str:
    """A row a layer: norm ratios (geometric means) and what half a batch's gradient says of the other half's."""
    head = ["norms, self-cosines", "text / media", "text / image", "text / audio"]
    head += [f"{name} with itself" for name in SELVES]
    rows = []
    for place in places(results, arm):
        ratios = []
        for other in ("media", "image", "audio"):
            logs = _means(results, arm, place, f"text_{other}_norm_ratio", of=math.log)
            ratios.append(_geometric(logs))
        selves = [with_spread(_means(results, arm, place, f"{name}_self_cosine"), 2) for name in SELVES]
        rows.append([_place(place), *ratios, *selves])
    return markdown(head, rows)


def gradients_came_out(results: Results, arm: str) -> str:
    """In words: the sign of text against media over all layers, beside its spread over seeds."""
    means = _means(results, arm, WHOLE, "text_media_cosine")
    mean, stderr = statistics.fmean(means), spread(means) / math.sqrt(len(means))
    clear = abs(mean) > clear_over_seeds(len(means)) * stderr and all(one * mean > 0 for one in means)
    side = ("agree" if mean > 0 else "pull apart") if clear else "are not clearly apart from orthogonal"
    return (
        f"Over all layers, text and media {side}: mean cosine {mean:+.4f} (s.e. over seeds {stderr:.4f}); with the "
        f"noise of batches of this size taken out, {_number(without_noise(results, arm, WHOLE, 'text', 'media'))}."
    )


def without_noise(results: Results, arm: str, place: str, first: str, second: str) -> float | None:
    """The cosine divided by the largest that the noise of both gradients lets one expect; None where all is noise.

    A gradient that agrees with itself over two halves of a batch to r has reliability 2 r / (1 + r) over the whole
    (Spearman and Brown, 1910), and noise weakens a correlation by the root of both reliabilities (Spearman, 1904).
    """
    cosine = statistics.fmean(_means(results, arm, place, f"{first}_{second}_cosine"))
    halves = [statistics.fmean(_means(results, arm, place, f"{name}_self_cosine")) for name in (first, second)]
    if min(halves) <= 0:
        return None
    reliabilities = [2 * half / (1 + half) for half in halves]
    return cosine / math.sqrt(math.prod(reliabilities))


def places(results: Results, arm: str) -> list[str]:
    """Layers in their order, and all of them together."""
    keys = {key.split("/")[1] for run in results["gradients"][arm] for row in run for key in row if "/" in key}
    return [*sorted(keys - {WHOLE}), WHOLE]


def _values(results: Results, arm: str, place: str, what: str) -> list[list[float]]:
    """Of each seed, what it wrote on the way."""
    key = f"gradients/{place}/{what}"
    found = [[row[key] for row in run if row.get(key) is not None] for run in results["gradients"][arm]]
    return [seed for seed in found if seed]


def _means(results: Results, arm: str, place: str, what: str, *, of: Any = float) -> list[float]:  # noqa: ANN401
    """A mean a seed."""
    return [statistics.fmean(of(one) for one in seed) for seed in _values(results, arm, place, what)]


def _geometric(logs: Sequence[float]) -> str:
    return f"{math.exp(statistics.fmean(logs)):.2f} ×/÷ {math.exp(spread(logs)):.2f}"


def _percent(results: Results, part: str, value: float) -> str:
    single = part.split()[0]
    return f"{100 * value / statistics.fmean(results['losses'][single][single]):+.1f} %"


def _number(value: float | None) -> str:
    return "all noise" if value is None else f"{value:+.3f}"


def _words(pair: str) -> str:
    return pair.replace("_", "–")


def _place(place: str) -> str:
    return "all layers" if place == WHOLE else f"layer {int(place.removeprefix('layer_'))}"


def _how(results: Results) -> str:
    made = results["made"]
    seeds, facts = len(made["seeds"]), results["arms"]
    arms = "; ".join(f"`{arm}` ({ARMS[arm]})" for arm in facts)
    first = next(arm for arm in facts if arm.startswith("joint"))
    said = (
        f"`{made['command']}`, {made['date']}. Arms: {arms}. A step of a joint arm sees as many units of each modality "
        f"as the three single arms in a step of theirs, and all take {made['steps']} steps; {seeds} "
        f"seed{'s' if seeds != 1 else ''}, the demo's text, pictures and sounds."
    )
    return said + short_runs(
        f"{made['steps']} steps for {facts[first]['parameters'] / 1e6:.1f} M parameters. They say what happens while a "
        "small trunk begins to learn; what a long run would say is open.",
        short=made["steps"] < SHORT_STEPS,
    )


def _measuring(results: Results) -> str:
    made = results["made"]
    lines = [
        "- **Equal units**: the tool compares bytes and noised patches that each run wrote into its metrics, seed by "
        "seed, and refuses more than 5 % between arms. The single arms' batches are those parts of the joint one: "
        "two sequences of text, one of pictures, one of sounds, against four. Captions are text: the text arm and "
        "`joint_apart` have them as documents of their own. Learning rate, schedule, clipping and the first weights of "
        "whatever an arm shares with another are the same. So a joint step moves the trunk for three losses at once, "
        "at the learning rate at which a single step moves it for one.",
        f"- **Held out**: {made['heldout_documents']} whole documents of text ({made['heldout_bytes'] / 1e3:.0f} kB), "
        f"{made['heldout_image']} pictures and {made['heldout_audio']} sounds, the same for every arm, with the same "
        "noise at eight levels; the last weights. Without a caption, `joint` is asked what it learned from a tenth of "
        "its spans (classifier-free guidance), the other arms from all: that row is not a fair comparison for `joint`, "
        "and behind its captions it is told what the single arms are not.",
        "- **minus single** is the difference document by document, each document's averaged over seeds first; its "
        "standard error is that over documents and that over seeds, as the root of the sum of squares; negative: the "
        "other modalities help. ± is the standard deviation over seeds.",
        "- **Gradients** are those of each loss alone, weighted as in the step, over the whole global batch, before "
        "the update, on all parameters of a layer of the Atto; each number is the mean over the looks of a run, then "
        "over seeds. `media` is the sum of pictures and sounds; the router (weight 0.1) is a loss of its own.",
        "- **With itself**: the cosine between a loss's gradients over the two halves of the batch. Far below 1, the "
        "gradient of a batch is mostly noise, and its cosine with any other is near 0 whatever the losses want. "
        "*Without noise* divides by the largest cosine that this lets one expect; it is an estimate with an error of "
        "its own, and says nothing where a self-cosine is near 0.",
        "- **Cosines and losses are two questions**: a negative cosine (PCGrad's conflict) says that a small step for "
        "one loss raises the other at this moment; the table of losses says what came of it.",
        f"- {made['machine']}, torch {made['torch']}, one thread a run.",
    ]
    return "\n".join(lines)


def draw(results: Results) -> Figure:
    """Differences of losses in percent, text against media by layer over the run, and their norm ratio."""
    figure = Figure(figsize=(13, 4.0), layout="constrained", dpi=100)
    left, middle, right = figure.subplots(1, 3)
    _bars(left, results)
    arm = next(iter(results["gradients"]))
    _lines(middle, results, arm, what="text_media_cosine")
    _lines(right, results, arm, what="text_media_norm_ratio")
    middle.axhline(0.0, color=MUTED, linewidth=0.8)
    middle.set_ylabel(f"cosine of text and media, {arm}", fontsize=9, color=MUTED)
    right.set_yscale("log")
    right.set_ylabel(f"norm of text / norm of media, {arm}", fontsize=9, color=MUTED)
    right.legend(fontsize=8, frameon=False)
    return figure


def _bars(axes: Axes, results: Results) -> None:
    width = 0.8 / len(results["differences"])
    parts = [part for part in PARTS if any(part in one for one in results["differences"].values())]
    for number, (arm, found) in enumerate(results["differences"].items()):
        for place, part in enumerate(parts):
            if part not in found:
                continue
            single = statistics.fmean(results["losses"][part.split()[0]][part.split()[0]])
            one, scale = found[part], 100 / single
            at = place + number * width
            label = arm if place == 0 else None
            axes.bar(at, scale * one["value"], width * 0.9, color=COLOURS[number], alpha=0.75, label=label)
            axes.errorbar(at, scale * one["value"], yerr=scale * (one["stderr"] or 0.0), color=MUTED, linewidth=1)
            axes.plot([at] * len(one["by_seed"]), [scale * seed for seed in one["by_seed"]], ".", color=MUTED, ms=3)
    axes.axhline(0.0, color=MUTED, linewidth=0.8)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(parts))], [p.replace(" ", "\n") for p in parts])
    axes.set_ylabel("held-out loss above the single arm's, %", fontsize=9, color=MUTED)
    axes.legend(fontsize=8, frameon=False)
    dress(axes)


def _lines(axes: Axes, results: Results, arm: str, *, what: str) -> None:
    """Means over seeds, and the range between them, a line a layer."""
    layers = places(results, arm)[:-1]
    for colour, place in zip(COLOURS, layers, strict=False):
        key = f"gradients/{place}/{what}"
        steps = sorted({row["step"] for run in results["gradients"][arm] for row in run if row.get(key) is not None})
        by_step = [
            [row[key] for run in results["gradients"][arm] for row in run if row["step"] == step and key in row]
            for step in steps
        ]
        line_with_range(axes, steps, by_step, colour=colour, label=_place(place))
    axes.set_xlabel("step", fontsize=9, color=MUTED)
    dress(axes)


PAPER = Paper(render, draw, out=Path("docs/results/interference.md"), about=__doc__)
write, main = PAPER.write, PAPER.main


if __name__ == "__main__":
    sys.exit(main())
