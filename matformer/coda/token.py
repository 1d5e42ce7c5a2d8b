"""Latents -> logits of the next piece: the tokenised control of the byte path."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from matformer.coda.base import Coda
from matformer.parcels import TextUnits


@final
class TokenCoda(Coda[TextUnits]):
    """One matrix from the latent just before a piece to the vocabulary and `<end>`, behind the Atto's last norm."""

    def __init__(self, vocabulary: int, *, atto_width: int) -> None:
        super().__init__()
        self.head = nn.Linear(atto_width, vocabulary + 1, bias=False)

    def forward(self, latent_LH: Float[Tensor, "L H"], units: TextUnits) -> Float[Tensor, "P T"]:
        return self.head(latent_LH.index_select(0, units.slot_P - 1))
