"""Results of the ablation of time conditionings -> a document with tables, and a picture beside it.

    python tools/ablate/time_document.py runs/ablation/time/results.json --out docs/results/time_conditioning.md

Reads nothing but the results, so that the words can be changed without a run.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper import COLOURS, MUTED, SHORT_STEPS, Paper, Results, dress, line_with_range, short_runs
from tables import clear_over_seeds, difference_by_seed, difference_cell, markdown, sorted_out, with_spread

from matformer.engine.clean_errors import LOG_SNRS

MEDIA = {"image": "Pictures", "audio": "Sounds"}
"""Below, a run is called short."""


def render(results: Results, *, picture: str) -> str:
    """The whole document."""
    parts = ["# Time conditioning and objectives of media", _how(results), f"![Errors of the clean latent]({picture})"]
    for modality, title in MEDIA.items():
        if _measured(results, f"{modality}/x0_error_snr0"):
            parts += [f"## {title}: held-out errors", errors_table(results, modality), came_out(results, modality)]
    if _measured(results, "samples/image_frechet"):
        parts += ["## Pictures that were drawn", samples_table(results)]
    parts += ["## Text in the joint run, and what a step costs", text_table(results), text_came_out(results)]
    return "\n\n".join([*parts, "## How it was measured", _measuring(results)]) + "\n"


def errors_table(results: Results, modality: str) -> str:
    """Flow loss, errors of the clean latent, the five errors beside the reference's, and whether captions are used."""
    beside = f"beside `{_first(results)}`'s"
    head = ["arm", "flow loss", *(f"log-SNR {snr}" for snr in LOG_SNRS), beside, "captions: gain / s.e."]
    rows = []
    for arm in results["arms"]:
        errors = [with_spread(values_of(results, arm, _error(modality, snr)), 4) for snr in LOG_SNRS]
        flow, z = (_cell(results, arm, key) for key in (f"{modality}/flow_loss", f"captions/{modality}_gain_z"))
        rows.append([f"`{arm}`", flow, *errors, _relative_cell(results, arm, modality=modality), z])
    return markdown(head, rows)


def samples_table(results: Results) -> str:
    """Fréchet distance and top-1 of drawn pictures, real ones in the last row."""
    head = ["arm", "Fréchet distance", "top-1, own captions", "top-1, other captions", "difference (s.e. by concept)"]
    rows = []
    for arm in results["arms"]:
        values = [_cell(results, arm, f"samples/image_{key}") for key in ("frechet", "top1", "top1_shuffled")]
        rows.append([f"`{arm}`", *values, _gain_cell(results, arm)])
    first = results["runs"][next(iter(results["arms"]))][0]
    real = [f"{first[f'heldout/samples/image_{key}']:.3f}" for key in ("frechet_real", "top1_real")]
    rows.append(["*real pictures*", *real, "", ""])
    rows.append(["*the commonest kind*", "", f"{first['heldout/samples/image_top1_majority']:.3f}", "", ""])
    return markdown(head, rows)


def text_table(results: Results) -> str:
    """Bits per byte beside those of the reference under the same objective, and the cost of a step."""
    key = "text/bits_per_byte"
    head = ["arm", "bits per byte", f"minus `{results['reference']}`'s (s.e.)", "parameters, M", "GFLOPs a step"]
    rows = []
    for arm, facts in results["arms"].items():
        reference = _reference(results, arm)
        paired = None if reference in (arm, None) else difference_of(results, arm, reference, key=key)
        cost = [f"{facts['parameters'] / 1e6:.2f}", f"{facts['flops_a_step'] / 1e9:.1f}"]
        seconds = f"{facts['cpu_seconds_a_step']:.2f}"
        rows.append([f"`{arm}`", _cell(results, arm, key), difference_cell(paired), *cost, seconds])
    return markdown([*head, "CPU s a step"], rows)


def came_out(results: Results, modality: str) -> str:
    """In words, for each objective: which conditionings are clearly better or worse than the reference."""
    lines = []
    for objective, reference in _references(results).items():
        paired = {
            arm: relative(results, arm, reference, modality=modality)
            for arm, facts in results["arms"].items()
            if facts["objective"] == objective and arm != reference
        }
        if paired:
            lines.append(f"- {sorted_out(paired, reference=reference)}.")
    best = min(results["arms"], key=lambda arm: relative(results, arm, _first(results), modality=modality)["value"])
    said = f"Smallest errors of the clean latent, all levels together: `{best}`."
    return "\n".join([said, *lines])


