"""A hosted run on a device of its own: no tensor of the CPU meets the device's or enters a collective."""

from __future__ import annotations

from typing import Any

import pytest

from matformer.config.check import check_degrees, check_stages, check_zero
from tests.made import text_only, tiny_run, with_both
from tests.ranks.device import walk
from tests.ranks.launcher import Ranks, RanksFailed

LAYOUTS: dict[str, dict[str, Any]] = {
    "zero 1": {},
    "offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "zero 3": {"zero_stage": 3, "dp": 2, "tp": 2},
    "shares": {"tp": 2, "cp": 2, "sequence_parallel": True},
    "stages": {"pp": 2, "virtual_stages": 2},
}


def walked(layout: dict[str, Any], *, rank: int = 0, fault: str = "") -> tuple[set[str], set[str]]:
    config = tiny_run(layers=4, train={"clip": 1.0}, dtype="bfloat16", **layout)
    for rule in (check_degrees, check_stages, check_zero):
        rule(config)
    with Ranks(1) as ranks:
        (found,) = ranks.run(walk, config, [with_both(1), text_only(2)], rank, fault, limit_seconds=240.0)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_stays_on_its_device(name: str) -> None:
    assert walked(LAYOUTS[name]) == ({"cpu"}, {"gpu:0"})


def test_the_last_stage_stays_on_its_device() -> None:
    assert walked(LAYOUTS["stages"], rank=1) == ({"cpu"}, {"gpu:0"})


@pytest.mark.parametrize(
    ("fault", "said"),
    [("step", "_fused_adamw_"), ("average", "_foreach_lerp_"), ("totals", "c10d::allreduce_: a tensor on cpu")],
)
def test_what_only_a_gpu_would_show_is_seen(fault: str, said: str) -> None:
    with pytest.raises(RanksFailed, match=said):
        walked(LAYOUTS["zero 1"] | {"dp": 2}, fault=fault)
