"""Matformer: the acts in order. Preludi -> Atto -> router and Code -> sums of losses."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.atto.trunk import atto_view
from matformer.config.schema import ModelConfig
from matformer.config.time_conditioning import modulated_media
from matformer.hosts.base import Sums, Trunk
from matformer.layers.attention import AttoView
from matformer.layers.modulation import position_times
from matformer.layers.segments import segment_firsts, segment_sum
from matformer.losses.flow import squared_error
from matformer.losses.route import bucket_nats, kind_nats, split_nats
from matformer.losses.text import end_nats, symbol_nats
from matformer.modalities import build_code, build_preludi, build_tree_heads
from matformer.parcels import Batch, Kind, TextUnits
from matformer.preludio.text import TextPreludio
from matformer.router.probe import Router, chosen_bucket
from matformer.shapes import NUM_TARGETS


class Start(nn.Module):
    """The embedding of `start`, laid on a sequence of zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1, width)

    def forward(self, kind_L: Int[Tensor, " L"]) -> Float[Tensor, "L H"]:
        start_L1 = (kind_L == int(Kind.START))[:, None]  # a compiler takes the bare enum for False
        row_1H = self.embedding(torch.zeros(1, dtype=torch.long, device=start_L1.device))
        return start_L1.to(row_1H.dtype) * row_1H


