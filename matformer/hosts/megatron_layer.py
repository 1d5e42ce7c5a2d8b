"""One layer of the Atto as megatron-core builds it, by specs alone, and every field of megatron's that we set.

Weights that every TP rank holds whole but that saw only a share of the work (q/k norms: their heads; norms and
modulations under sequence parallelism: their positions) pass through a copy whose backward sums over TP inside the
graph, before any hook or optimizer sees the gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from matformer.config.schema import AttoConfig, ParallelConfig
from matformer.hosts.megatron_on_cpu import host_megatron_on_cpu, importing_megatron
from matformer.layers.attention import AttoView, atto_attention
from matformer.layers.modulation import Rows, TimeModulation, modulate, rows_of_positions
from matformer.layers.norm import rms_norm
from matformer.shapes import ATTO_PARTS

host_megatron_on_cpu()
with importing_megatron():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import all_to_all, copy_to_tensor_model_parallel_region
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer


def transformer_config(atto: AttoConfig, plan: ParallelConfig) -> TransformerConfig:
    """Every megatron field that this project sets, in one place."""
    dtype = torch.bfloat16 if plan.dtype == "bfloat16" else torch.float32
    with warnings.catch_warnings():  # megatron warns of the defaults of its own deprecated fields
        warnings.simplefilter("ignore")
        return _transformer_config(atto, plan, dtype=dtype)


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def stage_layout(layers: Sequence[int]) -> list[list[str]]:
    """Layers of each stage, in running order, as megatron is told them."""
    stages = [["decoder"] * count for count in layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _transformer_config(atto: AttoConfig, plan: ParallelConfig, *, dtype: torch.dtype) -> TransformerConfig:
    return TransformerConfig(
        num_layers=atto.layers,
        hidden_size=atto.width,
        num_attention_heads=atto.heads,
        num_query_groups=atto.kv_heads,
        kv_channels=atto.width // atto.heads,
        ffn_hidden_size=atto.ffn_width,
        layernorm_epsilon=atto.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        sequence_parallel=plan.sequence_parallel,
        pipeline_model_parallel_layout=stage_layout(plan.layers_of_stages(atto.layers)) if plan.pp > 1 else None,
        # Two interleaved ranks stand before and behind each other: a batch would pair what one sends on with what the
        # other gives back.
        batch_p2p_comm=plan.virtual_stages == 1,
        overlap_p2p_comm=plan.virtual_stages > 1,
        **RECOMPUTE[plan.recompute],
        pipeline_dtype=dtype,
        params_dtype=dtype,
        calculate_per_token_loss=True,  # our losses are divided already: megatron divides no more
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # weights are drawn by global name
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


class AttoNorm(nn.Module):
    """RMSNorm of the residual stream; under sequence parallelism its weight's gradient is summed over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.epsilon, self.shared = eps, config.sequence_parallel
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Float[Tensor, "... H"]) -> Float[Tensor, "... H"]:
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.shared else self.weight
        return rms_norm(x, weight, epsilon=self.epsilon)


