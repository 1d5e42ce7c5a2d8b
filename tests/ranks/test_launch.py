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

# Ranks that do what a run does at its end, without its imports.
RANKS = """
    import os, pathlib, signal, sys, time
    ending, here = sys.argv[1], pathlib.Path(sys.argv[2])
    rank = os.environ["RANK"]
    def stopped(number, frame):
        if ending == "cannot save" and rank == "1":
            sys.stderr.write("a sentence of rank 1\\n")
            sys.exit(2)
        if ending == "crashes as it saves" and rank == "1":
            sys.exit(1)
        if ending == "is killed as it saves" and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if ending == "interrupted" and rank == "1":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        sys.exit(130)
    signal.signal(signal.SIGINT, stopped)
    (here / rank).touch()
    while not (here / "0").exists() or not (here / "1").exists():
        time.sleep(0.01)
    if ending == "refused" and rank == "0":
        sys.stderr.write("a sentence of rank 0\\n")
        sys.exit(2)
    if ending == "crashed" and rank == "1":
        sys.exit(1)
    if ending == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending != "finished":
        time.sleep(60)
"""


def launched(tmp_path: Path, ending: str, *, number: signal.Signals | None = None) -> tuple[int, str]:
    """Two ranks that end so, or get a signal: exit code and stderr of their launcher."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    command = [sys.executable, "-m", "matformer.launch", "--signals-to-handle=SIGINT", "--standalone"]
    command += ["--nproc-per-node=2", str(script), ending, str(tmp_path)]
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
    ("ending", "code", "words"),
    [
        ("finished", 0, ""),
        ("refused", 2, "a sentence of rank 0\n"),
        ("crashed", 1, "every rank must end well, but rank 1 failed with exit code 1; start again"),
        ("killed", 137, "every rank must end well, but rank 1 was ended by SIGKILL; start again"),
    ],
)
def test_the_exit_code_is_the_ranks_own(tmp_path: Path, ending: str, code: int, words: str) -> None:
    found, error = launched(tmp_path, ending)
    assert found == code, error
    assert words in error and error.count("\n") == bool(words), error


def test_a_signal_ends_all_ranks_without_a_traceback(tmp_path: Path) -> None:
    assert launched(tmp_path, "waits", number=signal.SIGINT) == (130, "")


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("cannot save", 2, "a sentence of rank 1\n"),
        ("crashes as it saves", 1, "every rank must end well, but rank 1 failed with exit code 1; start again"),
        ("is killed as it saves", 137, "every rank must end well, but rank 1 was ended by SIGKILL; start again"),
        ("interrupted", 1, "every rank must end well, but rank 1 was ended by SIGINT; start again"),
    ],
)
def test_stopped_and_saved_is_said_only_if_every_rank_has_saved(
    tmp_path: Path, ending: str, code: int, words: str
) -> None:
    found, error = launched(tmp_path, ending, number=signal.SIGINT)
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