def text_came_out(results: Results) -> str:
    """In words: what the conditionings do to text."""
    lines = []
    for objective, reference in _references(results).items():
        paired = {
            arm: difference_of(results, arm, reference, key="text/bits_per_byte")
            for arm, facts in results["arms"].items()
            if facts["objective"] == objective and arm != reference
        }
        if paired:
            lines.append(f"- {sorted_out(paired, reference=reference)}.")
    return "\n".join(lines)


def values_of(results: Results, arm: str, key: str) -> list[float]:
    """A held-out number under each seed; empty if the arm has none."""
    return [run[f"heldout/{key}"] for run in results["runs"][arm] if f"heldout/{key}" in run]


def difference_of(results: Results, arm: str, reference: str, *, key: str) -> dict[str, Any]:
    """As `difference_by_seed`."""
    return difference_by_seed(values_of(results, arm, key), values_of(results, reference, key))


def relative(results: Results, arm: str, reference: str, *, modality: str) -> dict[str, Any]:
    """Mean over log-SNRs of log(error / the reference's error), seed against seed: below 0 is better."""

    def logs(one: str) -> list[float]:
        levels = [values_of(results, one, _error(modality, snr)) for snr in LOG_SNRS]
        return [statistics.fmean(math.log(error) for error in seed) for seed in zip(*levels, strict=True)]

    return difference_by_seed(logs(arm), logs(reference))


def draw(results: Results) -> Figure:
    """A row an objective, a column a modality: errors of the clean latent over those of the first arm."""
    objectives = list(dict.fromkeys(facts["objective"] for facts in results["arms"].values()))
    media = [name for name in MEDIA if _measured(results, f"{name}/x0_error_snr0")]
    figure = Figure(figsize=(10, 2.6 * len(objectives) + 0.6), layout="constrained", dpi=100)
    panels = figure.subplots(len(objectives), len(media), sharex=True, sharey="col", squeeze=False)
    for row, objective in zip(panels, objectives, strict=True):
        for axes, modality in zip(row, media, strict=True):
            _lines(axes, results, objective=objective, modality=modality)
    for axes, modality in zip(panels[-1], media, strict=True):
        axes.set_xlabel(f"log-SNR ({MEDIA[modality].lower()})", fontsize=9, color=MUTED)
    return figure


def _lines(axes: Axes, results: Results, *, objective: str, modality: str) -> None:
    """Means over seeds, and the range between them."""
    first = [statistics.fmean(values_of(results, _first(results), _error(modality, snr))) for snr in LOG_SNRS]
    arms = [arm for arm, facts in results["arms"].items() if facts["objective"] == objective]
    told = list(dict.fromkeys(facts["conditioning"] for facts in results["arms"].values()))
    for arm in arms:
        colour = COLOURS[told.index(results["arms"][arm]["conditioning"]) % len(COLOURS)]
        seeds = [values_of(results, arm, _error(modality, snr)) for snr in LOG_SNRS]
        ratios = [[one / base for one in own] for own, base in zip(seeds, first, strict=True)]
        label = results["arms"][arm]["conditioning"]
        line_with_range(axes, LOG_SNRS, ratios, colour=colour, label=label)
    axes.set_title(objective, fontsize=9, color=MUTED, loc="left")
    axes.set_ylabel(f"error / {_first(results)}'s", fontsize=8, color=MUTED)
    dress(axes)
    axes.legend(fontsize=7, frameon=False)


def _error(modality: str, log_snr: int) -> str:
    return f"{modality}/x0_error_snr{log_snr}"


def _measured(results: Results, key: str) -> bool:
    return all(values_of(results, arm, key) for arm in results["arms"])


def _first(results: Results) -> str:
    """The arm that all errors are shown beside."""
    return next((arm for arm in results["arms"] if arm == f"flow-{results['reference']}"), next(iter(results["arms"])))


def _references(results: Results) -> dict[str, str]:
    """Objective -> its arm with the reference's conditioning, where that was run."""
    arms = results["arms"].items()
    return {facts["objective"]: arm for arm, facts in arms if facts["conditioning"] == results["reference"]}


