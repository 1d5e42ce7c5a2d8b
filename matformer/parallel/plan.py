"""Degrees of parallelism, and which rank holds what: arithmetic only, no process is asked.

Ranks are counted with the tensor axis fastest, then context, data, pipeline. Megatron counts as much, with context and
data as one axis. With tp 2, dp 2, pp 2:

               dp 0    dp 1
    pp 0       0 1     2 3       each pair is a tensor group, {0, 2} a data group, {0, 4} a pipeline group
    pp 1       4 5     6 7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Axis = Literal["tp", "cp", "dp", "pp"]


class Coordinates(NamedTuple):
    """Where a rank stands on each axis, from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True, slots=True)
class Plan:
    """tp * cp * dp * pp ranks."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        """The product of all degrees."""
        return self.tp * self.cp * self.dp * self.pp

    def coordinates(self, rank: int) -> Coordinates:
        """Where a global rank stands."""
        assert 0 <= rank < self.num_ranks
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(tp, cp, dp, pp)

    def rank_at(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The global rank that stands there: `coordinates` backwards."""
        assert tp < self.tp and cp < self.cp and dp < self.dp and pp < self.pp
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def groups(self, *axes: Axis) -> tuple[tuple[int, ...], ...]:
        """The ranks that differ on these axes alone, ascending; each rank in exactly one group, by their first rank."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_ranks):
            here = self.coordinates(rank)._asdict()
            found.setdefault(tuple(place for axis, place in here.items() if axis not in axes), []).append(rank)
        return tuple(tuple(group) for group in found.values())
