"""Ways to hand text to one Atto, held against each other at equal bytes and at equal FLOPs, with seeds.

    python tools/ablate/text_frontends.py [--arms static,space,entropy,entropy_monotonic,bpe] [--seeds 0,1,2]
        [--bytes 400000] [--jobs 2] [--out runs/ablation/text] [--document docs/results/text_frontends.md] [--json]
        [key=value ...]

Arms are the files of configs/ablation/text; overrides go to all of them. A killed command goes on where it stood: runs
that are finished stay, those that were interrupted resume. To begin anew remove --out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arms import (
    ARMS,
    MATCHED_ON_BYTES,
    REFERENCE,
    Prepared,
    config_file,
    load_arm,
    prepare,
    require_matched,
    symbols_a_latent,
    taken,
    train_texts,
)
from cost import Cost, cost_of, kept_cost
from document import write
from doors import add_arguments, made, run_door
from jobs import Job, curve, train_all
from scores import score_all, score_texts
from tables import difference_by_document

from matformer.config.schema import RunConfig
from matformer.engine.baselines import compute_baselines
from matformer.errors import ConfigError

log = logging.getLogger("ablate")

SCORES_FILE = "documents.json"
PATCHER_SAMPLE_BYTES = 100_000
CONTEXT_TOLERANCE = 0.05
BASELINES = {"text/order0": "order-0 bytes", "text/order2": "order-2 bytes", "text/xz": "xz -9e"}
Scores = Mapping[Job, Mapping[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or the error's with one sentence on stderr."""
    return run_door(_parser().parse_args(arguments), ablate=ablate, write=write)