def _reference(results: Results, arm: str) -> str | None:
    return _references(results).get(results["arms"][arm]["objective"])


def _cell(results: Results, arm: str, key: str) -> str:
    values = values_of(results, arm, key)
    return with_spread(values) if values else ""


def _relative_cell(results: Results, arm: str, *, modality: str) -> str:
    """Percent above the first arm's, all levels together."""
    first = _first(results)
    if arm == first:
        return ""
    found = relative(results, arm, first, modality=modality)
    stderr = "" if found["stderr"] is None else f" ({100 * found['stderr']:.1f})"
    return f"{100 * math.expm1(found['value']):+.1f} %{stderr}"


def _gain_cell(results: Results, arm: str) -> str:
    """Mean over seeds, and the mean of their standard errors over concepts: the pictures are the same under each."""
    gains, errors = (values_of(results, arm, f"samples/image_top1_gain{end}") for end in ("", "_stderr"))
    return f"{statistics.fmean(gains):+.3f} ({statistics.fmean(errors):.3f})"


def _how(results: Results) -> str:
    made = results["made"]
    seeds, first = len(made["seeds"]), results["arms"][_first(results)]
    said = (
        f"`{made['command']}`, {made['date']}. Objectives of media and ways to tell the network t, each on the demo's "
        f"joint mixture of text, pictures and sounds, {made['steps']} steps, {seeds} seed{'s' if seeds != 1 else ''}."
    )
    return said + short_runs(
        f"{made['steps']} steps for {first['parameters'] / 1e6:.1f} M parameters. They rank arms by how fast they "
        "begin to learn; what a long run would say is open.",
        short=made["steps"] < SHORT_STEPS,
    )


def _measuring(results: Results) -> str:
    made = results["made"]
    lines = [
        f"- **Held out**: {made['text_bytes'] / 1e3:g} kB of text, {made['media_spans']} pictures and as many sounds, "
        f"{made['captioned_spans']} of each for the test of captions; the same for every arm, under the last weights.",
        "- **Log-SNR columns**: mean over scalars of (predicted clean latent - clean latent)^2 at alpha^2 / sigma^2 = "
        "exp(log-SNR), the same noise for all arms: the number that compares objectives. Losses do not.",
        f"- **Beside `{_first(results)}`'s**: the mean over the five levels of log(error / its error), in percent, "
        "seed against seed, with the standard error over seeds. **±** is the standard deviation over seeds. "
        f"A difference is called one at {clear_over_seeds(len(made['seeds'])):.2f} standard errors (Student's t over "
        "seeds, 5 %) and one sign under all seeds: of twenty comparisons of nothing, one.",
        *_of_next_latent(results),
        "- **Captions**: the loss under captions of other concepts less that under the own one, the same picture, "
        "noise and t, over its standard error clustered by concept.",
        f"- **Drawn pictures**: {made['judged_samples']} held-out captions, every concept once before any comes twice, "
        "and for each another concept's caption with the same noise. A small convolutional network learned the demo's "
        "100 kinds (emojibase's subgroups) on real train pictures as the autoencoder gives them back; its features "
        "(64) give the Fréchet distance to the train pictures, its answers the top-1.",
        "- **The law of t** is the demo's for all arms (logit-normal, shift 1.5): under DDPM's schedule the same t is "
        "another log-SNR, so objectives differ in where they practise too.",
        f"- **Cost**: of a training step of the mixture, forward and backward, one thread; {made['machine']}, torch "
        f"{made['torch']}. CPU seconds are of a shared machine: medians of five steps.",
    ]
    return "\n".join(lines)


def _of_next_latent(results: Results) -> list[str]:
    """What its errors cannot be held against."""
    if not any(facts["objective"] == "next_latent" for facts in results["arms"].values()):
        return []
    return [
        "- **`next_latent`** denoises a patch behind the clean patches before it: its errors answer an easier question "
        "than those of arms that see noised patches alone, and stand beside each other only. Drawn pictures, which "
        "have no clean patch but their own, compare it with the others."
    ]


PAPER = Paper(render, draw, out=Path("docs/results/time_conditioning.md"), about=__doc__)
write, main = PAPER.write, PAPER.main


if __name__ == "__main__":
    sys.exit(main())
