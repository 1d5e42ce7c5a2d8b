"""The rank grid: megatron's order, groups as written out."""

from __future__ import annotations

import pytest

from matformer.errors import ParallelError
from matformer.parallel.plan import Plan


def test_groups_are_those_of_the_docstring() -> None:
    plan = Plan(tp=2, pp=2, dp=2)
    assert plan.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert plan.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert plan.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_coordinates_and_rank_are_inverse() -> None:
    plan = Plan(tp=2, pp=3, dp=4)
    assert [plan.rank_at(**plan.coordinates(rank)._asdict()) for rank in range(24)] == list(range(24))


def test_groups_are_those_of_megatron() -> None:
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    ranks = parallel_state.RankGenerator(tp=2, ep=1, dp=3, pp=2, cp=1, order="tp-cp-ep-dp-pp")
    plan = Plan(tp=2, pp=2, dp=3)
    for axis in ("tp", "dp", "pp"):
        assert [list(group) for group in plan.groups(axis)] == sorted(ranks.get_ranks(axis))


def test_a_degree_below_one_is_refused() -> None:
    with pytest.raises(ParallelError, match="got tp 0, pp 1, dp 1"):
        Plan(tp=0)


def test_another_number_of_ranks_is_refused_with_every_factor() -> None:
    Plan(tp=2, dp=2).check_world(4)
    with pytest.raises(ParallelError, match=r"2 \* 1 \* 2 = 4 and 3"):
        Plan(tp=2, dp=2).check_world(3)
