"""The training door in one process: what signals do before and after the last step, what a stopped run still owes."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from matformer import train as door
from matformer.config.schema import RunConfig
from matformer.observe.sinks import MetricsFile
from matformer.train import STOPPED, Stop
from tests.made import plain_host, tiny_run

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)  # what pretrain.sh passes on


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The system's own (a suite under nohup ignores hangups); after, as they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_ends_nothing_until_all_is_saved(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    stop = Stop()
    assert not stop.asked
    signal.raise_signal(number)
    assert stop.asked
    with pytest.raises(SystemExit) as left:
        stop.all_is_saved()
    assert left.value.code == STOPPED
    stop = Stop()
    stop.all_is_saved()
    with pytest.raises(SystemExit) as left:
        signal.raise_signal(number)
    assert left.value.code == STOPPED
    first, _, last = caplog.messages
    assert first == f"{number.name}: the step in hand is finished and saved, then the run stops"
    assert last == f"{number.name}: all steps are saved; the same command finishes the run"


def test_a_second_ctrl_c_ends_at_once() -> None:
    Stop()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.asked


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The door of a tiny run, on the plain host."""
    config = tiny_run()
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(tmp_path)})})
    monkeypatch.setattr(door, "load_run", lambda *asked: config)
    monkeypatch.setattr(door, "check", lambda config: None)
    monkeypatch.setattr(door, "with_statistics", lambda config: config)
    monkeypatch.setattr(door, "build_host", plain_host)
    return lambda: door.main(["made.yaml"])


@pytest.mark.parametrize("during", ["_train", "_show_what_it_learned"])
def test_a_signal_after_the_last_step_ends_the_run_unfinished(
    opened: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    evaluated: list[Path] = []
    monkeypatch.setattr(door, "_train", lambda config, **_: True)
    monkeypatch.setattr(door, "_show_what_it_learned", evaluated.append)
    with monkeypatch.context() as here:
        here.setattr(door, during, lambda *_, **__: signal.raise_signal(signal.SIGTERM) or True)
        with pytest.raises(SystemExit) as left:
            opened()
        assert left.value.code == STOPPED
        assert not evaluated and not (tmp_path / "made" / "finished").exists()
    assert opened() == 0
    assert evaluated == [tmp_path / "made"] and (tmp_path / "made" / "finished").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_everything_is_closed(
    opened: Callable[[], int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """A file whose rows find no room finds none when it is closed, either."""
    closed: list[str] = []

    class Closed:
        def __init__(self, *_: object, name: str = "loader", full: bool = False, **__: object) -> None:
            self.name, self.full = name, full

        def close(self) -> None:
            closed.append(self.name)
            if self.full:
                raise OSError(number, os.strerror(number))

    def full(*_: object, **__: object) -> bool:
        raise OSError(number, os.strerror(number))

    sinks = [Closed(name="metrics", full=True), Closed(name="wandb"), Closed(name="progress", full=True)]
    monkeypatch.setattr(door, "Loader", Closed)
    monkeypatch.setattr(door, "build_model", lambda host, config: None)
    monkeypatch.setattr(door, "_sinks", lambda *_, **__: sinks)
    monkeypatch.setattr(door, "train", full)
    assert opened() == 2
    assert sorted(closed) == ["loader", "metrics", "progress", "wandb"]
    assert "the disk must have room for the run's files, got: " in caplog.messages[-1]


def owes(path: Path, step: int, *, every_steps: int = 4) -> bool:
    config: RunConfig = tiny_run(train={"steps": 10})
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"every_steps": every_steps})})
    return door.owes_heldout(path, config, step=step)


def test_a_run_owes_the_held_out_numbers_that_its_metrics_lack(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (3, 4, 8, 10):
        metrics.update(step, {"loss": 1.0})
    metrics.update(8, {"heldout/text/bits_per_byte": 2.0})
    metrics.close()
    assert [step for step in (3, 4, 8, 10) if owes(metrics.path, step)] == [4, 10]
    assert [step for step in (3, 4, 8, 10) if owes(metrics.path, step, every_steps=0)] == [10]
