"""The door that shows a run: `python -m matformer.report RUN` writes RUN/report.html, one file that needs no network.

Every section is made of what lies in the run folder; one whose input is missing says so in a line.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from matformer.config.schema import loss_name
from matformer.door import door
from matformer.errors import ConfigError
from matformer.files import write_whole
from matformer.observe import gallery, page
from matformer.observe.curves import Level, Series, panel
from matformer.observe.progress import amount_text, duration_text
from matformer.observe.sinks import Row, read_metrics

log = logging.getLogger(__name__)

Tree = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What lies in a run folder; empty where it does not."""

    folder: Path
    config_text: str
    config: Tree
    rows: list[Row]
    machine: Tree
    baselines: Tree
    samples: Tree
    statistics: Tree
    data: Tree

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name", self.folder.name))

    @property
    def media(self) -> list[str]:
        """Latent modalities: those of the config, else those that the numbers speak of."""
        named = self.config.get("model", {}).get("media", {})
        heard = {key.split("/")[-2] for row in self.rows for key in row if key.endswith("/flow_loss")}
        return [*named] or sorted(heard)

    def loss_of(self, modality: str) -> str:
        """Key of a modality's loss, by its objective."""
        media = self.config.get("model", {}).get("media", {}).get(modality, {})
        predicts = media.get("next_latent", {}).get("predicts", "flow")
        return f"{modality}/{loss_name(media.get('objective', 'flow'), predicts=predicts)}"

    def points(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one key, where it has a finite value."""
        found = [(float(row["step"]), float(row[key])) for row in self.rows if _is_number(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The latest value of one key."""
        values = self.points(key)[1]
        return values[-1] if values else None


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    parser = argparse.ArgumentParser(prog="python -m matformer.report", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo")
    path = write_report(parser.parse_args(arguments).run)
    sys.stdout.write(f"{path}\n")
    return 0


def write_report(run_folder: Path) -> Path:
    """Write report.html of a run, whole or not at all. Raises ConfigError if there is no such run."""
    folder = Path(run_folder)
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise ConfigError(
            f"a run folder must hold config.yaml or metrics.jsonl, got {folder}; name a folder below runs/"
        )
    material = gather(folder)
    parts = [section(material) for section in SECTIONS]
    path = folder / "report.html"
    write_whole(path, page.document(f"{material.name} · Matformer", parts).encode())
    return path


def gather(folder: Path) -> Material:
    """Read what there is; a file that cannot be read is named in the log and counts as missing."""
    config_file = folder / "config.yaml"
    config_text = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    config = yaml.safe_load(config_text) or {}
    root = Path(config.get("data", {}).get("root", ""))
    return Material(
        folder,
        config_text,
        config,
        rows=_rows(folder),
        machine=_read_json(folder / "machine.json"),
        baselines=_read_json(folder / "baselines.json"),
        samples=_read_json(folder / "samples" / "samples.json"),
        statistics=_read_json(folder / "statistics.json"),
        data=_read_json(root / "demo.json"),
    )


def _rows(folder: Path) -> list[Row]:
    """Rows of the run, and the evaluation of its newest checkpoint among them."""
    rows = read_metrics(folder / "metrics.jsonl")
    evaluation = _read_json(folder / "evaluation.json")
    if isinstance(evaluation.get("step"), int):
        rows.append(evaluation)
    return sorted(rows, key=lambda row: row["step"])


def _read_json(path: Path) -> Tree:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_bytes())
    except ValueError as error:
        log.warning("%s is not JSON and is left out of the report: %s", path, error)
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The head of the page


def header(material: Material) -> str:
    """Name, size, machine, time."""
    config = material.config
    steps, _ = material.points("loss")
    found: list[tuple[str, str | None]] = [
        ("Parameters", _size(material)),
        ("Steps", _steps(steps, planned=config.get("train", {}).get("steps"))),
        ("Time", _maybe(material.last("seconds"), duration_text)),
        ("Bytes read", _maybe(material.last("bytes_seen"), _amount)),
        ("Latents read", _maybe(material.last("latents_seen"), _amount)),
        ("Machine", _machine_name(material.machine)),
        ("Layout", _layout(config.get("parallel", {}))),
        ("Seed", _maybe(config.get("seed"), str)),
    ]
    pairs = [(name, value) for name, value in found if value]
    modalities = ["text", *material.media]
    listed = ", ".join(modalities[:-1]) + (" and " if len(modalities) > 1 else "") + modalities[-1]
    return (
        f'<header><h1>{page.text(material.name)}</h1><p class="lead">One Matformer over {page.text(listed)}: '
        f"what it learned, what it makes, and what it was made of.</p>{page.facts(pairs)}</header>"
    )


def _maybe(value: Any, shown: Callable[[Any], str]) -> str | None:
    return None if value is None else shown(value)


def _amount(value: float) -> str:
    return amount_text(value).strip()


def _size(material: Material) -> str | None:
    for tree in (material.statistics, material.machine):
        for path, value in page.flat(tree):
            if path.split(" › ")[-1] in ("parameters", "num_params", "num_parameters") and _is_number(value):
                return _amount(value)
    return None


def _steps(steps: Sequence[float], *, planned: int | None) -> str | None:
    if not steps:
        return None
    return f"{int(steps[-1]):,}" + (f" of {planned:,}" if planned and planned != int(steps[-1]) else "")


def _machine_name(machine: Tree) -> str | None:
    names = [machine.get(key) for key in ("gpu", "gpu_name", "device_name", "cpu", "cpu_name", "processor", "device")]
    return next((str(name) for name in names if name and name != "none"), None)


def _layout(parallel: Tree) -> str | None:
    if not parallel:
        return None
    degrees = " × ".join(f"{name} {parallel[name]}" for name in ("tp", "pp", "dp") if parallel.get(name, 1) > 1)
    return f"{degrees or 'one rank'}, {parallel.get('dtype', 'float32')}"


# What it learned


@dataclass(frozen=True)
class Claim:
    """A held-out number and what it must beat, the nearest rival first.

    below: the key of the difference to that rival, where both were scored on the same documents.
    """

    label: str
    unit: str
    key: str
    rivals: tuple[tuple[str, float | None, float | None], ...]
    higher: bool = False
    below: str = ""


def learned(material: Material) -> str:
    """The table of held-out numbers beside what needs no model."""
    title = "What it learned"
    rows = [row for claim in _claims(material) if (row := _claim_row(claim, material=material))]
    if not rows:
        return page.missing(title, "No held-out numbers yet: metrics.jsonl holds none.")
    lead = (
        "Held-out numbers beside what needs no model. A tick: better than the first rival by more than two standard "
        "errors; where both score the same documents, those of their difference, document by document."
    )
    head = ("", "this model", "average (EMA)", "rivals", "")
    return page.section(title, page.table(head, rows, numbers=(1, 2)), lead=lead)


def _claims(material: Material) -> list[Claim]:
    bases = material.baselines

    def rival(label: str, key: str) -> tuple[str, float | None, float | None]:
        return label, bases.get(key), bases.get(f"{key}_stderr")

    text = tuple(
        rival(label, f"text/{key}") for label, key in (("order 2", "order2"), ("xz", "xz"), ("order 0", "order0"))
    )
    claims = [Claim("Text", "bits per byte, lower is better", "text/bits_per_byte", text, below="text/below_order2")]
    for name in material.media:
        rivals = (rival("Gaussian", f"{name}/gaussian"), rival("Gaussian by channel", f"{name}/gaussian_channel"))
        below = f"{name}/below_gaussian" + ("" if f"{name}/gaussian" in bases else "_channel")
        key = material.loss_of(name)
        unit = f"{_loss_words(key)} a scalar, lower is better"
        claims.append(Claim(name.capitalize(), unit, key, rivals if key.endswith("/flow_loss") else (), below=below))
    majority = (("always the commonest", material.last("heldout/router/majority"), None),)
    claims.append(
        Claim("Router", "right at ends of spans, higher is better", "router/span_end_accuracy", majority, True)
    )
    for name in material.media:
        unit = f"{_loss_words(material.loss_of(name))} added by captions of other concepts, higher is better"
        zero = (("zero", 0.0, None),)
        claims.append(Claim(f"Captions used: {name}", unit, f"captions/{name}_gain", zero, True))
    return [*claims, *(_drawn(name, material=material) for name in material.media)]


def _drawn(name: str, *, material: Material) -> Claim:
    """Generated media whose kind a classifier of real ones recognises."""
    key = f"samples/{name}_top1"

    def rival(label: str, end: str) -> tuple[str, float | None, float | None]:
        averaged, last = ((material.last(f"{part}/{key}{end}"), part) for part in ("heldout_ema", "heldout"))
        value, part = last if averaged[0] is None else averaged
        return label, value, material.last(f"{part}/{key}{end}_stderr")

    rivals = (rival("captions of other concepts", "_shuffled"), rival("real ones", "_real"))
    unit = "share that a classifier takes for the kind asked for, higher is better"
    return Claim(f"Drawn from captions: {name}", unit, key, rivals, True, below=f"{key}_gain")


def _claim_row(claim: Claim, *, material: Material) -> list[str] | None:
    value, error = (material.last(f"heldout/{claim.key}{end}") for end in ("", "_stderr"))
    average, average_error = (material.last(f"heldout_ema/{claim.key}{end}") for end in ("", "_stderr"))
    if value is None and average is None:
        return None
    rivals = [rival for rival in claim.rivals if rival[1] is not None]
    label = f"{page.text(claim.label)}<br><span class=error>{page.text(claim.unit)}</span>"
    shown = "<br>".join(
        f"{_measured(amount, spread)} <span class=error>{page.text(name)}</span>" for name, amount, spread in rivals
    )
    mark = _mark(*_ahead(claim, material=material), name=rivals[0][0]) if rivals else ""
    return [label, _measured(value, error), _measured(average, average_error), shown or "–", mark]


def _measured(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" <span class=error>± {error:.3f}</span>" if error is not None else "")


def _ahead(claim: Claim, *, material: Material) -> tuple[float, float]:
    """How far ahead of its first rival a number is, and the standard error of that: paired where it was measured so."""
    for prefix in ("heldout_ema", "heldout"):
        below, error = (material.last(f"{prefix}/{claim.below}{end}") for end in ("", "_stderr"))
        if below is not None and error is not None:
            return below, error
    for prefix in ("heldout", "heldout_ema"):
        value, error = (material.last(f"{prefix}/{claim.key}{end}") for end in ("", "_stderr"))
        other, spread = next((amount, spread) for _, amount, spread in claim.rivals if amount is not None)
        if value is not None:
            return (value - other if claim.higher else other - value), math.hypot(error or 0.0, spread or 0.0)
    raise AssertionError("a claim without a number has no row")


def _mark(ahead: float, error: float, *, name: str) -> str:
    """More than two standard errors are a difference."""
    how = f" <span class=error>by {abs(ahead) / error:.1f} s.e.</span>" if error > 0 else ""
    if ahead > 2 * error:
        return f'<span class="mark good">✓ beats {page.text(name)}</span>{how}'
    if ahead < -2 * error:
        return f'<span class="mark bad">✗ behind {page.text(name)}</span>{how}'
    return f'<span class="mark even">≈ level with {page.text(name)}</span>{how}'


# Curves


def curves(material: Material) -> str:
    """How the numbers went."""
    title = "How it learned"
    panels = [
        drawn
        for draw in (_text_curve, _media_curves, _router_curve, _step_curves, _rate_curve)
        for drawn in draw(material)
    ]
    if not panels:
        return page.missing(title, "No curves: metrics.jsonl holds no rows.")
    lead = (
        "Thin: training batches. Dots: held-out data, filled for the weights, open for their average. "
        "Dashed: what needs no model, on what the last evaluation scored; points before it may be of a smaller sample."
    )
    return page.section(title, page.grid(panels, cell="420px"), lead=lead)


def _curve(
    material: Material,
    title: str,
    key: str,
    *,
    ink: str,
    levels: Sequence[Level] = (),
    unit: str = "",
    log: bool = False,
) -> list[str]:
    """A panel of one number: training, held out, held out by the average. Nothing if it was never measured."""
    series = []
    steps, values = material.points(key)
    if steps:
        series.append(Series("training", steps, values, ink, faint=True))
    for prefix, label in (("heldout", "held out"), ("heldout_ema", "held out, average")):
        steps, values = material.points(f"{prefix}/{key}")
        errors = material.points(f"{prefix}/{key}_stderr")[1]
        if steps:
            whole = errors if len(errors) == len(steps) else None
            series.append(Series(label, steps, values, ink, dots=True, errors=whole, faint=prefix == "heldout_ema"))
    if not series:
        return []
    return [f"<h3>{page.text(title)}</h3>{panel(title, series, levels=levels, unit=unit, log=log)}"]


def _levels(material: Material, pairs: Sequence[tuple[str, str]]) -> list[Level]:
    return [Level(label, material.baselines[key]) for label, key in pairs if _is_number(material.baselines.get(key))]


def _text_curve(material: Material) -> list[str]:
    levels = _levels(material, (("order 0", "text/order0"), ("order 2", "text/order2"), ("xz", "text/xz")))
    return _curve(material, "Text", "text/bits_per_byte", ink="text", levels=levels, unit="bits per byte")


def _media_curves(material: Material) -> list[str]:
    panels = []
    for name in material.media:
        key = material.loss_of(name)
        exact = (("Gaussian", f"{name}/gaussian"),) if f"{name}/gaussian" in material.baselines else ()
        known = exact or (("Gaussian by channel", f"{name}/gaussian_channel"),)
        levels = _levels(material, known if key.endswith("/flow_loss") else ())
        ink = name if name in ("image", "audio") else "other"
        panels += _curve(material, name.capitalize(), key, ink=ink, levels=levels, unit=_loss_words(key))
    return panels


def _loss_words(loss: str) -> str:
    return loss.split("/")[1].replace("_", " ")


def _router_curve(material: Material) -> list[str]:
    majority = material.last("heldout/router/majority")
    levels = [] if majority is None else [Level("always the commonest", majority)]
    return _curve(
        material, "Router at ends of spans", "router/span_end_accuracy", ink="router", levels=levels, unit="share right"
    )


def _step_curves(material: Material) -> list[str]:
    panels = _curve(material, "Gradient norm", "grad_norm", ink="other", log=True)
    panels += _curve(material, "Learning rate", "lr", ink="other")
    cosine = "gradients/atto/text_media_cosine"
    return panels + _curve(material, "Gradients of text and media in the Atto", cosine, ink="other", unit="cosine")


def _rate_curve(material: Material) -> list[str]:
    series = []
    for key, label, ink in (("bytes_per_second", "bytes", "text"), ("latents_per_second", "latents", "image")):
        steps, values = material.points(key)
        if steps:
            series.append(Series(label, steps, values, ink))
    return [f"<h3>Throughput</h3>{panel('throughput', series, unit='a second', log=True)}"] if series else []


# What it was made of


def statistics(material: Material) -> str:
    """Patches, sequences, and whatever else was counted."""
    title = "Patches and sequences"
    if not material.statistics:
        return page.missing(title, "No statistics here: statistics.json is missing.")
    groups = {name: value for name, value in material.statistics.items() if isinstance(value, Mapping)}
    loose = {name: value for name, value in material.statistics.items() if name not in groups}
    cards = [_numbers(name, tree) for name, tree in ([("in all", loose)] if loose else []) + list(groups.items())]
    return page.section(title, page.grid(cards, cell="300px"))


def _numbers(title: str, tree: Mapping[str, Any]) -> str:
    rows = [[page.text(_words(name)), page.text(_shown(value))] for name, value in page.flat(tree)]
    return f"<h3>{page.text(_words(title))}</h3>{page.table((), rows, numbers=(1,))}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(page.number(one) for one in value)
    return page.number(value)


def machine(material: Material) -> str:
    """What it ran on."""
    if not material.machine:
        return page.missing("Machine", "No description here: machine.json is missing.")
    rows = [[page.text(_words(name)), page.text(_shown(value))] for name, value in page.flat(material.machine)]
    return page.section("Machine", page.table((), rows))


def config(material: Material) -> str:
    """Every key of the run."""
    if not material.config_text:
        return page.missing("Config", "No config here: config.yaml is missing.")
    return page.section(
        "Config", page.folded("every key with its value", f"<pre>{page.text(material.config_text)}</pre>")
    )


def licences(material: Material) -> str:
    """Whose data these are."""
    title = "Data and licences"
    sources = material.data.get("sources", [])
    if not sources:
        return page.missing(title, "No list of sources here: demo.json is not in data.root.")
    merged: dict[tuple[str, str], list[str]] = {}
    for source in sources:
        whose = (source.get("attribution", ""), source.get("licence", ""))
        merged.setdefault(whose, []).append(str(source.get("name", source.get("spec", ""))))
    rows = [
        [page.text(", ".join(names)), page.text(whose), page.text(terms)] for (whose, terms), names in merged.items()
    ]
    return page.section(title, page.table(("source", "attribution", "licence"), rows))


def footer(material: Material) -> str:
    """Where this came from."""
    return f"<footer>Written by <code>python -m matformer.report {page.text(material.folder)}</code>.</footer>"


SECTIONS: tuple[Callable[[Material], str], ...] = (
    header,
    learned,
    curves,
    lambda material: gallery.pictures(material.samples, material.folder / "samples"),
    lambda material: gallery.films(material.samples, material.folder / "samples"),
    lambda material: gallery.sounds(material.samples, material.folder / "samples"),
    lambda material: gallery.captions(material.samples, material.folder / "samples"),
    lambda material: gallery.texts(material.samples, material.folder / "samples"),
    statistics,
    machine,
    config,
    licences,
    footer,
)


if __name__ == "__main__":
    sys.exit(main())
