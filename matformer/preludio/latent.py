"""Patches of VAE latents -> latents, with the span's header, closing and noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.layers.flow import noised_rows
from matformer.layers.place_embedding import PlaceEmbedding
from matformer.layers.precondition import Precondition
from matformer.layers.time_embedding import TimeEmbedding
from matformer.parcels import MediaUnits
from matformer.preludio.base import Preludio


@final
class LatentPreludio(Preludio[MediaUnits]):
    """A linear map of each preconditioned patch, plus its place, plus the time of its copy: t if noised, 0 if clean.

    The header is an embedding of the shape bucket, the closing one vector: both belong to the modality.
    Source: BAGEL (time added to the latents); DiT, section 3.2 (patchify).
    """

    def __init__(self, variance: Sequence[float], *, atto_width: int, num_buckets: int, places: Sequence[int]) -> None:
        super().__init__()
        self.precondition = Precondition(variance)
        self.patch = nn.Linear(len(variance), atto_width)
        self.place = PlaceEmbedding(atto_width, sizes=places)
        self.time = TimeEmbedding(atto_width)
        self.header_embedding = nn.Embedding(num_buckets, atto_width)
        self.closing_embedding = nn.Embedding(1, atto_width)

    def forward(self, units: MediaUnits) -> tuple[Float[Tensor, "rows H"], Int[Tensor, " rows"]]:
        noised, time_Q = noised_rows(units)
        clean = units.value_NF[units.clean_row_Q]
        patch = self.precondition.network_input(
            torch.cat((noised, clean)), torch.cat((time_Q, time_Q.new_zeros(len(clean))))
        )
        times = torch.cat((units.time_J, units.time_J.new_zeros(1)))  # the last: clean
        level_JH = self.time(times)
        span = torch.cat((units.span_N[units.noised_row_Q], torch.full_like(units.clean_row_Q, len(units.time_J))))
        row = torch.cat((units.noised_row_Q, units.clean_row_Q))
        patches = self.patch(patch.to(self.patch.weight.dtype)) + self.place(units.place_NX[row])
        rows = torch.cat(
            (
                patches + level_JH.index_select(0, span),
                self.header_embedding(units.bucket_J),
                self.closing_embedding(torch.zeros_like(units.bucket_J)),
            )
        )
        slots = (units.noised_slot_Q, units.clean_slot_Q, units.header_slot_J, units.closing_slot_J)
        return rows, torch.cat(slots)