def ablate(asked: argparse.Namespace) -> dict[str, Any]:
    """Prepare, count, train, score; the results. Raises any of our errors."""
    if REFERENCE not in asked.arms:
        raise ConfigError(f"--arms must hold {REFERENCE}, the one to compare with, got {','.join(asked.arms)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    prepared = prepare(asked.out, asked.arms, asked.overrides)
    overrides = {arm: [*asked.overrides, *_prepared_keys(arm, prepared, asked.overrides)] for arm in asked.arms}
    configs = {arm: load_arm(arm, overrides[arm]) for arm in asked.arms}
    sample = taken(train_texts(load_arm(REFERENCE, asked.overrides)), num_bytes=MATCHED_ON_BYTES)
    symbols = {arm: symbols_a_latent(config, sample) for arm, config in configs.items()}
    for arm, mean in symbols.items():
        log.info("%s: %.3f symbols a latent", arm, mean)
    require_matched(symbols)
    costs = {arm: _cost(config, sample, kept=asked.out / "costs") for arm, config in configs.items()}
    require_same_context(costs)
    jobs = _jobs(asked, costs, overrides=overrides)
    everything = [job for table in jobs.values() for arm in table.values() for job in arm]
    train_all(everything, at_once=asked.jobs)
    wanted = {"num_bytes": asked.heldout_bytes}
    scores = score_all(everything, score_texts, asked=wanted, file=SCORES_FILE, at_once=asked.jobs)
    return {
        "made": _made(
            asked,
            prepared,
            scores[jobs["bytes"][REFERENCE][0]],
            curve_bytes=configs[REFERENCE].eval.text_bytes,
        ),
        "reference": REFERENCE,
        "arms": {arm: {"symbols_a_latent": symbols[arm], **asdict(costs[arm])} for arm in asked.arms},
        "baselines": _baselines(configs[REFERENCE], num_bytes=asked.heldout_bytes),
        "tables": {name: _table(table, costs, scores=scores) for name, table in jobs.items()},
        "paired": {name: _paired(table, scores=scores) for name, table in jobs.items()},
    }


def steps_for(costs: Mapping[str, Cost], *, num_bytes: int) -> dict[str, dict[str, int]]:
    """Table -> arm -> steps: to see as many bytes, or to spend what the reference spends on them."""
    by_bytes = {arm: max(1, round(num_bytes / cost.bytes_a_step)) for arm, cost in costs.items()}
    spent = by_bytes[REFERENCE] * costs[REFERENCE].flops_a_step
    return {"bytes": by_bytes, "flops": {arm: max(1, round(spent / cost.flops_a_step)) for arm, cost in costs.items()}}


def require_same_context(costs: Mapping[str, Cost]) -> None:
    """Raises ConfigError for an arm whose sequences hold more or fewer bytes than the reference's."""
    wanted = costs[REFERENCE].bytes_a_sequence
    for arm, cost in costs.items():
        if abs(cost.bytes_a_sequence / wanted - 1) > CONTEXT_TOLERANCE:
            raise ConfigError(
                f"a sequence of {arm} must hold {wanted:.0f} bytes within {CONTEXT_TOLERANCE:.0%}, as {REFERENCE}'s, "
                f"got {cost.bytes_a_sequence:.0f}; change data.sequence_latents in {config_file(arm)}"
            )


def difference(scores: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Bits per byte above the reference's on the same documents, seed against seed; stderr over documents and seeds."""
    return difference_by_document(scores, reference, loss="bits", size="bytes")


def _prepared_keys(arm: str, prepared: Prepared, overrides: Sequence[str]) -> list[str]:
    return prepared.overrides(arm, load_arm(arm, overrides).data.patcher.kind)


def _cost(config: RunConfig, sample: Sequence[bytes], *, kept: Path) -> Cost:
    few = taken(iter(sample), num_bytes=PATCHER_SAMPLE_BYTES)
    cost = kept_cost(config, kept, kind=Cost, measure=lambda: cost_of(config, few))
    log.info("%s: %.2f MFLOPs and %.0f CPU us a byte", config.name, cost.flops_a_byte / 1e6, cost.cpu_seconds_a_mb)
    return cost


def _jobs(
    asked: argparse.Namespace, costs: Mapping[str, Cost], *, overrides: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, list[Job]]]:
    return {
        table: {
            arm: [
                Job(arm, seed, number, config_file(arm), asked.out / "runs", tuple(overrides[arm]))
                for seed in asked.seeds
            ]
            for arm, number in steps.items()
        }
        for table, steps in steps_for(costs, num_bytes=asked.bytes).items()
    }


def _table(table: Mapping[str, Sequence[Job]], costs: Mapping[str, Cost], *, scores: Scores) -> dict[str, Any]:
    """Arm -> its runs."""
    return {arm: [_run(job, costs[arm], score=scores[job]) for job in jobs] for arm, jobs in table.items()}


def _run(job: Job, cost: Cost, *, score: Mapping[str, Any]) -> dict[str, Any]:
    points = curve(job.folder, key="heldout/text/bits_per_byte", over="bytes_seen")
    seen = points[-1][0]
    return {
        "seed": job.seed,
        "steps": job.steps,
        "bytes": seen,
        "flops": seen * cost.flops_a_byte,
        "bits_per_byte": sum(score["bits"]) / sum(score["bytes"]),
        "curve": points,
    }


def _paired(table: Mapping[str, Sequence[Job]], *, scores: Scores) -> dict[str, Any]:
    """Arm -> its difference from the reference."""
    reference = [scores[job] for job in table[REFERENCE]]
    return {
        arm: difference([scores[job] for job in jobs], reference) for arm, jobs in table.items() if arm != REFERENCE
    }


def _baselines(config: RunConfig, *, num_bytes: int) -> dict[str, float]:
    found = compute_baselines(config, text_bytes=num_bytes, media_spans=0)
    return {label: found.numbers[name] for name, label in BASELINES.items() if name in found.numbers}


def _made(
    asked: argparse.Namespace, prepared: Prepared, score: Mapping[str, Any], *, curve_bytes: int
) -> dict[str, Any]:
    """When, where and with what."""
    return made("text_frontends.py", asked) | {
        "bytes": asked.bytes,
        "heldout_documents": len(score["keys"]),
        "heldout_bytes": sum(score["bytes"]),
        "curve_bytes": curve_bytes,
        "vocabulary": prepared.vocabulary,
        "thresholds": prepared.thresholds,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, arms=ARMS, out=Path("runs/ablation/text"), document=Path("docs/results/text_frontends.md"))
    parser.add_argument("--bytes", type=int, default=400_000, help="of text that a run of the first table sees")
    parser.add_argument("--heldout-bytes", type=int, default=100_000, help="that every run is scored on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
