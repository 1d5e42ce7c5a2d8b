"""Runs of an ablation: the ordinary training door as processes of one thread, and held-out bits by document."""

from __future__ import annotations

import functools
import json
import logging
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matformer.config.load import changed_keys, load_run
from matformer.engine.evaluate import text_by_document
from matformer.engine.folder import KEYS_WITHOUT_EFFECT_ON_NUMBERS
from matformer.engine.restore import load_for_inference
from matformer.errors import CheckpointError
from matformer.files import write_whole
from matformer.observe.sinks import read_metrics
from matformer.parallel.process import settle

log = logging.getLogger("ablate.runs")

SCORES_FILE = "documents.json"
PROJECT = Path(__file__).resolve().parents[2]


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
    changed = changed_keys(load_run(config), load_run(job.config, job.keys))
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


def score_all(jobs: Sequence[Job], *, at_once: int, num_bytes: int) -> dict[Job, dict[str, Any]]:
    """For each job, `bits` and `bytes` of each document of `num_bytes` of held-out text under the last weights."""
    todo = [job for job in dict.fromkeys(jobs) if not _scored(job, num_bytes=num_bytes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, mp_context=context, initializer=settle, initargs=(1,)) as pool:
        for _ in pool.map(functools.partial(score, num_bytes=num_bytes), [job.folder for job in todo]):
            pass
    return {job: json.loads((job.folder / SCORES_FILE).read_text(encoding="utf-8")) for job in dict.fromkeys(jobs)}


def _scored(job: Job, *, num_bytes: int) -> bool:
    path = job.folder / SCORES_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["asked"] == num_bytes


def score(folder: Path, *, num_bytes: int) -> None:
    """Held-out documents of `num_bytes`, whole or not at all into the run's folder."""
    config, host, _ = load_for_inference(folder, ema=False)
    asked = config.eval.model_copy(update={"text_bytes": num_bytes})
    scored = text_by_document(host, config.model_copy(update={"eval": asked}))
    keys = sorted(scored)  # arms may pack them in another order
    bits, sizes = ([scored[key][part] for key in keys] for part in (0, 1))
    found = {"asked": num_bytes, "keys": keys, "bits": bits, "bytes": sizes}
    write_whole(folder / SCORES_FILE, json.dumps(found).encode())


def curve(folder: Path) -> list[tuple[float, float]]:
    """(bytes seen, held-out bits per byte) on the way, under the weights of the moment."""
    points, seen = [], 0.0
    for row in read_metrics(folder / "metrics.jsonl"):
        seen = row.get("bytes_seen", seen)
        if "heldout/text/bits_per_byte" in row:
            points.append((seen, row["heldout/text/bits_per_byte"]))
    return points
