"""A checkpoint knows no layout: what one wrote, any other reads, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matformer.checkpoint.store import Checkpoint, complete
from matformer.config.schema import RunConfig
from matformer.errors import CheckpointError
from tests.made import plain_host, text_only, tiny_run, with_audio, with_both, with_images
from tests.ranks import cases
from tests.ranks.cases import Arrays, GlobalBatch
from tests.ranks.launcher import Ranks
from tests.tolerances import LOSS

World = Callable[[int], Ranks]
STEPS = 2  # before the checkpoint

TP2: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
PP2: dict[str, Any] = {"pp": 2}
CP2: Mapping[str, Any] = {"cp": 2}
DP2: dict[str, Any] = {"dp": 2}
ZERO2: dict[str, Any] = {"dp": 2, "zero_stage": 2}
ZERO3: dict[str, Any] = {"dp": 2, "zero_stage": 3}


def run_of(layout: Mapping[str, Any]) -> RunConfig:
    return tiny_run(**layout)


@cache
def steps() -> list[GlobalBatch]:
    """Two steps before the checkpoint, one after."""
    return [[with_both(9 * i), text_only(9 * i), with_images(9 * i), with_audio(9 * i)] for i in range(STEPS + 1)]


def stored(path: Path) -> dict[str, Arrays]:
    """Everything in a checkpoint, by kind and name."""
    checkpoint = Checkpoint(path)
    found: dict[str, Arrays] = {}
    for key, value in checkpoint.read(list(checkpoint.shapes)).items():
        kind, name = key.split("/", 1)
        found.setdefault(kind, {})[name] = value.numpy()
    return found


def assert_holds(seen: Sequence[dict[str, Arrays]], expected: dict[str, Arrays]) -> None:
    """All ranks together hold each tensor once, with the very bits of the checkpoint."""
    for kind, values in expected.items():
        assert sorted(name for rank in seen for name in rank[kind]) == sorted(values), kind
        for rank in seen:
            for name, value in rank[kind].items():
                assert np.array_equal(value, values[name]), f"{kind}/{name}"


@pytest.mark.parametrize(
    ("writer", "readers"),
    [(TP2, [TP2, DP2, ZERO3, PP2, CP2]), (PP2, [TP2, ZERO2]), (ZERO3, [ZERO3, TP2]), (CP2, [ZERO2])],
    ids=["tp2", "pp2", "zero3", "cp2"],
)
def test_what_a_layout_writes_any_other_reads_bit_for_bit(
    writer: Mapping[str, Any], readers: list[Mapping[str, Any]], world: World, tmp_path: Path
) -> None:
    following = world(2).run(cases.train_and_save, run_of(writer), steps(), tmp_path)[0]
    (path,) = complete(tmp_path)
    expected = stored(path)
    assert sorted(expected) == ["ema", "exp_avg", "exp_avg_sq", "weights"]

    config = tiny_run()
    held, loss = cases.show_loaded(plain_host(config, stirred=False), config, path, steps()[-1], STEPS)
    assert_holds([held], expected)
    assert loss == pytest.approx(following, rel=LOSS)
    for reader in readers:
        shown = world(2).run(cases.load_and_show, run_of(reader), path, steps()[-1], STEPS)
        assert_holds([held for held, _ in shown], expected)
        for _, loss in shown:
            if reader is writer:
                assert loss == following  # the same layout: the same bits
            assert loss == pytest.approx(following, rel=LOSS)


def test_a_rank_that_alone_cannot_write_fails_all_ranks_at_once(world: World, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file, where a folder should be")
    with pytest.raises(AssertionError, match="CheckpointError") as error:
        world(2).run(cases.train_and_save, run_of(TP2), steps(), blocked / "checkpoints", limit_seconds=30.0)
    assert str(error.value).count(CheckpointError.__name__) >= 2
    assert "still running" not in str(error.value)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("layout", [TP2, CP2, DP2, ZERO3], ids=["tp2", "cp2", "dp2", "zero3"])
def test_ranks_that_hold_the_same_share_what_is_written(layout: Mapping[str, Any], world: World) -> None:
    held = [sum(sizes) for sizes in world(2).run(cases.sizes_of_state, run_of(layout))]
    assert min(held) > 0.45 * sum(held)


def test_each_rank_reads_a_part_of_the_files_for_their_digests(world: World, tmp_path: Path) -> None:
    shown = world(2).run(cases.save_and_read_again, run_of(DP2), tmp_path)
    older, newest = complete(tmp_path)
    tensor_files = sorted(path.name for path in newest.glob("*.safetensors"))
    assert [written for written, *_ in shown] == [[tensor_files[0], "state.json"], [tensor_files[1]]]
    parts = [read for _, read, *_ in shown]
    assert all(parts) and sorted(parts[0] + parts[1]) == [*tensor_files, "state.json"]
    assert [found for *_, found, _ in shown] == [newest, newest]
    assert [found for *_, found in shown] == [older, older]
