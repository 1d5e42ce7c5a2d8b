"""The doors as a user opens them: real processes, real files, a model so small that a start is all it costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from matformer.checkpoint.store import complete

Row = dict[str, Any]

CONFIG = "configs/run/demo.yaml"
STEPS, SAVED_EVERY = 8, 3
# Media stand in the first steps, text alone in the last ones; 132 latents hold the longest sound twice, and halve.
TINY = (
    "model.atto={width: 64, layers: 2, heads: 4, kv_heads: 2, ffn_width: 96, rotary_pairs: [2, 2, 2, 2]}",
    "model.text={width: 32, heads: 2, ffn_width: 48, preludio_layers: 1, coda_layers: 1, window: 16, ngram_rows: 256}",
    "model.media.image.coda_width=32",
    "model.media.audio.coda_width=32",
    "data.sources.text.weight=0.02",
    "data.sequence_latents=132",
    "data.lanes=4",
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.warmup_steps=2",
    "eval.every_steps=4",
    "eval.text_bytes=2000",
    "eval.media_spans=2",
    "eval.final_text_bytes=null",
    "eval.final_media_spans=null",
    "eval.captioned_spans=4",
    "parallel.threads=1",
    f"run.save_every_steps={SAVED_EVERY}",
    "run.report=false",
    "run.wandb=disabled",
)
# What a bare machine has: no compiler, no ninja.
PROGRAMS = (
    "bash sh env cat head tail sed grep cut tr sort mkdir rm mv cp ln ls touch dirname basename date sleep uname id "
    "nproc mktemp readlink realpath wc tee test true false flock git make"
).split()
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "ninja", "nvcc")
CLOCK = ("seconds", "_per_second")
LIMIT_SECONDS = 240


@dataclass(frozen=True)
class End:
    """How a process ended."""

    code: int
    out: str
    error: str

    @property
    def sentences(self) -> list[str]:
        """Lines on stderr."""
        return self.error.splitlines()


@dataclass(frozen=True)
class Doors:
    """Starts of `slurm/pretrain.sh` and of the other doors, on one data set, below one folder."""

    project: Path
    data: Path
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run_folder(self, name: str) -> Path:
        """Where the run `name` lives."""
        return self.folder / name / "run"

    def overrides(self, name: str, *more: str) -> list[str]:
        """Every run is named "run" in a parent folder of its own, so that a copy of it is the same run."""
        data = [f"data.root={self.data}", "data.recipe=null"]  # a synthetic set: the recipe makes another
        return ["name=run", f"run.folder={self.folder / name}", *data, *TINY, *more]

    def start(self, name: str, *overrides: str) -> subprocess.Popen[str]:
        """The training script, in a session of its own."""
        command = ["bash", "slurm/pretrain.sh", CONFIG, *self.overrides(name, *overrides)]
        return self._started(command)

    def train(self, name: str, *overrides: str) -> End:
        """The training script's end."""
        return end_of(self.start(name, *overrides))

    def door(self, *arguments: str) -> End:
        """The end of `python -m ARGUMENTS`."""
        return end_of(self._started([sys.executable, "-m", *arguments]))

    def copy(self, name: str, new_name: str, *, unfinished: bool = False) -> Path:
        """A copy of a run's folder under another parent, as if it had not yet been marked as finished."""
        copied = Path(shutil.copytree(self.run_folder(name), self.run_folder(new_name)))
        if unfinished:
            (copied / "finished").unlink()
        return copied

    def _started(self, command: list[str]) -> subprocess.Popen[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        environment = kept | {"MATFORMER_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | self.environment
        return subprocess.Popen(
            command,
            cwd=self.project,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def end_of(process: subprocess.Popen[str]) -> End:
    """Wait for the end; whatever takes too long is killed with all that it started."""
    try:
        out, error = process.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        kill_family(process.pid)
        out, error = process.communicate()
        error += f"\nkilled after {LIMIT_SECONDS} s"
    return End(process.returncode, out, error)


def wait_for(process: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    """Return as soon as it holds; the process must still be running then."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be disturbed"
        time.sleep(0.004)


def family(pid: int) -> list[int]:
    """A process and all that it started, the eldest first; torchrun's workers lead sessions of their own."""
    return [pid, *(one for child in _children(pid) for one in family(child))]


def _children(pid: int) -> Iterator[int]:
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from (int(child) for child in file.read_text().split())


def kill_family(pid: int) -> None:
    """SIGKILL to a process and all that it started: stopped first, so that nobody sees another die."""
    members = family(pid)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for member in members:
            try:
                os.kill(member, number)
            except ProcessLookupError:
                continue


def bare_path(folder: Path) -> Path:
    """A folder for PATH that links the few programs a bare machine has."""
    folder.mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        if found is not None:
            (folder / name).symlink_to(found)
    for name in ("python", "python3"):
        (folder / name).symlink_to(sys.executable)
    return folder


def metrics(run: Path) -> list[Row]:
    """Rows of metrics.jsonl as they lie there, a last line that is being written left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def numbers(run: Path) -> list[Row]:
    """Rows without what the clock says."""
    return [{key: value for key, value in row.items() if not key.endswith(CLOCK)} for row in metrics(run)]


def series(run: Path, key: str) -> list[float]:
    """A number by step."""
    return [row[key] for row in metrics(run) if key in row]


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return complete(run / "checkpoints")


def newest_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoints(run)[-1].glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def flip(path: Path, place: int) -> None:
    """Damage one byte of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))
