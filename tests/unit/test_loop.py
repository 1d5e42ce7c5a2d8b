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
from matformer.errors import TrainingError
from matformer.hosts.base import Host
from matformer.parcels import Batch
from tests.made import SameBatches, plain_host, poisoned, text_only, tiny_run, with_images

STEPS = 4


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


def run_of(config: RunConfig, folder: Path, *, batches: list[Batch] | None = None) -> tuple[Run, Seen]:
    """The tiny model's run, its checkpoints in `folder`, the newest taken if there is one."""
    host, seen = plain_host(config), Seen(folder)
    run = Run(
        config,
        host,
        cast(Loader, SameBatches([[one] for one in batches or [text_only(1)]])),
        Average(host, decay=0.9),
        folder,
        sinks=[seen],
    )
    run.resume()
    return run, seen


def config_of(*, steps: int = STEPS, run: dict[str, Any] | None = None, **eval_keys: Any) -> RunConfig:
    config = tiny_run(train={"steps": steps})
    keys = {"eval": config.eval.model_copy(update=eval_keys), "run": config.run.model_copy(update=run)}
    return config.model_copy(update=keys)


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


def never(host: Host) -> dict[str, float]:
    raise AssertionError("a run that learns nothing was evaluated")


@pytest.mark.parametrize(
    ("steps", "limit", "ends", "saved"), [(100, 20, 20, "no checkpoint was written"), (3, 20, 3, "step 2 stays")]
)
def test_a_run_whose_every_gradient_is_not_finite_fails(
    tmp_path: Path, steps: int, limit: int, ends: int, saved: str
) -> None:
    config = config_of(steps=steps, run={"max_skipped_steps": limit, "save_every_steps": 100 if steps == 100 else 2})
    run, seen = run_of(config, tmp_path, batches=[poisoned(with_images(1))])
    with pytest.raises(TrainingError) as error:
        train(run, stopping=asked_in(*[False] * (ends - 1), True), evaluate=never)
    assert error.value.exit_code == 2
    assert f"at least once in {ends} steps, got none in steps 1 to {ends}; " in str(error.value)
    assert saved in str(error.value) and "run.max_skipped_steps" in str(error.value)
    assert seen.rows[-1][:2] == ("step", ends)  # what the last step showed is kept
    assert run.host.state().step == 0


def test_skipped_steps_count_in_a_row_and_over_a_stop(tmp_path: Path) -> None:
    config = config_of(steps=9, run={"max_skipped_steps": 3})
    sound, bad = with_images(1), poisoned(with_images(1))
    run, _ = run_of(config, tmp_path, batches=[bad, bad, sound, bad, bad, sound, bad, bad, bad])
    assert not train(run, stopping=asked_in(*[False] * 7, True), evaluate=heldout)
    again, _ = run_of(config, tmp_path, batches=[bad] * 9)
    with pytest.raises(TrainingError, match="in 3 steps, got none in steps 7 to 9; the checkpoint of step 8 stays"):
        train(again, stopping=asked_in(), evaluate=never)
    assert complete(tmp_path)[-1].name == "step-000008"
