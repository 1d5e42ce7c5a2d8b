"""The process groups of a rank, as one object."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """Where this rank stands in tp x pp x dp, and the groups it speaks in (None where a group has one rank)."""

    rank: int = 0
    world: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp: dist.ProcessGroup | None = None
    pp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None

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
        """One rank of each tensor-parallel group of the last stage: the ones whose sums count."""
        return self.is_last and self.tp_rank == 0


def sum_over_world(values: Tensor, groups: Groups) -> Tensor:
    """Sum a small tensor over all ranks (in place where there are several). Collective."""
    if groups.world > 1:
        dist.all_reduce(values)
    return values


def any_over_world(flag: bool, groups: Groups) -> bool:
    """True on all ranks if on any. Collective."""
    return bool(sum_over_world(torch.tensor(float(flag)), groups) > 0)