class Matformer(nn.Module):
    """One pipeline stage of the model: Preludi on the first, router and Code on the last, layers on all."""

    def __init__(self, config: ModelConfig, *, trunk: Trunk) -> None:
        super().__init__()
        self.model_config, self.is_first, self.is_last = config, trunk.is_first, trunk.is_last
        if self.is_first:
            self.start = Start(config.atto.width)
            self.preludi = nn.ModuleDict(build_preludi(config))
        self.atto = trunk
        if self.is_last:
            buckets = {name: len(media.buckets) for name, media in config.media.items()}
            self.router = Router(config.atto.width, num_buckets=buckets, trees=build_tree_heads(config))
            self.code = nn.ModuleDict(build_code(config))

    def set_input_tensor(self, tensor: Tensor | list[Tensor] | None) -> None:
        """What megatron's schedules call with the output of the stage before."""
        self.atto.receive(tensor[0] if isinstance(tensor, list) else tensor)

    def forward(self, batch: Batch) -> Tensor | Sums:
        """Sums of losses, one number a document and part `[E]`; off the last stage, what is sent on.

        Where the microbatch is a rank's share, these are the sums over that share.
        """
        leaving, text_input_UD = self.run(batch)
        return self.sums(leaving, batch, text_input_UD) if self.is_last else leaving

    def latents(self, batch: Batch) -> Float[Tensor, "B S H"]:
        """The Atto's output, where one rank holds the whole model."""
        return self.run(batch)[0].view(*batch.grid.kind_BS.shape, -1)

    def run(self, batch: Batch) -> tuple[Tensor, Float[Tensor, "U D"] | None]:
        """The Atto's output `[L, H]` or what this stage sends; the Coda's inputs for text, if a Preludio makes them."""
        hidden, text_input_UD = self._embedded(batch) if self.is_first else (None, None)
        return self.atto(hidden, self.view(batch), batch.exchange), text_input_UD

    def view(self, batch: Batch) -> AttoView:
        """What the Atto's layers are told of this microbatch; the same on every stage."""
        config = self.model_config
        times = batch.times or position_times(batch, modulated_media(config))
        return atto_view(batch.grid, config.atto, media_context=config.media_context, times=times)

    def embed(self, batch: Batch) -> Float[Tensor, "B S H"]:
        """Every Preludio's rows at their positions, where one rank holds the whole model; padding is zero."""
        return self._embedded(batch)[0].view(*batch.grid.kind_BS.shape, -1)

    def _embedded(self, batch: Batch) -> tuple[Float[Tensor, "L H"], Float[Tensor, "U D"] | None]:
        """What enters the Atto here, and the Coda's inputs for text where the Preludio makes them."""
        text, input_UD = self.preludi["text"], None
        if isinstance(text, TextPreludio):
            symbol_UD, input_UD = text.read(batch.read)
            found = [text.patches(symbol_UD, batch.read)]
        else:
            found = [text(batch.read)]
        found += [self.preludi[name](batch.media[name]) for name in self.model_config.media]
        kind_L = batch.grid.kind_BS.flatten()
        hidden_LH = self.start(kind_L if batch.exchange is None else kind_L[batch.exchange.own])
        rows, slots = (torch.cat(parts) for parts in zip(*found, strict=True))  # not of one dtype under autocast
        rows, slots = self.atto.bring(rows.to(hidden_LH.dtype), slots, batch.exchange)
        return hidden_LH.index_add(0, slots, rows), input_UD

    def text_logits(
        self, latent_LH: Float[Tensor, "L H"], units: TextUnits, input_UD: Float[Tensor, "U D"] | None = None
    ) -> Float[Tensor, "U V"] | Float[Tensor, "P T"]:
        """Of every text symbol (see TextCoda), or piece of a vocabulary (see TokenCoda).

        input_UD: the Coda's inputs, if the Preludio has made them already.
        """
        if self.model_config.text.vocabulary is not None:
            return self.code["text"](latent_LH, units)
        if input_UD is None and self.model_config.text.coda_input == "preludio":
            text = self.preludi["text"]
            assert isinstance(text, TextPreludio)
            input_UD = text.coda_inputs(units)
        return self.code["text"](latent_LH, units, input_UD)

    def sums(
        self, latent_LH: Float[Tensor, "L H"], batch: Batch, text_input_UD: Float[Tensor, "U D"] | None = None
    ) -> Sums:
        """Losses (keys: modalities and "router") and what metrics need, each summed by document."""
        nats, document = self._text_nats(latent_LH, batch.text, text_input_UD)
        sums: Sums = {"text": segment_sum(nats, document, num_segments=batch.num_documents)}
        for name in self.model_config.media:
            units, objective = batch.media[name], self.model_config.media[name].prediction
            span_Q = units.span_N[units.noised_row_Q]
            errors = squared_error(self.code[name](latent_LH, units), units, objective=objective)
            errors = errors * units.weight_T[units.time_of_Q]
            sums[name] = segment_sum(errors, units.document_J[span_Q], num_segments=batch.num_documents)
        return sums | self._routed(latent_LH, batch)

    def _text_nats(
        self, latent_LH: Float[Tensor, "L H"], units: TextUnits, input_UD: Float[Tensor, "U D"] | None
    ) -> tuple[Float[Tensor, " terms"], Int[Tensor, " terms"]]:
        """Of each symbol, and of its patch's end where that has to be said, or of each piece; and their documents."""
        logits = self.text_logits(latent_LH, units, input_UD)
        if self.model_config.text.vocabulary is not None:
            first_P = segment_firsts(units.patch_U, num_segments=len(units.token_P))
            return symbol_nats(logits, units.token_P), units.document_U[first_P]
        nats_U = symbol_nats(logits[:, :NUM_TARGETS], units.symbol_U)
        if self.model_config.text.predicts_end:
            nats_U = nats_U + end_nats(logits[:, NUM_TARGETS:], units.symbol_U, units.patch_U)
        if self.model_config.diffuses_text:
            nats_U = nats_U * units.weight_U
        return nats_U, units.document_U

    def _routed(self, latent_LH: Float[Tensor, "L H"], batch: Batch) -> Sums:
        asked = batch.route
        kind_RM, buckets = self.router(latent_LH, asked)
        nats = kind_nats(kind_RM, asked.target_R)
        for index, logits in enumerate(buckets.values(), start=1):
            here, bucket = chosen_bucket(asked, index)
            nats = nats + bucket_nats(logits, bucket, here)
        right = (kind_RM.detach().argmax(-1) == asked.target_R).float()
        ends = asked.span_end_R.float()
        by_document = {
            "router": nats,
            "router_right": right,
            "span_ends": ends,
            "span_ends_right": right * ends,
        }
        sums = {
            name: segment_sum(terms, asked.document_R, num_segments=batch.num_documents)
            for name, terms in by_document.items()
        }
        for name, trees in batch.trees.items():
            nats = split_nats(self.router.tree_head[name](latent_LH, trees), trees.split_K)
            document = trees.document_J[trees.tree_K]
            sums["router"] = sums["router"] + segment_sum(nats, document, num_segments=batch.num_documents)
        return sums
