"""Objectives of media and ways to tell the network t, held against each other on the demo, with seeds.

    python tools/ablate/time_conditioning.py [--arms flow-add,ddpm_v-adaln_atto,...] [--seeds 0,1,2] [--steps 120]
        [--jobs 2] [--out runs/ablation/time] [--document docs/results/time_conditioning.md] [--json] [key=value ...]

Arms are the files of configs/ablation/time; overrides go to all of them. A killed command goes on where it stood: runs
that are finished stay, those that were interrupted resume, what was scored is not scored again. To begin anew remove
--out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cost import MediaCost, kept_cost, media_cost_of
from doors import add_arguments, made, run_door
from jobs import Job, train_all
from scores import score_all, score_everything
from time_arms import ARMS, REFERENCE, config_file, load_arm
from time_document import write

from matformer.config.schema import RunConfig
from matformer.engine.judge import load_judge
from matformer.engine.sample_quality import DRAWS
from matformer.parallel.process import settle

log = logging.getLogger("ablate")

SCORES_FILE = "numbers.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or the error's with one sentence on stderr."""
    return run_door(_parser().parse_args(arguments), ablate=ablate, write=write)


def ablate(asked: argparse.Namespace) -> dict[str, Any]:
    """Count, train, score; the results. Raises any of our errors."""
    configs = {arm: load_arm(arm, asked.overrides) for arm in asked.arms}
    asked.out.mkdir(parents=True, exist_ok=True)
    costs = {arm: _cost(config, kept=asked.out / "costs") for arm, config in configs.items()}
    jobs = {arm: _jobs(arm, asked) for arm in asked.arms}
    everything = [job for one in zip(*jobs.values(), strict=True) for job in one]  # a seed of all arms, then the next
    train_all(everything, at_once=asked.jobs)
    if asked.judged_samples:
        settle(1)
        load_judge(next(iter(configs.values())), modality="image")  # once, not in every process at the same time
    scores = score_all(everything, score_everything, asked=_wanted(asked), file=SCORES_FILE, at_once=asked.jobs)
    return {
        "made": made("time_conditioning.py", asked) | {"steps": asked.steps, **_amounts(asked)},
        "reference": REFERENCE,
        "arms": {arm: _facts(arm, configs[arm], costs[arm]) for arm in asked.arms},
        "runs": {arm: [{"seed": job.seed, **scores[job]["numbers"]} for job in own] for arm, own in jobs.items()},
    }


def _cost(config: RunConfig, *, kept: Path) -> MediaCost:
    cost = kept_cost(config, kept, kind=MediaCost, measure=lambda: media_cost_of(config))
    log.info("%s: %.1f GFLOPs and %.2f CPU s a step", config.name, cost.flops_a_step / 1e9, cost.cpu_seconds_a_step)
    return cost


def _jobs(arm: str, asked: argparse.Namespace) -> list[Job]:
    keys = tuple(asked.overrides)
    return [Job(arm, seed, asked.steps, config_file(arm), asked.out / "runs", keys, 2) for seed in asked.seeds]


def _facts(arm: str, config: RunConfig, cost: MediaCost) -> dict[str, Any]:
    media = config.model.media["image"]
    return {"objective": media.objective, "conditioning": media.time_conditioning, **asdict(cost)}


def _amounts(asked: argparse.Namespace) -> dict[str, int]:
    names = ("text_bytes", "media_spans", "captioned_spans", "judged_samples")
    return {name: getattr(asked, name) for name in names}


def _wanted(asked: argparse.Namespace) -> Mapping[str, Any]:
    return {"eval": _amounts(asked), "draws": {"steps": asked.denoising_steps, "guidance": asked.guidance}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, arms=ARMS, out=Path("runs/ablation/time"), document=Path("docs/results/time_conditioning.md"))
    parser.add_argument("--steps", type=int, default=120, help="of training")
    parser.add_argument("--text-bytes", type=int, default=30_000, help="of held-out text that every run is scored on")
    parser.add_argument("--media-spans", type=int, default=48, help="held-out pictures, and as many sounds")
    parser.add_argument("--captioned-spans", type=int, default=32, help="of the paired test of captions")
    parser.add_argument("--judged-samples", type=int, default=128, help="pictures drawn, from own and other captions")
    parser.add_argument("--denoising-steps", type=int, default=12, help="of a picture that is drawn")
    parser.add_argument("--guidance", type=float, default=DRAWS.guidance, help="of pictures that are drawn")
    return parser


if __name__ == "__main__":
    sys.exit(main())
