"""Latents -> logits of the next patch's symbols."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.coda.base import Coda
from matformer.layers.local_attention import LocalBlock, local_view
from matformer.layers.ngrams import NgramEmbedding, NgramSettings
from matformer.layers.norm import RMSNorm
from matformer.parcels import TextUnits
from matformer.shapes import NUM_SYMBOLS, NUM_TARGETS


@final
class TextCoda(Coda[TextUnits]):
    """Local causal blocks over the symbols so far, each reading the latent just before the patch it predicts.

    Source: BLT, section 3.3 (local decoder). By default ours has a byte embedding of its own, so that only latents
    cross the pipeline, with hashed n-grams (BLT has them in the encoder alone), and reads one latent (as its H / D
    slots). `embeds` False: its inputs come from the Preludio. `projects`: a matrix stands before the slots.
    `predicts_end`: V more logits follow those of the V symbols, each of "its patch ends" if that symbol comes.
    `diffused`: its inputs are the symbols with masks in them, it looks both ways inside the piece, and the latent of a
    patch is the one at the patch itself.
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
        rotary_base: float,
        ngrams: NgramSettings,
        embeds: bool,
        projects: bool,
        predicts_end: bool,
        diffused: bool,
    ) -> None:
        super().__init__()
        self.diffused = diffused
        self.heads, self.window, self.rotary_base, self.slots = heads, window, rotary_base, atto_width // width
        self.embedding = nn.Embedding(NUM_SYMBOLS, width) if embeds else None
        self.ngram_embedding = NgramEmbedding(width, ngrams) if embeds and ngrams.sizes else None
        self.projection = nn.Linear(atto_width, atto_width, bias=False) if projects else None
        self.latent_norm = RMSNorm(width)
        self.readers = nn.ModuleList(LatentReader(width, heads) for _ in range(layers))
        self.blocks = nn.ModuleList(LocalBlock(width, heads, inner=ffn_width) for _ in range(layers))
        self.output_norm = RMSNorm(width)
        self.head = nn.Linear(width, NUM_TARGETS, bias=False)
        self.end_head = nn.Linear(width, NUM_TARGETS, bias=False) if predicts_end else None

    def forward(
        self, latent_LH: Float[Tensor, "L H"], units: TextUnits, input_UD: Float[Tensor, "U D"] | None = None
    ) -> Float[Tensor, "U V"]:
        read_PH = latent_LH.index_select(0, units.slot_P if self.diffused else units.slot_P - 1)
        if self.projection is not None:
            read_PH = self.projection(read_PH)
        slot_PkD = self.latent_norm(read_PH.view(len(units.slot_P), self.slots, latent_LH.shape[1] // self.slots))
        x_UD = self._embedded(units) if input_UD is None else input_UD
        view = local_view(
            units.piece_U,
            units.place_U,
            window=self.window,
            head_size=x_UD.shape[1] // self.heads,
            rotary_base=self.rotary_base,
            both_ways=self.diffused,
        )
        for reader, block in zip(self.readers, self.blocks, strict=True):
            x_UD = block(x_UD + reader(x_UD, slot_PkD, units.patch_U), view)
        x_UD = self.output_norm(x_UD)
        logits_UV = self.head(x_UD)
        return logits_UV if self.end_head is None else torch.cat((logits_UV, self.end_head(x_UD)), dim=1)

    def _embedded(self, units: TextUnits) -> Float[Tensor, "U D"]:
        assert self.embedding is not None, "without an embedding the inputs come from the Preludio"
        x_UD = self.embedding(units.coda_input_U)
        if self.ngram_embedding is not None:
            x_UD = x_UD + self.ngram_embedding(units.coda_input_U, units.place_U)
        return x_UD


class LatentReader(nn.Module):
    """Cross-attention of each symbol to the slots of its one latent."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(
        self, x_UD: Float[Tensor, "U D"], slot_PkD: Float[Tensor, "P k D"], patch_U: Int[Tensor, " U"]
    ) -> Float[Tensor, "U D"]:
        (num_units, width), (num_patches, slots, _) = x_UD.shape, slot_PkD.shape
        query = self.query(self.norm(x_UD)).view(num_units, 1, self.heads, width // self.heads)
        pairs = self.key_value(slot_PkD).view(num_patches, slots * 2 * width).index_select(0, patch_U)
        key, value = pairs.view(num_units, slots, 2, self.heads, width // self.heads).unbind(2)
        weight = ((query * key).sum(-1) * (width // self.heads) ** -0.5).softmax(dim=1)
        return self.output((weight.unsqueeze(-1) * value).sum(1).view(num_units, width))