class HeadNorm(AttoNorm):
    """RMSNorm of queries or keys: each TP rank sees its own heads, so the gradient is always summed over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        self.shared = config.tensor_model_parallel_size > 1


class ModulatedNorm(AttoNorm):
    """AttoNorm, then scale and shift: what `ModulatedLayer` has laid ready for this forward."""

    rows: tuple[Tensor, Tensor] | None = None  # (shift, scale)

    def forward(self, x: Float[Tensor, "... H"]) -> Float[Tensor, "... H"]:
        assert self.rows is not None
        shift, scale = self.rows
        return modulate(super().forward(x), shift=shift, scale=scale)


class GatedAdd:
    """residual + (1 + gate) * branch, in the place of megatron's bias-dropout-add: we have neither bias nor dropout."""

    gate: Tensor | None = None

    def __call__(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, None], Tensor, float], Tensor]:
        return self._add

    def _add(self, branch_and_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        assert self.gate is not None
        return residual + (1 + self.gate) * branch_and_bias[0]


class ModulatedLayer(TransformerLayer):
    """Megatron's layer told the times of media positions; the same numbers as `plain.Layer` with `modulated`.

    Its norms and its two additions are given to it by the spec, but megatron hands them no view: so their rows are
    laid ready before each forward. The weights are whole on every TP rank. Under sequence parallelism a rank's rows are
    those of its own positions, and the gradient of the table of times is summed over TP on the way back.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - megatron's
        super().__init__(config, *args, **kwargs)
        self.modulation = TimeModulation(config.hidden_size, parts=ATTO_PARTS)
        self.shared = config.sequence_parallel

    def forward(self, *args: Any, packed_seq_params: AttoView, **kwargs: Any) -> Any:  # noqa: ANN401 - megatron's
        assert packed_seq_params.times is not None
        index_L1 = packed_seq_params.times.index_BS.flatten()[:, None]  # of this rank's positions
        found = self.modulation(packed_seq_params.times.time_T)
        if self.shared:
            found = copy_to_tensor_model_parallel_region(found)
        first, second = rows_of_positions(found, index_L1)
        parts: Any = self
        _lay(first, norm=parts.input_layernorm, add=parts.self_attn_bda)
        _lay(second, norm=parts.pre_mlp_layernorm, add=parts.mlp_bda)
        leaving = super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        _lay(None, norm=parts.input_layernorm, add=parts.self_attn_bda)  # the graph holds them as long as it needs
        _lay(None, norm=parts.pre_mlp_layernorm, add=parts.mlp_bda)
        return leaving


def _lay(rows: Rows | None, *, norm: ModulatedNorm, add: GatedAdd) -> None:
    norm.rows, add.gate = (rows[:2], rows[2]) if rows else (None, None)


class AttoCore(nn.Module):
    """The attention core inside megatron's SelfAttention: ours, with the view that travels as `packed_seq_params`.

    Under context parallelism this rank's positions with all its heads become all positions with some of its heads, and
    back (DeepSpeed-Ulysses, Jacobs 2023): every rank attends under the whole mask, whatever it is, with equal work.
    """

    def __init__(self, config: TransformerConfig, *, context: dist.ProcessGroup | None = None, **_: object) -> None:
        super().__init__()
        self.config, self.context = config, context

    def forward(
        self,
        query: Float[Tensor, "L 1 A K"],
        key: Float[Tensor, "L 1 G K"],
        value: Float[Tensor, "L 1 G K"],
        attention_mask: None,
        *,
        packed_seq_params: AttoView,
        **_: object,
    ) -> Float[Tensor, "L 1 AK"]:
        rows = tuple(x.squeeze(1) for x in (query, key, value))
        if self.context is not None:
            rows = some_heads(*rows, group=self.context)
        in_rows = (x.unflatten(0, packed_seq_params.rows) for x in rows)
        out = atto_attention(*in_rows, view=packed_seq_params).flatten(0, 1)
        if self.context is not None:
            out = own_positions(out, group=self.context)
        return out.flatten(1).unsqueeze(1)


def some_heads(
    query: Float[Tensor, "l A K"], key: Float[Tensor, "l G K"], value: Float[Tensor, "l G K"], *, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Own positions of all heads -> all positions of this rank's share of them, in one exchange. Collective.

    Fewer key/value heads than ranks are sent to each rank that asks them.
    """
    ranks = group.size()
    if key.shape[1] < ranks:
        key, value = (x.repeat_interleave(ranks // x.shape[1], dim=1) for x in (key, value))
    by_rank = [x.unflatten(1, (ranks, -1)) for x in (query, key, value)]
    sent = torch.cat(by_rank, dim=2).transpose(0, 1).flatten(0, 1).contiguous()
    received: Tensor = all_to_all(group, sent)
    first, second, third = received.split([x.shape[2] for x in by_rank], dim=1)
    return first, second, third


def own_positions(out: Float[Tensor, "L a K"], *, group: Any) -> Float[Tensor, "l A K"]:
    """All positions of a share of the heads -> this rank's positions of all heads. Collective."""
    received: Tensor = all_to_all(group, out.contiguous())
    return received.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)


def layer_spec(atto: AttoConfig, *, modulated: bool, context: dist.ProcessGroup | None = None) -> Any:  # noqa: ANN401
    """A layer of the Atto as megatron builds it. context: the ranks that hold the other positions."""
    layer: Any = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = ModulatedNorm if modulated else AttoNorm
    if modulated:
        layer.module = ModulatedLayer
        parts.self_attn_bda = parts.mlp_bda = GatedAdd
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(module=AttoCore, params={"context": context})
    if atto.qk_norm:
        attention.q_layernorm = attention.k_layernorm = ModuleSpec(module=HeadNorm)
    return layer
