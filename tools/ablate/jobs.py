"""Runs of an ablation: the ordinary training door as processes of one thread."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from matformer.config.check import check
from matformer.config.load import changed_keys, load_run
from matformer.config.schema import RunConfig
from matformer.data.statistics import with_statistics
from matformer.engine.folder import KEYS_WITHOUT_EFFECT_ON_NUMBERS
from matformer.errors import CheckpointError, ConfigError
from matformer.observe.sinks import read_metrics

log = logging.getLogger("ablate.runs")


def load_checked(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run file whose keys fit together. Raises ConfigError."""
    config = load_run(file, overrides)
    check(config)
    return config


def arm_file(arm: str, *, arms: Sequence[str], folder: Path) -> Path:
    """The run file of an arm. Raises ConfigError if it is none of `arms`."""
    if arm not in arms:
        raise ConfigError(f"an arm must be one of {', '.join(arms)}, got {arm}; change --arms")
    return folder / f"{arm}.yaml"


@dataclass(frozen=True)
class Job:
    """One run of an arm; two tables that ask for the same one share it. evaluations: of held-out text on the way."""

    arm: str
    seed: int
    steps: int
    config: Path
    runs: Path
    overrides: tuple[str, ...] = ()
    evaluations: int = 3

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.runs / f"{self.arm}-seed{self.seed}-steps{self.steps}"

    @property
    def keys(self) -> list[str]:
        """All its overrides."""
        every = max(1, math.ceil(self.steps / self.evaluations))
        own = {"name": self.folder.name, "run.folder": self.runs, "seed": self.seed, "train.steps": self.steps}
        return [*self.overrides, *(f"{key}={value}" for key, value in own.items()), f"eval.every_steps={every}"]


def train_all(jobs: Sequence[Job], *, at_once: int) -> None:
    """Every job to its end; a finished one is left alone, an interrupted one goes on. Raises CheckpointError."""
    todo = [job for job in dict.fromkeys(jobs) if not finished(job)]
    log.info("%d runs, %d of them finished", len(dict.fromkeys(jobs)), len(dict.fromkeys(jobs)) - len(todo))
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(_train, job) for job in todo]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def finished(job: Job) -> bool:
    """Whether the run stands there, done under the same config."""
    config = job.folder / "config.yaml"
    if not (job.folder / "finished").is_file() or not config.is_file():
        return False
    changed = changed_keys(load_run(config), with_statistics(load_run(job.config, job.keys)))  # as the door saved it
    return not [key for key in changed if not key.startswith(KEYS_WITHOUT_EFFECT_ON_NUMBERS)]


def _train(job: Job) -> None:
    logs = job.runs.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / f"{job.folder.name}.txt"
    command = [sys.executable, "-m", "matformer.train", str(job.config), *job.keys]
    with file.open("ab") as out:
        code = subprocess.run(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        last = file.read_text(encoding="utf-8", errors="replace").strip().rsplit("\n", 1)[-1]
        raise CheckpointError(f"{job.folder.name} must end with 0, got {code}: {last}; see {file}, then start again")
    log.info("trained %s", job.folder.name)


def curve(folder: Path, *, key: str, over: str) -> list[tuple[float, float]]:
    """(`over`, `key`) on the way, under the weights of the moment, where `key` was measured."""
    points, seen = [], 0.0
    for row in read_metrics(folder / "metrics.jsonl"):
        seen = row.get(over, seen)
        if key in row:
            points.append((seen, row[key]))
    return points
