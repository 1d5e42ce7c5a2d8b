"""This rank's blocks of the Atto under megatron-core, and its pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import tee
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.config.schema import AttoConfig, ParallelConfig
from matformer.hosts.base import Objective, Placed, Sums, Trunk
from matformer.hosts.megatron_layer import AttoNorm, layer_spec, transformer_config
from matformer.hosts.megatron_on_cpu import host_megatron_on_cpu, importing_megatron
from matformer.layers.attention import AttoView
from matformer.parallel.groups import Groups
from matformer.parcels import Batch, Exchange

host_megatron_on_cpu()
with importing_megatron():
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import (
        all_to_all,
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


@final
class MegatronTrunk(Trunk):
    """The layers of one stage as a megatron-core TransformerBlock; `stage`: which of the rank's, from 0.

    Megatron's [sequence, batch, width] is filled with (B * S, 1, H): everything it does is position-wise but for the
    attention core, which is ours and knows the rows. So nothing is ever transposed (docs/decisions/0002).
    """

    def __init__(
        self, atto: AttoConfig, *, plan: ParallelConfig, groups: Groups, stage: int = 0, modulated: bool = False
    ) -> None:
        super().__init__()
        self.config = transformer_config(atto, plan)
        self.groups, self.stage = groups, stage
        self.is_first = groups.is_first and stage == 0
        self.is_last = groups.is_last and stage == plan.virtual_stages - 1
        virtual = stage if plan.virtual_stages > 1 else None
        layer = layer_spec(atto, modulated=modulated, context=groups.cp)
        count = get_num_layers_to_build(self.config, virtual)
        self.first_layer = get_transformer_layer_offset(self.config, virtual)
        self.block = TransformerBlock(
            self.config,
            TransformerBlockSubmodules([layer] * count, layer_norm=ModuleSpec(module=AttoNorm)),
            pre_process=self.is_first,
            post_process=self.is_last,
            vp_stage=virtual,
        )

    def bring(self, rows: Float[Tensor, "R H"], slots: Int[Tensor, " R"], exchange: Exchange | None) -> Placed:
        if exchange is None:
            return super().bring(rows, slots, exchange)
        in_order = rows.index_select(0, slots.argsort())
        brought = all_to_all(
            self.groups.share, in_order, list(exchange.entering_received), list(exchange.entering_sent)
        )
        return brought, exchange.entering_slot_R

    def forward(self, hidden: Float[Tensor, "L H"] | None, view: AttoView, exchange: Exchange | None = None) -> Tensor:
        entering = None
        if hidden is not None:
            entering = hidden.unsqueeze(1)
            if self.groups.tp_size > 1 and not self.config.sequence_parallel:  # each rank's gradient is the whole: cut
                entering = gather_from_sequence_parallel_region(entering, tensor_parallel_output_grad=False)
        leaving = self.block(entering, None, packed_seq_params=self._told(view))
        if not self.is_last:
            return leaving
        return leaving.squeeze(1) if exchange is None else self._given_back(leaving, exchange)

    def _told(self, view: AttoView) -> AttoView:
        """The view with the times of the positions that this rank's layers hold."""
        if view.times is None:
            return view
        groups = self.groups
        chunks, chunk = groups.cp_size, groups.cp_rank
        if self.config.sequence_parallel:
            chunks, chunk = groups.share_size, groups.share_rank
        index = view.times.index_BS.flatten().chunk(chunks)[chunk]
        return replace(view, times=replace(view.times, index_BS=index[None]))

    def _given_back(self, leaving: Float[Tensor, "own 1 H"], exchange: Exchange) -> Float[Tensor, "L H"]:
        """The latents that this rank reads, from the ranks in whose chunks they stand; zeros at all others."""
        if self.groups.tp_size > 1 and not self.config.sequence_parallel:
            leaving = scatter_to_sequence_parallel_region(leaving)
        sent = leaving.squeeze(1).index_select(0, exchange.leaving_slot_R)
        read = all_to_all(self.groups.share, sent, list(exchange.leaving_received), list(exchange.leaving_sent))
        positions = len(leaving) * self.groups.share_size
        return read.new_zeros(positions, read.shape[1]).index_copy(0, exchange.read_slot_R, read)

    def receive(self, tensor: Tensor | None) -> None:
        self.block.set_input_tensor(tensor)  # pyright: ignore[reportArgumentType] - None clears it


def run_schedule(
    stages: Sequence[Any],  # our stages, as the engine's `module` holds them
    batches: Sequence[Batch],
    *,
    trunks: Sequence[MegatronTrunk],
    ready: Callable[[Batch], Batch],
    objective: Objective | None,
    around: Callable[[], AbstractContextManager[None]],
) -> list[Sums]:
    """All microbatches through megatron's schedule, backward too if there is an objective. Collective.

    ready: a microbatch as this rank's stages take it, asked for once and only when the first of them does: what it
    costs the CPU passes while the GPU computes. around: what each forward runs inside of.
    Returns each microbatch's sums on the last stage, [] elsewhere.
    """
    for stage, trunk in zip(stages, trunks, strict=True):  # read by megatron's schedules
        stage.config, stage.model_type, stage.vp_stage = trunk.config, ModelType.encoder_or_decoder, trunk.stage
    interleaved = len(stages) > 1
    sizes = {batch.grid.kind_BS.numel() for batch in batches}
    assert trunks[0].groups.pp_size == 1 or len(sizes) == 1, f"a pipeline sends equal shapes alone, got {sorted(sizes)}"

    def forward_step(iterator: Any, module: nn.Module) -> tuple[Any, Any]:  # noqa: ANN401 - megatron's contract
        batch = next(iterator)
        with around():
            return module(batch), loss_function

    def loss_function(sums: Sums) -> tuple[Tensor, Tensor, Sums]:
        one = torch.ones((), dtype=torch.int)
        loss = objective(sums) if objective else torch.zeros(())
        return loss, one, {name: value.detach() for name, value in sums.items()}

    iterators = tee(map(ready, batches), len(stages))
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=list(iterators) if interleaved else iterators[0],
        model=list(stages) if interleaved else stages[0],
        num_microbatches=len(batches),
        seq_length=batches[0].grid.kind_BS.numel() // trunks[0].groups.cp_size,
        micro_batch_size=1,
        forward_only=objective is None,
    )
    return list(outputs)
