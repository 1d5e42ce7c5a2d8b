"""Bytes -> latents: local causal layers, then each patch reads its own symbols."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.layers.local_attention import LocalBlock, local_view
from matformer.layers.ngrams import NgramEmbedding, NgramSettings
from matformer.layers.norm import RMSNorm
from matformer.layers.segments import segment_mean, segment_softmax_sum
from matformer.parcels import TextUnits
from matformer.preludio.base import Preludio
from matformer.shapes import NUM_SYMBOLS


@final
class TextPreludio(Preludio[TextUnits]):
    """Byte and n-gram embeddings, local causal blocks, pooling by cross-attention from each patch to its own symbols.

    Source: BLT, section 3.2 (local encoder); ours averages instead of taking the maximum for the first query, tells
    each symbol its place in the patch, and needs no padding to the longest patch.
    """

    def __init__(
        self,
        width: int,
        *,
        atto_width: int,
        heads: int,
        ffn_width: int,
        layers: int,
        window: int,
        max_patch: int,
        ngrams: NgramSettings,
    ) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.embedding = nn.Embedding(NUM_SYMBOLS, width)
        self.ngram_embedding = NgramEmbedding(width, ngrams) if ngrams.sizes else None
        self.place_embedding = nn.Embedding(max_patch, width)
        self.blocks = nn.ModuleList(LocalBlock(width, heads, inner=ffn_width) for _ in range(layers))
        self.pool = PatchPool(width, heads, slots=atto_width // width)

    def forward(self, units: TextUnits) -> tuple[Float[Tensor, "P H"], Int[Tensor, " P"]]:
        num_patches = units.slot_P.numel()
        x_UD = self.embedding(units.symbol_U) + self.place_embedding(_place_in_patch(units.patch_U, num_patches))
        if self.ngram_embedding is not None:
            x_UD = x_UD + self.ngram_embedding(units.symbol_U, units.place_U)
        head_size = x_UD.shape[1] // self.heads
        view = local_view(units.piece_U, units.place_U, window=self.window, head_size=head_size)
        for block in self.blocks:
            x_UD = block(x_UD, view)
        return self.pool(x_UD, units.patch_U, num_patches), units.slot_P


def _place_in_patch(patch_U: Int[Tensor, " U"], num_patches: int) -> Int[Tensor, " U"]:
    """0, 1, 2, ... inside each patch; patches are contiguous runs in ascending order."""
    length_P = torch.bincount(patch_U, minlength=num_patches)
    first_P = length_P.cumsum(0) - length_P
    return torch.arange(patch_U.numel(), device=patch_U.device) - first_P[patch_U]


class PatchPool(nn.Module):
    """Each patch asks its own symbols `slots` questions; their answers side by side are its latent (slots * D = H)."""

    def __init__(self, width: int, heads: int, *, slots: int) -> None:
        super().__init__()
        self.heads, self.slots = heads, slots
        self.symbol_norm, self.mean_norm = RMSNorm(width), RMSNorm(width)
        self.query = nn.Linear(width, slots * width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_UD: Float[Tensor, "U D"], patch_U: Int[Tensor, " U"], num_patches: int) -> Float[Tensor, "P H"]:
        num_units, width = x_UD.shape
        mean_PD = segment_mean(x_UD, patch_U, num_segments=num_patches)
        query = self.query(self.mean_norm(mean_PD)).view(num_patches, self.slots, self.heads, width // self.heads)
        key, value = (
            self.key_value(self.symbol_norm(x_UD)).view(num_units, 2, self.heads, width // self.heads).unbind(1)
        )
        query_of_U = query.flatten(1).index_select(0, patch_U).view(num_units, *query.shape[1:])
        score = (query_of_U * key[:, None]).sum(-1) * (width // self.heads) ** -0.5
        pooled = segment_softmax_sum(score, value[:, None], patch_U, num_segments=num_patches)
        latent = mean_PD[:, None] + self.output(pooled.reshape(num_patches, self.slots, width))
        return latent.reshape(num_patches, self.slots * width)
