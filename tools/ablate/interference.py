"""Text by autoregression and media by diffusion in one trunk: do they help or hurt each other?

    python tools/ablate/interference.py [--arms text,image,audio,joint,joint_apart] [--seeds 0,1,2] [--steps 160]
        [--jobs 2] [--out runs/ablation/interference] [--document docs/results/interference.md] [--json] [key=value ...]

Arms are the files of configs/ablation/interference. All take the same number of steps, and a step of a joint arm sees
as many units of each modality as the steps of the three single arms together; what they saw is compared when all are
done. A killed command goes on where it stood; to begin anew remove --out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from doors import add_arguments, made, run_door
from interference_document import write
from jobs import Job, arm_file, load_checked, train_all
from scores import Asked, columns, score_all
from tables import difference_by_document, loss_a_unit

from matformer.config.schema import RunConfig
from matformer.engine.evaluate import media_by_document, text_by_document
from matformer.engine.loop import num_parameters
from matformer.engine.restore import load_for_inference
from matformer.errors import ConfigError
from matformer.observe.sinks import read_metrics

log = logging.getLogger("ablate")

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "ablation" / "interference"
SINGLE = ("text", "image", "audio")
"""Arms of one modality each, by its name."""
JOINT = ("joint", "joint_apart")
TOLERANCE = 0.05
"""By which units of a modality may differ between the arms that see it."""
UNITS = {"text": "bytes_seen", "image": "image/patches_seen", "audio": "audio/patches_seen"}
CAPTIONED = "captioned"
SCORES_FILE = "by_document.json"

Scores = Mapping[str, Any]  # of one run: part -> {"keys", "losses", "sizes"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or the error's with one sentence on stderr."""
    return run_door(_parser().parse_args(arguments), ablate=ablate, write=write)


def ablate(asked: argparse.Namespace) -> dict[str, Any]:
    """Train, compare units, score; the results. Raises any of our errors."""
    missing = [arm for arm in SINGLE if arm not in asked.arms]
    if missing or not set(asked.arms) & set(JOINT):
        raise ConfigError(
            f"--arms must hold {', '.join(SINGLE)} and one of {', '.join(JOINT)}, got {','.join(asked.arms)}"
        )
    asked.out.mkdir(parents=True, exist_ok=True)
    configs = {arm: load_arm(arm, asked.overrides) for arm in asked.arms}
    jobs = _jobs(asked)
    every = [jobs[arm][place] for place in range(len(asked.seeds)) for arm in asked.arms]  # whole seeds come first
    train_all(every, at_once=asked.jobs)
    units = {arm: [units_seen(job.folder) for job in runs] for arm, runs in jobs.items()}
    require_equal_units(units)
    amounts = {"text_bytes": asked.text_bytes, "media_spans": asked.media_spans}
    found = score_all(every, score_parts, asked=amounts, file=SCORES_FILE, at_once=asked.jobs)
    scores = {arm: [found[job]["parts"] for job in runs] for arm, runs in jobs.items()}
    return {
        "made": made("interference.py", asked) | {"steps": asked.steps, **_heldout(scores)},
        "arms": {arm: {"parameters": num_parameters(config), "units": units[arm]} for arm, config in configs.items()},
        "losses": {arm: _losses(runs) for arm, runs in scores.items()},
        "differences": _differences(scores),
        "gradients": {arm: [gradients(job.folder) for job in jobs[arm]] for arm in asked.arms if arm in JOINT},
    }


