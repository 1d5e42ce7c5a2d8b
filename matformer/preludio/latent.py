"""Patches of VAE latents -> latents, with the span's header, closing and noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.config.schema import MediaObjective, TimeConditioning
from matformer.config.time_conditioning import ENTRANCES
from matformer.layers.cells import CellsDown, CellShape, canvases
from matformer.layers.flow import clean_alone, noised_rows
from matformer.layers.modulation import TimeModulation, modulate
from matformer.layers.place_embedding import PlaceEmbedding
from matformer.layers.precondition import Precondition
from matformer.layers.time_embedding import TimeEmbedding
from matformer.parcels import MediaUnits
from matformer.preludio.base import Preludio
from matformer.preludio.leaves import LeafMerge


@final
class LatentPreludio(Preludio[MediaUnits]):
    """A linear map of each preconditioned patch, plus its place, and the time of its copy: t if noised, 0 if clean.

    Before the map there may be convolutions over the cells of the span.
    The time is added, or scales and shifts the row (there is no block that a gate could close), or stands as a row of
    its own at the head of the noised span, or is not told here. `causal` (LatentLM): noised patches do not stand in the
    sequence, and are left to the Coda. With `merge`, patches that share a latent become one row. The header is an
    embedding of the shape bucket, the closing one vector: both belong to the modality.
    Sources: BAGEL (time added to the latents); DiT, section 3.2 (patchify); Show-o2 and JanusFlow (time as a position).
    """

    def __init__(
        self,
        variance: Sequence[float],
        *,
        atto_width: int,
        num_buckets: int,
        places: Sequence[int],
        objective: MediaObjective = "flow",
        scaled: bool = True,
        time_conditioning: TimeConditioning = "add",
        cells: CellShape | None = None,
        unet_width: int = 0,
        causal: bool = False,
        merge: LeafMerge | None = None,
    ) -> None:
        super().__init__()
        self.objective: MediaObjective = objective
        self.causal = causal
        self.entrance = ENTRANCES[time_conditioning].preludio
        self.precondition = Precondition(variance, objective=objective, scaled=scaled)
        self.cells = cells if unet_width else None
        if self.cells is None:
            self.patch = nn.Linear(len(variance), atto_width)
        else:
            self.patch = CellsDown(self.cells, width=unet_width, atto_width=atto_width)
        self.place = PlaceEmbedding(atto_width, sizes=places)
        if self.entrance == "film":
            self.time = TimeModulation(atto_width, parts=2)
        elif self.entrance != "nowhere":
            self.time = TimeEmbedding(atto_width)
        self.merge = merge
        self.header_embedding = nn.Embedding(num_buckets, atto_width)
        self.closing_embedding = nn.Embedding(1, atto_width)

    def forward(self, units: MediaUnits) -> tuple[Float[Tensor, "rows H"], Int[Tensor, " rows"]]:
        units = clean_alone(units) if self.causal else units
        noised, time_Q = noised_rows(units, objective=self.objective)
        clean = units.value_NF[units.clean_row_Q]
        patch = self.precondition.network_input(
            torch.cat((noised, clean)), torch.cat((time_Q, time_Q.new_zeros(len(clean))))
        ).to(self.header_embedding.weight.dtype)
        row = torch.cat((units.noised_row_Q, units.clean_row_Q))
        patches = self._rows(patch, units) + self.place(units.place_NX[row])
        slot = torch.cat((units.noised_slot_Q, units.clean_slot_Q))
        time = torch.cat((units.time_of_Q, torch.full_like(units.clean_row_Q, len(units.time_T))))
        if self.merge is not None:
            level = torch.cat((units.noised_level_Q, units.clean_level_Q))
            counts = units.count_levels()
            patches, first = self.merge(patches, patch, slot, level, patches_of_levels=counts)
            slot, time = slot[first], time[first]
        rows = [
            self._told(patches, time, units),
            self.header_embedding(units.bucket_J),
            self.closing_embedding(torch.zeros_like(units.bucket_J)),
        ]
        slots = [slot, units.header_slot_J, units.closing_slot_J]
        if self.entrance == "token":
            rows.append(self.time(units.time_T[units.time_span_Q]))
            slots.append(units.time_slot_Q)
        return torch.cat(rows), torch.cat(slots)

    def _rows(self, patch_QF: Float[Tensor, "Q F"], units: MediaUnits) -> Float[Tensor, "Q H"]:
        """Rows of the noised patches and then of the clean ones; each copy of a span has a canvas of its own."""
        if self.cells is None:
            return self.patch(patch_QF)
        row, spans = torch.cat((units.noised_row_Q, units.clean_row_Q)), len(units.bucket_J)
        copy = units.span_N[row] + F.pad(torch.full_like(units.clean_row_Q, spans), (len(units.noised_row_Q), 0))
        on = canvases(copy, units.place_NX[row], count=2 * spans, shape=self.cells, dtype=patch_QF.dtype)
        return self.patch(patch_QF, on)

    def _told(
        self, patches_QH: Float[Tensor, "Q H"], time_Q: Int[Tensor, " Q"], units: MediaUnits
    ) -> Float[Tensor, "Q H"]:
        """Rows with their times; those of clean rows are behind the last of T."""
        if self.entrance not in ("added", "film"):
            return patches_QH
        times = torch.cat((units.time_T, units.time_T.new_zeros(1)))
        found = self.time(times).index_select(0, time_Q)
        if self.entrance == "added":
            return patches_QH + found
        return modulate(patches_QH, shift=found[:, 0], scale=found[:, 1])
