"""The launcher: its exit code is the ranks', and it adds a sentence only where they left none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from matformer import launch

# Ranks that do what a run does at its end, without its imports: one of them ends so, at once or when a signal comes.
RANKS = """
    import os, pathlib, signal, sys, time
    how, ending, when, here = *sys.argv[1:4], pathlib.Path(sys.argv[4])
    rank = os.environ["RANK"]
    def end():
        if rank != ending:
            return
        if how == "says why":
            sys.stderr.write(f"a sentence of rank {rank}\\n")
            sys.exit(2)
        if how == "crashes":
            sys.exit(1)
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "is interrupted":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    def stopped(number, frame):
        end()
        sys.exit(130)
    signal.signal(signal.SIGINT, stopped)
    (here / rank).touch()
    while not (here / "0").exists() or not (here / "1").exists():
        time.sleep(0.01)
    if when == "at once":
        end()
    if how != "finishes":
        time.sleep(60)
"""


def launched(tmp_path: Path, how: str, *, rank: int = 1, number: signal.Signals | None = None) -> tuple[int, str]:
    """Two ranks of which one ends so, once both got a signal if it is given: exit code and stderr of their launcher."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    command = [sys.executable, "-m", "matformer.launch", "--signals-to-handle=SIGINT", "--standalone"]
    when = "at a signal" if number else "at once"
    command += ["--nproc-per-node=2", str(script), how, str(rank), when, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        if number is not None:
            deadline = time.monotonic() + 60
            while not (tmp_path / "0").exists() or not (tmp_path / "1").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(number)
        _, error = process.communicate(timeout=100)
        return process.returncode, error


@pytest.mark.parametrize(
    ("how", "rank", "code", "words"),
    [
        ("finishes", 1, 0, ""),
        ("says why", 0, 2, "a sentence of rank 0\n"),
        ("crashes", 1, 1, "every rank must end well, but rank 1 failed with exit code 1; start again"),
        ("is killed", 1, 137, "every rank must end well, but rank 1 was ended by SIGKILL; start again"),
    ],
)
def test_the_exit_code_is_the_ranks_own(tmp_path: Path, how: str, rank: int, code: int, words: str) -> None:
    found, error = launched(tmp_path, how, rank=rank)
    assert found == code, error
    assert words in error and error.count("\n") == bool(words), error


def test_a_signal_ends_all_ranks_without_a_traceback(tmp_path: Path) -> None:
    assert launched(tmp_path, "waits", number=signal.SIGINT) == (130, "")


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("says why", 2, "a sentence of rank 1\n"),
        ("crashes", 1, "every rank must end well, but rank 1 failed with exit code 1; start again"),
        ("is killed", 137, "every rank must end well, but rank 1 was ended by SIGKILL; start again"),
        ("is interrupted", 1, "every rank must end well, but rank 1 was ended by SIGINT; start again"),
    ],
)
def test_stopped_and_saved_is_said_only_if_every_rank_has_saved(
    tmp_path: Path, how: str, code: int, words: str
) -> None:
    found, error = launched(tmp_path, how, number=signal.SIGINT)
    assert found == code, error
    assert words in error and error.count("\n") == 1, error


def test_ranks_share_the_cores_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(launch, "torchrun", lambda arguments: seen.append(os.environ["OMP_NUM_THREADS"]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that what it was comes back, also if there was none
    monkeypatch.delenv("OMP_NUM_THREADS")
    launch.main(["--nproc-per-node=2", "script.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launch.main(["--nproc-per-node=2", "script.py"])
    assert seen == ["4", "3"]


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_more_ranks_than_gpus_are_refused_before_any_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpus: int
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(launch, "torchrun", lambda arguments: started.append(True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    refused = gpus == 1
    assert launch.main(["--nproc-per-node=2", "script.py"]) == (2 if refused else 0)
    assert bool(started) != refused
    assert ("got 1 for 2; change parallel.*" in capsys.readouterr().err) == refused


def test_threads_are_the_configs_or_what_openmp_was_told() -> None:
    script = "import torch; from matformer.parallel.process import settle; {}; print(torch.get_num_threads())"
    for call, told, expected in (("settle(2)", "1", "2"), ("settle()", "1", "1"), ("settle()", "2", "2")):
        command = [sys.executable, "-c", script.format(call)]
        run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": told}, capture_output=True, check=True)
        assert run.stdout.decode().strip() == expected
