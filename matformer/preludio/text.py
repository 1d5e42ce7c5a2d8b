"""Bytes -> latents: local causal layers, then each patch reads its own symbols."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.layers.local_attention import LocalBlock, local_view
from matformer.layers.ngrams import NgramEmbedding, NgramSettings
from matformer.layers.norm import RMSNorm
from matformer.layers.segments import segment_firsts, segment_max, segment_mean, segment_softmax_sum
from matformer.parcels import TextUnits
from matformer.preludio.base import Preludio
from matformer.shapes import BEGIN, NUM_SYMBOLS


@final
class TextPreludio(Preludio[TextUnits]):
    """Byte and n-gram embeddings, local causal blocks, pooling by cross-attention from each patch to its own symbols.

    Source: BLT, section 3.2 (local encoder). By default ours averages instead of taking the maximum for the first
    query and tells each symbol its place in the patch; it never pads to the longest patch. `max_patch` None tells no
    places. `reads_begin`: the row of a piece opens with `<begin>`, as the Coda's does, so that `read` can hand the
    Coda its inputs; n-grams then hash BLT's numbers of the symbols. `diffused`: symbols look both ways inside their
    piece, and a header and a closing stand around each span.
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
        max_patch: int | None,
        ngrams: NgramSettings,
        pool: Literal["mean", "max"],
        reads_begin: bool,
        diffused: bool,
    ) -> None:
        super().__init__()
        self.heads, self.window, self.rotary_base, self.reads_begin = heads, window, rotary_base, reads_begin
        self.mark_embedding = nn.Embedding(2, atto_width) if diffused else None  # header, closing
        self.embedding = nn.Embedding(NUM_SYMBOLS, width)
        self.ngram_embedding = NgramEmbedding(width, ngrams) if ngrams.sizes else None
        self.place_embedding = nn.Embedding(max_patch, width) if max_patch else None
        self.blocks = nn.ModuleList(LocalBlock(width, heads, inner=ffn_width) for _ in range(layers))
        self.pool = {"mean": MeanPool, "max": MaxPool}[pool](width, heads, slots=atto_width // width)

    def forward(self, units: TextUnits) -> tuple[Float[Tensor, "P H"], Int[Tensor, " P"]]:
        return self.patches(self.read(units)[0], units)

    def patches(self, x_UD: Float[Tensor, "U D"], units: TextUnits) -> tuple[Float[Tensor, "P H"], Int[Tensor, " P"]]:
        """The latents of symbols that were read, and where they go."""
        latent_PH = self.pool(x_UD, units.patch_U, units.slot_P.numel())
        if self.mark_embedding is None:
            return latent_PH, units.slot_P
        marks = (units.header_slot_J, units.closing_slot_J)
        mark = torch.cat([torch.full_like(slot_J, number) for number, slot_J in enumerate(marks)])
        return torch.cat((latent_PH, self.mark_embedding(mark))), torch.cat((units.slot_P, *marks))

    def read(self, units: TextUnits) -> tuple[Float[Tensor, "U D"], Float[Tensor, "U D"] | None]:
        """Every symbol after the local layers, and the same of every Coda input where the Preludio reads `<begin>`."""
        if not self.reads_begin:
            place_U = _place_in_patch(units.patch_U, units.slot_P.numel()) if self.place_embedding else None
            return self._local(units.symbol_U, units.piece_U, units.place_U, place_in_patch_U=place_U), None
        row_U = torch.arange(units.symbol_U.numel(), device=units.symbol_U.device) + units.piece_U  # of the Coda input
        size = row_U.numel() + int((units.place_U == 0).sum())

        def spread(of_symbol: Tensor, of_begin: Tensor) -> Tensor:
            return of_begin.new_zeros(size).index_copy(0, row_U, of_begin).index_copy(0, row_U + 1, of_symbol)

        x_RD = self._local(
            spread(units.symbol_U, units.coda_input_U),
            spread(units.piece_U, units.piece_U),
            spread(units.place_U + 1, units.place_U),
        )
        return x_RD.index_select(0, row_U + 1), x_RD.index_select(0, row_U)

    def coda_inputs(self, units: TextUnits) -> Float[Tensor, "U D"]:
        """Every Coda input after the local layers, where there is nothing after it to read."""
        return self._local(units.coda_input_U, units.piece_U, units.place_U)

    def begin_latent(self) -> Float[Tensor, "1 H"]:
        """What `<begin>` would be as a patch of its own, as in BLT."""
        zero = torch.zeros(1, dtype=torch.long, device=self.embedding.weight.device)
        return self.pool(self._local(zero + BEGIN, zero, zero), zero, 1)

    def _local(
        self,
        symbol_U: Int[Tensor, " U"],
        piece_U: Int[Tensor, " U"],
        place_U: Int[Tensor, " U"],
        *,
        place_in_patch_U: Int[Tensor, " U"] | None = None,
    ) -> Float[Tensor, "U D"]:
        x_UD = self.embedding(symbol_U)
        if self.place_embedding is not None:
            assert place_in_patch_U is not None, "the config's check refuses places where <begin> is read"
            x_UD = x_UD + self.place_embedding(place_in_patch_U)
        if self.ngram_embedding is not None:
            hashed_U = blt_numbers(symbol_U) if self.reads_begin else symbol_U
            x_UD = x_UD + self.ngram_embedding(hashed_U, place_U)
        view = local_view(
            piece_U,
            place_U,
            window=self.window,
            head_size=x_UD.shape[1] // self.heads,
            rotary_base=self.rotary_base,
            both_ways=self.mark_embedding is not None,
        )
        for block in self.blocks:
            x_UD = block(x_UD, view)
        return x_UD


def blt_numbers(symbol_U: Int[Tensor, " U"]) -> Int[Tensor, " U"]:
    """BLT's numbers of our symbols: bytes from 4, `<begin>` (BOS) 1, `<end>` (EOS) 2."""
    return torch.where(symbol_U < 256, symbol_U + 4, torch.where(symbol_U == BEGIN, 1, 2))


def _place_in_patch(patch_U: Int[Tensor, " U"], num_patches: int) -> Int[Tensor, " U"]:
    """0, 1, 2, ... inside each patch; patches are contiguous runs in ascending order."""
    first_P = segment_firsts(patch_U, num_segments=num_patches)
    return torch.arange(patch_U.numel(), device=patch_U.device) - first_P[patch_U]


class Pool(nn.Module, ABC):
    """Each patch asks its own symbols `slots` questions; their answers side by side are its latent (slots * D = H)."""

    def __init__(self, width: int, heads: int, *, slots: int) -> None:
        super().__init__()
        self.heads, self.slots = heads, slots
        self.symbol_norm = RMSNorm(width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    @abstractmethod
    def first(
        self, x_UD: Float[Tensor, "U D"], patch_U: Int[Tensor, " U"], num_patches: int
    ) -> tuple[Float[Tensor, "P k1 D"], Float[Tensor, "P kD"]]:
        """What a patch's slots are before they have asked (k1: k, or 1 for all), and their questions."""

    def forward(self, x_UD: Float[Tensor, "U D"], patch_U: Int[Tensor, " U"], num_patches: int) -> Float[Tensor, "P H"]:
        num_units, width = x_UD.shape
        first_PkD, query_PF = self.first(x_UD, patch_U, num_patches)
        key, value = (
            self.key_value(self.symbol_norm(x_UD)).view(num_units, 2, self.heads, width // self.heads).unbind(1)
        )
        query = query_PF.index_select(0, patch_U).view(num_units, self.slots, self.heads, width // self.heads)
        score = (query * key[:, None]).sum(-1) * (width // self.heads) ** -0.5
        pooled = segment_softmax_sum(score, value[:, None], patch_U, num_segments=num_patches)
        latent = first_PkD + self.output(pooled.reshape(num_patches, self.slots, width))
        return latent.reshape(num_patches, self.slots * width)


@final
class MeanPool(Pool):
    """Every slot starts as the mean of the symbols, and asks through a matrix of its own."""

    def __init__(self, width: int, heads: int, *, slots: int) -> None:
        super().__init__(width, heads, slots=slots)
        self.mean_norm = RMSNorm(width)
        self.query = nn.Linear(width, slots * width, bias=False)

    def first(
        self, x_UD: Float[Tensor, "U D"], patch_U: Int[Tensor, " U"], num_patches: int
    ) -> tuple[Float[Tensor, "P k1 D"], Float[Tensor, "P kD"]]:
        mean_PD = segment_mean(x_UD, patch_U, num_segments=num_patches)
        return mean_PD[:, None], self.query(self.mean_norm(mean_PD))


@final
class MaxPool(Pool):
    """Every slot starts as its own projection of the symbols' maximum, and asks through one matrix.

    Source: BLT, section 3.2.2, and its released encoder.
    """

    def __init__(self, width: int, heads: int, *, slots: int) -> None:
        super().__init__(width, heads, slots=slots)
        self.project = nn.Linear(width, slots * width, bias=False)
        self.slot_norm = RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)

    def first(
        self, x_UD: Float[Tensor, "U D"], patch_U: Int[Tensor, " U"], num_patches: int
    ) -> tuple[Float[Tensor, "P k1 D"], Float[Tensor, "P kD"]]:
        top_PD = segment_max(x_UD, patch_U, num_segments=num_patches)
        slot_PkD = self.project(top_PD).view(num_patches, self.slots, x_UD.shape[1])
        return slot_PkD, self.query(self.slot_norm(slot_PkD)).flatten(1)
