"""Coda: the local decoder. The Atto's latents in, predictions of one modality out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

Units = TypeVar("Units")


class Coda(nn.Module, ABC, Generic[Units]):
    """Abstract: one class a kind of units, every one of them final."""

    @abstractmethod
    def forward(self, latent_LH: Float[Tensor, "L H"], units: Units) -> Tensor:
        """Predictions, from all positions of the microbatch (L = B * S, in flat order).

        Runs also when there are no units, as the Preludi do.
        """
