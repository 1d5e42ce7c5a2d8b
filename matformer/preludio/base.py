"""Preludio: the local encoder. Units of one modality in, rows for the Atto's sequence out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from jaxtyping import Float, Int
from torch import Tensor, nn

Units = TypeVar("Units")


class Preludio(nn.Module, ABC, Generic[Units]):
    """Abstract: one class a kind of units, every one of them final."""

    @abstractmethod
    def forward(self, units: Units) -> tuple[Float[Tensor, "rows H"], Int[Tensor, " rows"]]:
        """Latents, and the flat positions b * S + s where they stand. Local to the rank.

        Runs also when there are no units: every weight then has a gradient of zeros, which the hosts rely on.
        """
