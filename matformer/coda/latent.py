"""Latents and noised patches -> velocities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from matformer.coda.base import Coda
from matformer.layers.feed_forward import SwiGLU
from matformer.layers.flow import noised_rows
from matformer.layers.norm import RMSNorm
from matformer.layers.place_embedding import PlaceEmbedding
from matformer.layers.time_embedding import TimeEmbedding
from matformer.parcels import MediaUnits


@final
class LatentCoda(Coda[MediaUnits]):
    """A residual MLP over (latent, noised patch, place, time), and a gain of the time on each scalar of the patch.

    The gain is what a Gaussian with independent scalars needs (v = g(t) x_t): the MLP is left the rest of the work.
    Both last layers start at zero, so does the velocity. Sources: MAR, section 3.2 (a small MLP a patch); EDM, section
    5 (a skip that depends on the noise level, there in closed form).
    """

    def __init__(self, patch_scalars: int, *, atto_width: int, width: int, layers: int, places: Sequence[int]) -> None:
        super().__init__()
        self.latent = nn.Linear(atto_width, width)
        self.patch = nn.Linear(patch_scalars, width)
        self.place = PlaceEmbedding(width, sizes=places)
        self.time = TimeEmbedding(width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(layers))
        self.blocks = nn.ModuleList(SwiGLU(width, 2 * width) for _ in range(layers))
        self.output_norm = RMSNorm(width)
        self.velocity = nn.Linear(width, patch_scalars)
        self.gain = nn.Linear(width, patch_scalars)

    def forward(self, latent_LH: Float[Tensor, "L H"], units: MediaUnits) -> Float[Tensor, "Qn F"]:
        noised, _ = noised_rows(units)
        noised = noised.to(self.patch.weight.dtype)
        span = units.span_N[units.noised_row_Q]
        level_JD = self.time(units.time_J)
        x = self.latent(latent_LH.index_select(0, units.noised_slot_Q))
        x = x + self.patch(noised) + self.place(units.place_NX[units.noised_row_Q]) + level_JD.index_select(0, span)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        gain = self.gain(nn.functional.silu(level_JD)).index_select(0, span)
        return self.velocity(self.output_norm(x)) + gain * noised
