"""The door of evaluation: `python -m matformer.evaluate RUN`, a run's newest checkpoint on held-out data."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from matformer.door import door, natural, positive
from matformer.engine.evaluate import Evaluation, evaluate_run
from matformer.engine.restore import run_config
from matformer.engine.sample_quality import DRAWS, draws_for
from matformer.observe.drawing import drawing_bar
from matformer.parallel.process import settle

log = logging.getLogger(__name__)

LOWER, HIGHER = -1, 1
CHANCE_GAIN = 0.0
HEAD = {"held out": 25, "this model": 15, "rival": 19, "": 15, "better by (stderr)": 18}  # columns and their widths
BESIDE = ("_stderr", "_z", "_num_concepts", "_num_samples", "_real")  # ends of numbers that have no line of their own
WIDTH = 110  # columns, so that no key is cut where there is no terminal


@door
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one sentence on stderr for a folder or a checkpoint that cannot be evaluated."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    asked = _parser().parse_args(arguments)
    drawn = {name: value for name in ("steps", "guidance", "seed") if (value := getattr(asked, name)) is not None}
    config = run_config(asked.run)
    if drawn and not (config.eval.judged_samples if asked.judged_samples is None else asked.judged_samples):
        log.warning("--%s has no effect without --judged-samples", ", --".join(drawn))
    draws = draws_for(config, **drawn)
    settle(config.parallel.threads)
    with drawing_bar() as watch:
        evaluation = evaluate_run(
            asked.run,
            ema=asked.ema,
            text_bytes=asked.text_bytes,
            media_spans=asked.media_spans,
            judged=asked.judged_samples,
            draws=draws,
            data=asked.data,
            watch=watch,
        )
    title = f"{asked.run}, step {evaluation.step}" + (", average of the weights" if asked.ema else "")
    Console(width=max(Console().width, WIDTH)).print(table(evaluation, title=title))
    if asked.json:
        line = {"step": evaluation.step, **evaluation.numbers, "baselines": evaluation.baselines}
        sys.stdout.write(json.dumps(line) + "\n")
    return 0


def table(evaluation: Evaluation, *, title: str) -> Table:
    """Our numbers beside what needs no model; better is counted in standard errors of the difference.

    Where both score the same documents it is taken document by document, else the rival is exact.
    """
    numbers = {name.split("/", 1)[1]: value for name, value in evaluation.numbers.items()}
    shown = Table(
        *(Column(name, no_wrap=True, min_width=width) for name, width in HEAD.items()),
        title=title,
        title_justify="left",
        box=None,
    )
    for name, value in numbers.items():
        if name.endswith(BESIDE) or "/below_" in name or name == "router/majority":
            continue
        stderr = numbers.get(f"{name}_stderr")
        rivals = _rivals(name, numbers=numbers, baselines=evaluation.baselines)
        if not rivals:
            shown.add_row(name, _measured(value, stderr), "", "", "")
        for place, (label, rival, rival_stderr, direction) in enumerate(rivals):
            ours = (name, _measured(value, stderr)) if place == 0 else ("", "")
            below = f"{name.split('/')[0]}/below_{label}"
            gain = numbers.get(below, direction * (value - rival))
            margin = _margin(gain, numbers.get(f"{below}_stderr", stderr))
            shown.add_row(*ours, label, _measured(rival, rival_stderr), margin)
    return shown


def _rivals(
    name: str, *, numbers: dict[str, float], baselines: dict[str, float]
) -> list[tuple[str, float, float | None, int]]:
    """(label, value, standard error, which side is better) of what a number is held against."""
    part, number = name.split("/", 1)
    if number == "span_end_accuracy":
        return [("the commonest answer", numbers["router/majority"], None, HIGHER)]
    if part == "captions" or number.endswith("_top1_gain"):
        return [("captions unused", CHANCE_GAIN, None, HIGHER)]
    if part == "samples":
        return _real_pictures(number, numbers=numbers)
    if number not in ("bits_per_byte", "flow_loss"):
        return []
    same = [key for key in baselines if key.startswith(f"{part}/") and not key.endswith("_stderr")]
    return [(key.split("/")[1], baselines[key], baselines.get(f"{key}_stderr"), LOWER) for key in same]


def _real_pictures(number: str, *, numbers: dict[str, float]) -> list[tuple[str, float, float | None, int]]:
    """What real pictures reach where drawn ones are judged."""
    real = numbers.get(f"samples/{number}_real")
    side = LOWER if number.endswith("_frechet") else HIGHER
    return [] if real is None else [("real pictures", real, numbers.get(f"samples/{number}_real_stderr"), side)]


def _measured(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr is not None else "")


def _margin(gain: float, stderr: float | None) -> str:
    """How many standard errors a difference is."""
    return f"{gain / stderr:+.1f}" if stderr else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m matformer.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, such as runs/demo")
    parser.add_argument("--ema", action="store_true", help="the average of the weights instead of the last ones")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="score this text data set's held-out split instead")
    parser.add_argument("--text-bytes", type=natural, metavar="N", help="bytes of held-out text (the run's own)")
    parser.add_argument("--media-spans", type=natural, metavar="N", help="spans of each modality (the run's own)")
    parser.add_argument(
        "--judged-samples", type=natural, metavar="N", help="pictures drawn from held-out captions (the run's own)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help=f"of denoising a judged picture ({DRAWS.steps})")
    guidance = f"of judged pictures ({DRAWS.guidance:g}, without data.blind_probability 1)"
    parser.add_argument("--guidance", type=float, metavar="W", help=guidance)
    parser.add_argument("--seed", type=natural, metavar="N", help=f"of their noise ({DRAWS.seed})")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
