"""Degrees of parallelism, and which rank holds what: arithmetic only, no process is asked.

Ranks are counted in megatron's order, the tensor axis fastest, then data, then pipeline. With tp 2, dp 2, pp 2:

               dp 0    dp 1
    pp 0       0 1     2 3       each pair is a tensor group, {0, 2} a data group, {0, 4} a pipeline group
    pp 1       4 5     6 7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from matformer.errors import ParallelError

Axis = Literal["tp", "pp", "dp"]


class Coordinates(NamedTuple):
    """Where a rank stands on each axis, from 0."""

    tp: int
    pp: int
    dp: int


@dataclass(frozen=True, slots=True)
class Plan:
    """tp * pp * dp ranks. Raises ParallelError for a degree below 1."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp) < 1:
            raise ParallelError(
                f"every degree must be at least 1, got tp {self.tp}, pp {self.pp}, dp {self.dp}; change parallel"
            )

    @property
    def num_ranks(self) -> int:
        """The product of all degrees."""
        return self.tp * self.pp * self.dp

    def check_world(self, world_size: int) -> None:
        """Raise ParallelError unless exactly the plan's ranks were started."""
        if world_size != self.num_ranks:
            raise ParallelError(
                f"parallel.tp * pp * dp must be the number of ranks started, got {self.tp} * {self.pp} * {self.dp} = "
                f"{self.num_ranks} and {world_size}; change parallel or start {self.num_ranks} ranks"
            )

    def coordinates(self, rank: int) -> Coordinates:
        """Where a global rank stands."""
        assert 0 <= rank < self.num_ranks
        return Coordinates(tp=rank % self.tp, dp=rank // self.tp % self.dp, pp=rank // (self.tp * self.dp))

    def rank_at(self, *, tp: int, pp: int, dp: int) -> int:
        """The global rank that stands there: `coordinates` backwards."""
        assert 0 <= tp < self.tp and 0 <= pp < self.pp and 0 <= dp < self.dp
        return tp + self.tp * (dp + self.dp * pp)

    def group(self, axis: Axis, *, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` on one axis alone, itself included, in the order of the axis."""
        here = self.coordinates(rank)
        return tuple(self.rank_at(**(here._asdict() | {axis: i})) for i in range(getattr(self, axis)))

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis, each rank in exactly one, by their first rank."""
        return tuple(sorted({self.group(axis, rank=rank) for rank in range(self.num_ranks)}))
