"""The training loop: what is saved, shown and evaluated in which order, and what a stop leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from matformer.checkpoint.store import complete
from matformer.config.schema import RunConfig
from matformer.data.loader import Loader
from matformer.engine.average import Average
from matformer.engine.loop import Run, train
from matformer.hosts.base import Host
from matformer.parcels import Batch
from tests.made import plain_host, text_only, tiny_run

STEPS = 4


class Batches:
    """In the loader's place: the same text in every step."""

    def next_global_batch(self, step: int) -> list[Batch]:
        return [text_only(1)]

    def state(self) -> dict[str, Any]:
        return {"step": 0, "num_lanes": 1, "lanes": {}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


@dataclass
class Seen:
    """A sink: each row as (its kind, its step, the newest checkpoint by then)."""

    checkpoints: Path
    rows: list[tuple[str, int, str]] = field(default_factory=list)

    def update(self, step: int, row: Mapping[str, float]) -> None:
        kind = "heldout" if any(name.startswith("heldout") for name in row) else "step"
        self.rows.append((kind, step, complete(self.checkpoints)[-1].name if complete(self.checkpoints) else ""))

    def close(self) -> None:
        pass


def heldout(host: Host) -> dict[str, float]:
    return {"heldout/text/bits_per_byte": 8.0}


def run_of(config: RunConfig, folder: Path) -> tuple[Run, Seen]:
    """The tiny model's run, its checkpoints in `folder`, the newest taken if there is one."""
    host, seen = plain_host(config), Seen(folder)
    run = Run(config, host, cast(Loader, Batches()), Average(host, decay=0.9), folder, sinks=[seen])
    run.resume()
    return run, seen


def config_of(**eval_keys: Any) -> RunConfig:
    config = tiny_run(train={"steps": STEPS})
    return config.model_copy(update={"eval": config.eval.model_copy(update=eval_keys)})


def asked_in(*answers: bool) -> Callable[[], bool]:
    """Asked in the steps whose answer is True; in none after them."""
    left = list(answers)
    return lambda: bool(left) and left.pop(0)


def test_a_stop_saves_before_anything_is_shown_and_evaluates_nothing(tmp_path: Path) -> None:
    run, seen = run_of(config_of(every_steps=2), tmp_path)
    assert not train(run, stopping=asked_in(False, True), evaluate=heldout)
    assert seen.rows == [("step", 1, ""), ("step", 2, "step-000002")]


def test_a_sink_that_fails_after_a_stop_loses_nothing(tmp_path: Path) -> None:
    run, _ = run_of(config_of(), tmp_path)

    class Broken(Seen):
        def update(self, step: int, row: Mapping[str, float]) -> None:
            raise OSError("broken")

    run.sinks = [Broken(tmp_path)]
    with pytest.raises(OSError, match="broken"):
        train(run, stopping=asked_in(True), evaluate=heldout)
    again, _ = run_of(config_of(), tmp_path)
    assert again.step == 1
    assert again.throughput.totals["bytes"] == text_only(1).num_bytes  # of the step that was saved


def test_held_out_numbers_that_a_stop_left_out_come_first_when_the_run_goes_on(tmp_path: Path) -> None:
    run, _ = run_of(config_of(every_steps=2), tmp_path)
    train(run, stopping=asked_in(False, True), evaluate=heldout)
    run, seen = run_of(config_of(every_steps=2), tmp_path)
    run.owes_heldout = True
    assert train(run, stopping=asked_in(), evaluate=heldout)
    assert [row[:2] for row in seen.rows] == [("heldout", 2), ("step", 3), ("step", 4), ("heldout", 4)]


def test_a_stop_in_the_last_step_is_evaluated_and_is_a_stop_all_the_same(tmp_path: Path) -> None:
    run, seen = run_of(config_of(), tmp_path)
    assert not train(run, stopping=asked_in(False, False, False, True), evaluate=heldout)
    assert seen.rows[-2:] == [("step", 4, "step-000004"), ("heldout", 4, "step-000004")]
    run, seen = run_of(config_of(), tmp_path)
    assert train(run, stopping=asked_in(), evaluate=heldout) and not seen.rows
