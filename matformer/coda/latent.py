"""Latents and noised patches -> what the objective predicts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from matformer.coda.base import Coda
from matformer.coda.neighbours import Neighbours
from matformer.config.schema import CodaKind, MediaObjective, TimeConditioning
from matformer.config.time_conditioning import ENTRANCES
from matformer.layers.cells import CellShape, CellsUp, canvases
from matformer.layers.feed_forward import SwiGLU
from matformer.layers.flow import noised_rows
from matformer.layers.local_attention import LocalAttention
from matformer.layers.modulation import TimeModulation, modulate
from matformer.layers.norm import RMSNorm
from matformer.layers.place_embedding import PlaceEmbedding
from matformer.layers.precondition import Precondition
from matformer.layers.time_embedding import TimeEmbedding
from matformer.parcels import MediaUnits


@final
class LatentCoda(Coda[MediaUnits]):
    """A small network over (latent, noised patch, place, time), inside the closed form that `Precondition` gives.

    It is a residual MLP (`mlp`), the same with attention to the span's other noised patches before each block (`dit`),
    or linear maps alone (`linear`).

    The network's answer is a vector and a gain on each scalar of its input: where the local variance is not the
    channel's (silence, a white border) the best answer is another multiple of the noised patch, which an MLP would have
    to carry through its width. Both last layers start at zero: the first answer is that of a Gaussian with these
    variances. The time is added to the input, or is scale, shift and gate of each block (all zero at first, so that a
    block begins as nothing) and scale and shift behind the last norm, or is not told here.
    Sources: MAR, section 3.2 (a small MLP a patch); DiT (Peebles 2023), section 3.2, for the blocks of `dit` and for
    adaLN-zero; Gaussian scale mixtures (Portilla 2003) for the gain.
    """

    def __init__(
        self,
        variance: Sequence[float],
        *,
        atto_width: int,
        width: int,
        layers: int,
        places: Sequence[int],
        objective: MediaObjective = "flow",
        scaled: bool = True,
        time_conditioning: TimeConditioning = "add",
        kind: CodaKind = "mlp",
        heads: int = 4,
        window: int = 64,
        cells: CellShape | None = None,
        unet_width: int = 0,
    ) -> None:
        super().__init__()
        self.objective: MediaObjective = objective
        layers = 0 if kind == "linear" else layers
        self.entrance = ENTRANCES[time_conditioning].coda
        self.precondition = Precondition(variance, objective=objective, scaled=scaled)
        self.latent = nn.Linear(atto_width, width)
        self.patch = nn.Linear(len(variance), width)
        self.place = PlaceEmbedding(width, sizes=places)
        if self.entrance == "added":
            self.time = TimeEmbedding(width)
        elif self.entrance == "film":
            self.time = TimeModulation(width, parts=3 * layers * (2 if kind == "dit" else 1) + 2)
        if kind == "dit":
            self.neighbours = Neighbours(places, head_size=width // heads, window=window)
            self.attention_norms = nn.ModuleList(RMSNorm(width) for _ in range(layers))
            self.attentions = nn.ModuleList(LocalAttention(width, heads) for _ in range(layers))
        self.kind: CodaKind = kind
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(layers))
        self.blocks = nn.ModuleList(SwiGLU(width, 2 * width) for _ in range(layers))
        self.output_norm = nn.Identity() if kind == "linear" else RMSNorm(width)
        self.cells = cells if unet_width else None
        if self.cells is None:
            self.velocity = nn.Linear(width, len(variance))
        else:
            self.up = CellsUp(self.cells, width=unet_width, coda_width=width)
        self.gain = nn.Linear(width, len(variance))

    def forward(self, latent_LH: Float[Tensor, "L H"], units: MediaUnits) -> Float[Tensor, "Qn F"]:
        noised, time_Q = noised_rows(units, objective=self.objective)
        patch_QF = self.precondition.network_input(noised, time_Q).to(self.patch.weight.dtype)
        x = self.latent(latent_LH.index_select(0, units.noised_slot_Q))
        x = x + self.patch(patch_QF) + self.place(units.place_NX[units.noised_row_Q])
        if self.entrance == "film":
            x = self._modulated(x, units)
        else:
            x = self._plain(x, units)
        return self.precondition.prediction(self._vector(x, patch_QF, units) + self.gain(x) * patch_QF, noised, time_Q)

    def _vector(
        self, x: Float[Tensor, "Qn D"], patch_QF: Float[Tensor, "Qn F"], units: MediaUnits
    ) -> Float[Tensor, "Qn F"]:
        if self.cells is None:
            return self.velocity(x)
        row = units.noised_row_Q
        place, count = units.place_NX[row], len(units.bucket_J)
        on = canvases(units.span_N[row], place, count=count, shape=self.cells, dtype=x.dtype)
        return self.up(x, patch_QF, on)

    def _branches(self, units: MediaUnits) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """Each norm with what stands behind it, in their order."""
        view = self.neighbours.view(units) if self.kind == "dit" else None
        for layer, (norm, block) in enumerate(zip(self.norms, self.blocks, strict=True)):
            if view is not None:
                yield self.attention_norms[layer], partial(self.attentions[layer], view=view)
            yield norm, block

    def _plain(self, x: Float[Tensor, "Qn D"], units: MediaUnits) -> Float[Tensor, "Qn D"]:
        if self.entrance == "added":
            x = x + self.time(units.time_T).index_select(0, units.time_of_Q)
        for norm, branch in self._branches(units):
            x = x + branch(norm(x))
        return self.output_norm(x)

    def _modulated(self, x: Float[Tensor, "Qn D"], units: MediaUnits) -> Float[Tensor, "Qn D"]:
        *parts, shift, scale = self.time(units.time_T).index_select(0, units.time_of_Q).unbind(1)
        for number, (norm, branch) in enumerate(self._branches(units)):
            branch_shift, branch_scale, gate = parts[3 * number : 3 * number + 3]
            x = x + gate * branch(modulate(norm(x), shift=branch_shift, scale=branch_scale))
        return modulate(self.output_norm(x), shift=shift, scale=scale)
