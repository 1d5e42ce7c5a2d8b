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
from matformer.layers.precondition import Precondition
from matformer.layers.time_embedding import TimeEmbedding
from matformer.parcels import MediaUnits


@final
class LatentCoda(Coda[MediaUnits]):
    """A residual MLP over (latent, noised patch, place, time), inside the closed form that `Precondition` gives.

    The network's answer is a vector and a gain on each scalar of its input: where the local variance is not the
    channel's (silence, a white border) the best answer is another multiple of the noised patch, which an MLP would have
    to carry through its width. Both last layers start at zero: the first velocity is that of a Gaussian with these
    variances. Sources: MAR, section 3.2 (a small MLP a patch); Gaussian scale mixtures (Portilla 2003) for the gain.
    """

    def __init__(
        self, variance: Sequence[float], *, atto_width: int, width: int, layers: int, places: Sequence[int]
    ) -> None:
        super().__init__()
        self.precondition = Precondition(variance)
        self.latent = nn.Linear(atto_width, width)
        self.patch = nn.Linear(len(variance), width)
        self.place = PlaceEmbedding(width, sizes=places)
        self.time = TimeEmbedding(width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(layers))
        self.blocks = nn.ModuleList(SwiGLU(width, 2 * width) for _ in range(layers))
        self.output_norm = RMSNorm(width)
        self.velocity = nn.Linear(width, len(variance))
        self.gain = nn.Linear(width, len(variance))

    def forward(self, latent_LH: Float[Tensor, "L H"], units: MediaUnits) -> Float[Tensor, "Qn F"]:
        noised, time_Q = noised_rows(units)
        patch_QF = self.precondition.network_input(noised, time_Q).to(self.patch.weight.dtype)
        level = self.time(units.time_J).index_select(0, units.span_N[units.noised_row_Q])
        x = self.latent(latent_LH.index_select(0, units.noised_slot_Q))
        x = x + self.patch(patch_QF) + self.place(units.place_NX[units.noised_row_Q]) + level
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        x = self.output_norm(x)
        return self.precondition.velocity(self.velocity(x) + self.gain(x) * patch_QF, noised, time_Q)
