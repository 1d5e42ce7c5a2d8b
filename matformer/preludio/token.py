"""Pieces of a vocabulary -> latents: the tokenised control of the byte path."""

from __future__ import annotations

from typing import final

from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.parcels import TextUnits
from matformer.preludio.base import Preludio


@final
class TokenPreludio(Preludio[TextUnits]):
    """An embedding of each piece, one latent a piece, as in any tokenised transformer."""

    def __init__(self, vocabulary: int, *, atto_width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary + 1, atto_width)  # the last: `<end>`

    def forward(self, units: TextUnits) -> tuple[Float[Tensor, "P H"], Int[Tensor, " P"]]:
        return self.embedding(units.token_P), units.slot_P
