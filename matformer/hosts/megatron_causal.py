"""The Atto's sizes as megatron-core's own decoder: its layers, norms, rotary positions and causal attention.

What a language model costs there, beside which `tools/bench/gpu.py` stands ours. Nothing is trained with it.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from matformer.config.schema import AttoConfig, ParallelConfig
from matformer.hosts.megatron_layer import transformer_config
from matformer.hosts.megatron_on_cpu import importing_megatron
from matformer.layers.attention import with_equal_heads

with importing_megatron():
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

Core = Literal["transformer engine", "megatron", "torch"]
"""Whose causal attention. megatron: products of S x S numbers, which its way back computes anew; torch: flash."""


def causal_cores() -> list[Core]:
    """Those that run here."""
    engine: list[Core] = ["transformer engine"] if importlib.util.find_spec("transformer_engine") else []
    return [*engine, "megatron", "torch"]


class TorchCausal(nn.Module):
    """Torch's fused causal attention in the place of megatron's core."""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__()

    def forward(
        self,
        query: Float[Tensor, "S B A K"],
        key: Float[Tensor, "S B G K"],
        value: Float[Tensor, "S B G K"],
        *_: object,
        **__: object,
    ) -> Float[Tensor, "S B AK"]:
        key, value = with_equal_heads(query, key, value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).permute(2, 0, 1, 3).flatten(2)


@final
class MegatronCausal(nn.Module):
    """All layers and the final norm on one rank, weights drawn from a normal distribution of 0.02."""

    def __init__(self, atto: AttoConfig, *, plan: ParallelConfig, core: Core) -> None:
        super().__init__()
        self.core: Core = core
        config = transformer_config(atto, plan)
        if core == "megatron":
            with warnings.catch_warnings():  # that another core than this one needs no such thing
                warnings.simplefilter("ignore")
                config = replace(config, recompute_granularity="selective", recompute_modules=["core_attn"])
        options: dict[str, Any] = {"qk_layernorm": atto.qk_norm}
        if core == "transformer engine":
            layer: Any = get_gpt_layer_with_transformer_engine_spec(**options)
        else:
            layer = get_gpt_layer_local_spec(normalization="RMSNorm", **options)
        if core == "torch":
            layer.submodules.self_attention.submodules.core_attention = TorchCausal
        self.block = TransformerBlock(config, layer)
        self.rotary = RotaryEmbedding(
            atto.width // atto.heads,
            rotary_percent=1.0,
            rotary_base=int(atto.rotary_base),
            use_cpu_initialization=config.use_cpu_initialization,
        )
        for parameter in self.block.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden: Float[Tensor, "S H"]) -> Float[Tensor, "S H"]:
        mask = self._hidden_pairs(hidden) if self.core == "megatron" else None
        return self.block(hidden.unsqueeze(1), mask, rotary_pos_emb=self.rotary(len(hidden))).squeeze(1)

    def _hidden_pairs(self, hidden: Float[Tensor, "S H"]) -> Bool[Tensor, "1 1 S S"]:
        """True where a query must not see; megatron would make it itself, but on CUDA alone."""
        pairs = torch.ones(len(hidden), len(hidden), dtype=torch.bool, device=hidden.device)
        return pairs.triu(1)[None, None]
