"""Rows of a global batch -> data-parallel ranks, so that none waits long for another."""

from __future__ import annotations

from collections.abc import Sequence


def ranks_that_share(dp_size: int, *, most: int) -> int:
    """Ranks of a group that deals its rows out together: the largest divisor of `dp_size` that is at most `most`."""
    return max(size for size in range(1, min(most, dp_size) + 1) if dp_size % size == 0)


def deal_rows(costs: Sequence[int], *, ranks: int) -> list[list[int]]:
    """Each rank's rows, ascending, as many for each: the dearest first, each to the rank with least that has room.

    Then pairs of rows are exchanged between the dearest and the cheapest rank while that brings the two nearer.
    Source of the first half: Graham 1969 (longest processing time first), with equal numbers of rows.
    """
    room = len(costs) // ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < room), key=lambda r: (loads[r], r))
        dealt[rank].append(row)
        loads[rank] += costs[row]
    while _exchange(dealt, loads, costs):
        pass
    return [sorted(rows) for rows in dealt]


def _exchange(dealt: list[list[int]], loads: list[int], costs: Sequence[int]) -> bool:
    """One exchange between the dearest and the cheapest rank, the best there is; False if none helps."""
    high, low = loads.index(max(loads)), loads.index(min(loads))
    gap = loads[high] - loads[low]
    moves = [
        (abs(gap - 2 * (costs[a] - costs[b])), i, j)
        for i, a in enumerate(dealt[high])
        for j, b in enumerate(dealt[low])
        if 0 < costs[a] - costs[b] < gap
    ]
    if not moves:
        return False
    _, i, j = min(moves)
    moved = costs[dealt[high][i]] - costs[dealt[low][j]]
    dealt[high][i], dealt[low][j] = dealt[low][j], dealt[high][i]
    loads[high] -= moved
    loads[low] += moved
    return True
