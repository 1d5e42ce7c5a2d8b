"""Sinks: rows survive a crash, a resume rewrites what it repeats, and trouble with wandb stops nothing."""

from __future__ import annotations

import builtins
import gc
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest
from rich.console import Console

from matformer.observe.progress import ProgressLine, amount_text, duration_text
from matformer.observe.sinks import MetricsFile, WandbSink, read_metrics


@pytest.fixture
def metrics(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    yield file
    file.close()


def test_a_row_is_on_disk_before_the_file_is_closed(metrics: MetricsFile) -> None:
    metrics.update(1, {"loss": 2.5})
    assert json.loads(metrics.path.read_text()) == {"step": 1, "loss": 2.5}


def test_truncate_forgets_later_steps_and_writing_goes_on(metrics: MetricsFile) -> None:
    for step in range(1, 6):
        metrics.update(step, {"loss": float(step)})
    metrics.update(3, {"heldout/text/bits_per_byte": 2.0})
    metrics.truncate_after(3)
    metrics.update(4, {"loss": -4.0})
    rows = read_metrics(metrics.path)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4]
    assert rows[-1]["loss"] == -4.0


def test_a_torn_last_line_is_gone_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    again = MetricsFile(path)
    again.update(2, {"loss": 2.0})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
    ]


def test_what_is_not_finite_stays_json(metrics: MetricsFile) -> None:
    metrics.update(1, {"loss": float("nan"), "lr": 1.0})
    assert "NaN" not in metrics.path.read_text()
    assert read_metrics(metrics.path) == [{"step": 1, "loss": None, "lr": 1.0}]


def test_a_missing_wandb_is_one_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError("no module named wandb")
        return original(name, *args, **kwargs)

    original = builtins.__import__
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    sink = WandbSink(tmp_path, name="x", config={})
    sink.update(1, {"loss": 1.0})
    sink.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_wandb_writes_offline_into_the_run_folder_and_nowhere_else(tmp_path: Path, monkeypatch, capfd) -> None:
    pytest.importorskip("wandb")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    sink = WandbSink(tmp_path / "run", name="x", config={"seed": 1})
    sink.update(1, {"loss": 1.0})
    sink.update(1, {"heldout/text/bits_per_byte": 2.0})
    sink.close()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert not list(elsewhere.iterdir())
    assert capfd.readouterr().out == ""


def end_wandb(*, after_seconds: float = 0.0) -> None:
    """SIGKILL to the process that wandb has started; until then it answers nothing."""
    children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    (core,) = [int(pid) for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(core, signal.SIGSTOP)
    if after_seconds:
        Timer(after_seconds, os.kill, [core, signal.SIGKILL]).start()
    else:
        os.kill(core, signal.SIGKILL)


def rows_and_end(sink: WandbSink) -> None:
    for step in range(2, 100):  # a socket takes a row or two before it says that nobody reads
        sink.update(step, {"loss": 1.0})
    sink.close()


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # wandb waits for none that failed
@pytest.mark.parametrize(
    ("after_seconds", "then"), [(0.0, rows_and_end), (0.0, WandbSink.close), (0.5, WandbSink.close)]
)
def test_a_wandb_that_ends_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, after_seconds: float, then: Callable[[WandbSink], None]
) -> None:
    pytest.importorskip("wandb")
    sink = WandbSink(tmp_path, name="x", config={})
    sink.update(1, {"loss": 1.0})
    end_wandb(after_seconds=after_seconds)
    then(sink)
    sink.update(100, {"loss": 1.0})
    sink.close()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("matformer")]
    assert len(ours) == 1 and ours[0].startswith("wandb gets no more rows, it failed: "), ours
    gc.collect()


def test_a_disabled_wandb_is_not_even_imported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    WandbSink(tmp_path / "w", name="x", config={}, mode="disabled").update(1, {"loss": 1.0})
    assert not (tmp_path / "w").exists()


def test_plain_lines_come_by_steps_or_by_seconds_and_at_the_end(caplog) -> None:
    now = [0.0]
    line = ProgressLine(
        100, console=Console(file=io.StringIO()), every_steps=50, every_seconds=10.0, clock=lambda: now[0]
    )
    with caplog.at_level(logging.INFO):
        for step in range(1, 101):
            now[0] += 3.0 if 10 <= step < 14 else 0.01
            line.update(step, {"loss": 1.5, "image/flow_loss": 0.25, "bytes_per_second": 12_345.0})
    line.close()
    texts = [record.getMessage() for record in caplog.records]
    assert [text.split()[1] for text in texts] == ["1/100", "13/100", "63/100", "100/100"]
    assert "loss 1.500" in texts[0] and "image 0.250" in texts[0] and "12.3 k" in texts[0]


def test_a_terminal_gets_a_live_line_with_the_time_left() -> None:
    now, screen = [0.0], io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    line = ProgressLine(10, console=console, clock=lambda: now[0])
    now[0] = 4.0
    line.update(4, {"loss": 1.25, "text/bits_per_byte": 2.0, "router/accuracy": 0.5})
    line.close()
    assert "text 2.000 bit/byte" in screen.getvalue()
    assert "router 50%" in screen.getvalue()
    assert "0:06" in screen.getvalue()


def test_amounts_and_durations_read_well() -> None:
    assert [amount_text(value) for value in (950, 12_345, 3.2e6)] == ["950 ", "12.3 k", "3.2 M"]
    assert [duration_text(value) for value in (None, 59.6, 3_725)] == ["–", "1:00", "1:02:05"]
