"""Pipelines in numbers against the order in which megatron runs its forwards and backwards."""

from __future__ import annotations

import pytest

from matformer.hosts.megatron_on_cpu import importing_megatron
from matformer.parallel.pipeline import bubble_share, sends, waiting

with importing_megatron():
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

Step = tuple[bool, int, int]  # forward or not, microbatch, stage in running order

LAYOUTS = [
    (1, 1, 3),
    (2, 1, 2),
    (4, 1, 2),
    (4, 1, 9),
    (2, 2, 2),
    (2, 2, 6),
    (3, 2, 9),
    (4, 3, 4),
    (4, 3, 12),
    (8, 2, 8),
]


def steps_of(pp: int, rank: int, *, virtual: int, microbatches: int) -> list[Step]:
    """A rank's forwards and backwards in order: warm-up, one of each in turn, the rest."""
    table = get_schedule_table(microbatches, virtual, pp) if virtual > 1 else [(one, 0) for one in range(microbatches)]
    forwards = [(True, one, chunk * pp + rank) for one, chunk in table]
    backwards = [(False, one, (virtual - 1 - chunk) * pp + rank) for one, chunk in table]
    ahead = min((pp - rank - 1) * 2 + (virtual - 1) * pp if virtual > 1 else pp - rank - 1, len(table))
    order = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(table) - ahead :]


@pytest.mark.parametrize(("pp", "virtual", "microbatches"), LAYOUTS)
def test_what_waits_is_what_the_order_leaves(pp: int, virtual: int, microbatches: int) -> None:
    for rank in range(pp):
        held, seen = [0] * virtual, []
        for forward, _, stage in steps_of(pp, rank, virtual=virtual, microbatches=microbatches):
            held[stage // pp] += 1 if forward else -1
            seen.append(tuple(held))
        assert not any(held)
        most = max(map(sum, seen))
        found = waiting(pp, rank, virtual=virtual, microbatches=microbatches)
        assert found == {one for one in seen if sum(one) == most}


def finished(pp: int, *, virtual: int, microbatches: int) -> int:
    """When the last step ends: a forward takes 1, a backward 2, none begins before what it needs; sends take none."""
    last, ends = pp * virtual - 1, {}
    orders = [steps_of(pp, rank, virtual=virtual, microbatches=microbatches) for rank in range(pp)]
    clocks, places = [0] * pp, [0] * pp
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                forward, one, stage = step = order[places[rank]]
                before = (True, one, stage - 1) if forward else (False, one, stage + 1)
                needed = stage > 0 if forward else stage < last
                if needed and before not in ends:
                    break
                clocks[rank] = max(clocks[rank], ends[before] if needed else 0) + (1 if forward else 2)
                ends[step] = clocks[rank]
                places[rank] += 1
    return max(clocks)


@pytest.mark.parametrize(("pp", "virtual", "microbatches"), LAYOUTS)
def test_the_bubble_is_that_of_the_order(pp: int, virtual: int, microbatches: int) -> None:
    work = 3 * virtual * microbatches
    waits = 1 - work / finished(pp, virtual=virtual, microbatches=microbatches)
    assert waits == pytest.approx(bubble_share(pp, virtual=virtual, microbatches=microbatches))


@pytest.mark.parametrize(("pp", "virtual", "microbatches"), LAYOUTS)
def test_sends_are_those_of_the_rank_that_sends_most(pp: int, virtual: int, microbatches: int) -> None:
    last, by_rank = pp * virtual - 1, []
    for rank in range(pp):
        order = steps_of(pp, rank, virtual=virtual, microbatches=microbatches)
        by_rank.append(sum(stage < last if forward else stage > 0 for forward, _, stage in order) if pp > 1 else 0)
    assert max(by_rank) == microbatches * sends(pp, virtual=virtual)
