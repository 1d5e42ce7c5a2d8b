"""The rank grid: megatron's order, groups as written out."""

from __future__ import annotations

import pytest

from matformer.parallel.plan import Axis, Plan


def test_groups_are_those_of_the_docstring() -> None:
    plan = Plan(tp=2, pp=2, dp=2)
    assert plan.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert plan.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert plan.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_coordinates_and_rank_are_inverse() -> None:
    plan = Plan(tp=2, cp=2, pp=3, dp=4)
    assert [plan.rank_at(**plan.coordinates(rank)._asdict()) for rank in range(48)] == list(range(48))


@pytest.mark.parametrize("axes", [("tp",), ("cp",), ("dp",), ("pp",), ("tp", "cp"), ("cp", "dp")])
def test_groups_are_those_of_megatron(axes: tuple[Axis, ...]) -> None:
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    ranks = parallel_state.RankGenerator(tp=2, ep=1, dp=3, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    plan = Plan(tp=2, cp=2, pp=2, dp=3)
    assert [list(group) for group in plan.groups(*axes)] == sorted(ranks.get_ranks("-".join(axes)))


def test_context_is_a_part_of_the_data_axis_that_megatron_sees() -> None:
    plan = Plan(tp=2, cp=2, pp=2, dp=3)
    assert plan.groups("cp", "dp") == Plan(tp=2, pp=2, dp=6).groups("dp")
