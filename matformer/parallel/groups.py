"""The process groups of a rank, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """Where this rank stands in tp x cp x dp x pp, and the groups it speaks in (None: one rank, or no world).

    cp: the ranks of one dp that hold chunks of the same positions. share: all that hold one microbatch, tp x cp, the
    tensor axis fastest. reduce: all that hold the same weights, cp x dp, context fastest; gradients are summed there
    and ZeRO shards over it.
    """

    rank: int = 0
    world: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp: dist.ProcessGroup | None = None
    pp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None
    cp: dist.ProcessGroup | None = None
    share: dist.ProcessGroup | None = None
    reduce: dist.ProcessGroup | None = None

    @property
    def share_rank(self) -> int:
        """Among the ranks that hold one microbatch."""
        return self.cp_rank * self.tp_size + self.tp_rank

    @property
    def share_size(self) -> int:
        """How many ranks hold one microbatch."""
        return self.cp_size * self.tp_size

    @property
    def reduce_rank(self) -> int:
        """Among the ranks that hold the same weights."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def reduce_size(self) -> int:
        """How many ranks hold the same weights."""
        return self.dp_size * self.cp_size

    @property
    def is_first(self) -> bool:
        """Holds the Preludi."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Holds router, Code and losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def speaks(self) -> bool:
        """One of the ranks that hold one microbatch, on the last stage: the ones whose sums count."""
        return self.is_last and self.share_rank == 0


def sum_over_world(values: Tensor, groups: Groups) -> Tensor:
    """Sum a small tensor over all ranks (in place where there are several). Collective."""
    if groups.world > 1:
        dist.all_reduce(values)
    return values


def everybody(value: Any) -> list[Any]:  # noqa: ANN401 - any picklable value
    """Every rank's value, on every rank. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