def load_arm(arm: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked config of an arm. Raises ConfigError."""
    return load_checked(arm_file(arm, arms=(*SINGLE, *JOINT), folder=FOLDER), overrides)


def units_seen(folder: Path) -> dict[str, float]:
    """Modality -> bytes or noised patches that a run trained on, where it has the modality."""
    last = next(row for row in reversed(read_metrics(folder / "metrics.jsonl")) if "loss" in row)
    return {name: last[key] for name, key in UNITS.items() if last.get(key)}


def require_equal_units(units: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Raises ConfigError for a joint run that saw more or less of a modality than its single run of the same seed."""
    for arm in units.keys() & set(JOINT):
        for name in SINGLE:
            for joint, single in zip(units[arm], units[name], strict=True):
                if abs(joint[name] / single[name] - 1) > TOLERANCE:
                    raise ConfigError(
                        f"{arm} must see as much {name} as the arm {name} within {TOLERANCE:.0%}, got "
                        f"{joint[name]:.0f} and {single[name]:.0f}; change the weights in {FOLDER / arm}.yaml"
                    )


def score_parts(folder: Path, asked: Asked) -> dict[str, Any]:
    """`parts` of a run's last weights: text, each medium alone, and behind its caption if the run had captions there.

    A part is columns of keys, losses and sizes, a row a document.
    """
    config, host, _ = load_for_inference(folder, ema=False)
    config = config.model_copy(update={"eval": config.eval.model_copy(update=dict(asked))})
    found = {}
    if any(source.form == "text" for source in config.data.sources.values()):
        found["text"] = text_by_document(host, config)
    alone = with_media_alone(config)
    for name in config.model.media:
        found[name] = media_by_document(host, alone, modality=name)
        if alone != config:
            found[f"{name} {CAPTIONED}"] = media_by_document(host, config, modality=name)
    return {"parts": {part: columns(documents) for part, documents in found.items()}}


def with_media_alone(config: RunConfig) -> RunConfig:
    """The same run, its pairs without captions; equal to `config` if they had none."""
    sources = {
        name: source.model_copy(update={"shows": "medium"}) if source.form == "pairs" and source.modality else source
        for name, source in config.data.sources.items()
    }
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})


def _losses(runs: Sequence[Mapping[str, Scores]]) -> dict[str, list[float]]:
    """Part -> a number a seed: bits per byte, or squared error a scalar."""
    return {part: [loss_a_unit(run[part]) for run in runs] for part in runs[0]}


def _differences(runs: Mapping[str, Sequence[Mapping[str, Scores]]]) -> dict[str, dict[str, Any]]:
    """Joint arm -> part -> its loss less the single arm's."""
    return {
        arm: {
            part: difference([run[part] for run in runs[arm]], [run[part.split()[0]] for run in runs[part.split()[0]]])
            for part in runs[arm][0]
        }
        for arm in runs
        if arm in JOINT
    }


def difference(joint: Sequence[Scores], single: Sequence[Scores]) -> dict[str, Any]:
    """Loss above the single arm's on the same documents, seed against seed; stderr over documents and seeds."""
    return difference_by_document(joint, single, loss="losses", size="sizes")


def gradients(folder: Path) -> list[dict[str, float]]:
    """What a run wrote of its losses' gradients: a row each time it looked, with `step`."""
    rows = read_metrics(folder / "metrics.jsonl")
    looked = [{k: v for k, v in row.items() if k == "step" or k.startswith("gradients/")} for row in rows]
    return [row for row in looked if len(row) > 1]


def _jobs(asked: argparse.Namespace) -> dict[str, list[Job]]:
    return {
        arm: [
            Job(arm, seed, asked.steps, FOLDER / f"{arm}.yaml", asked.out / "runs", tuple(asked.overrides), 2)
            for seed in asked.seeds
        ]
        for arm in asked.arms
    }


def _heldout(scores: Mapping[str, Sequence[Mapping[str, Scores]]]) -> dict[str, float]:
    """What everything is scored on."""
    text = scores["text"][0]["text"]
    found: dict[str, float] = {"heldout_documents": len(text["keys"]), "heldout_bytes": sum(text["sizes"])}
    return found | {f"heldout_{name}": len(scores[name][0][name]["keys"]) for name in ("image", "audio")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out, document = Path("runs/ablation/interference"), Path("docs/results/interference.md")
    add_arguments(parser, arms=(*SINGLE, *JOINT), out=out, document=document)
    parser.add_argument("--steps", type=int, default=160, help="of every arm")
    parser.add_argument("--text-bytes", type=int, default=60_000, help="of held-out text that every run is scored on")
    parser.add_argument("--media-spans", type=int, default=96, help="held-out pictures, and as many sounds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
