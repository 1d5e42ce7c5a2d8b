"""The real host: megatron-core's schedules around DeepSpeed's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matformer.config.schema import RunConfig
from matformer.config.time_conditioning import modulated_media
from matformer.hosts import deepspeed as zero
from matformer.hosts.base import (
    Host,
    LayerWeight,
    Objective,
    Reader,
    StepResult,
    Sums,
    TrainingState,
    Trunk,
    build_optimizer,
    layer_of,
    parameter_groups,
    read_shaped,
)
from matformer.hosts.layout import Layout, drawn, layouts, shape_of, to_global, to_local
from matformer.hosts.megatron import MegatronTrunk, run_schedule
from matformer.hosts.megatron_groups import ModelParallelUnit, build_groups
from matformer.hosts.plain import added
from matformer.hosts.replicated import ReplicatedWeights
from matformer.layers.modulation import position_times
from matformer.parallel.memory import writers
from matformer.parallel.shares import deal, share_out
from matformer.parcels import Batch


@final
class MegatronHost(Host):
    """tp x cp x dp x pp ranks. ZeRO 1 runs under megatron's schedule, 2 and 3 (pp 1) through the engine's own calls."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.groups = build_groups(config.parallel)
        self.steps = 0
        self.layouts: dict[str, Layout] = {}

    def build_trunks(self) -> list[Trunk]:
        model, plan = self.config.model, self.config.parallel
        self.trunks = [
            MegatronTrunk(
                model.atto, plan=plan, groups=self.groups, stage=stage, modulated=bool(modulated_media(model))
            )
            for stage in range(plan.virtual_stages)
        ]
        return list(self.trunks)

    def prepare(self, model: nn.Module) -> None:
        self.lay_out(model)
        seed, depth = self.config.seed, self.config.model.atto.layers
        for name, parameter in model.named_parameters():
            parameter.data.copy_(drawn(self.layouts[name], groups=self.groups, seed=seed, depth=depth))
            sharded = any(piece.dim is not None for piece in self.layouts[name].pieces)
            parameter.tensor_model_parallel = sharded  # pyright: ignore - DeepSpeed counts whole ones once in the norm
        groups = parameter_groups(model, weight_decay=self.config.train.weight_decay)
        optimizer = build_optimizer(groups, self.config)
        self.engine = zero.build_engine(model, optimizer, config=self.config, mpu=ModelParallelUnit())
        if self._has_moments():  # else DeepSpeed links the moments after the first group's first step: one group's only
            zero.make_room_for_moments(self.engine, 0)

    def lay_out(self, model: nn.Module) -> None:
        """Take the rank's stages: how their tensors stand to the global ones, and which are summed over TP."""
        atto = self.config.model.atto
        self.layouts = layouts(model, atto=atto, first_layers=[trunk.first_layer for trunk in self.trunks])
        self.writers = self._writers()
        self.model = model
        self.stages = list(model) if isinstance(model, nn.ModuleList) else [model]
        self.replicated = self._replicated()

    def _writers(self) -> dict[str, int]:
        """Which of the ranks that hold a stage writes each global tensor: about as many numbers each."""
        pieces = [piece for layout in self.layouts.values() for piece in layout.pieces]
        sizes = [prod(piece.global_shape(self.groups.tp_size)) for piece in pieces]
        dealt = deal({"all": sizes}, ranks=writers(self.config.parallel))["all"].tolist()
        return {piece.name: rank for piece, rank in zip(pieces, dealt, strict=True)}

    def _replicated(self) -> ReplicatedWeights | None:
        """Preludi, Code and router, of which each tensor-parallel rank runs a share; None where one rank runs all."""
        if self.groups.tp is None or self.groups.tp_size == 1:
            return None
        small = [module for stage in self.stages for name, module in stage.named_children() if name != "atto"]
        weights = ReplicatedWeights(small, group=self.groups.tp)
        if self.config.parallel.zero_stage == 3:
            weights.sum_by_hooks()
        return weights

    def around(self) -> AbstractContextManager[None]:
        """What a forward runs inside of."""
        if self.replicated is None or self.config.parallel.zero_stage == 3:
            return nullcontext()
        return self.replicated.summed()

    def train_step(self, batches: Sequence[Batch], *, objective: Objective, lr: float) -> StepResult:
        for group in zero.inner_groups(self.engine):
            group["lr"] = lr
        averaged = self.groups.reduce_size  # DeepSpeed averages; our losses are divided by global counts already

        def scaled(sums: Mapping[str, Tensor]) -> Tensor:
            return objective(sums) * averaged

        if self.config.parallel.zero_stage == 1:
            parts = self._through_schedule(batches, scaled)
        else:
            parts = [self._through_engine(self._ready(batch), scaled) for batch in batches]
        skipped_before = self.engine.skipped_steps
        self.engine.step()
        skipped = self.engine.skipped_steps > skipped_before
        self.steps += not skipped
        totals = added([{name: value.sum() for name, value in part.items()} for part in parts])
        return StepResult(self._whole(totals), float(self.engine.get_global_grad_norm() or 0.0), skipped)

    def _ready(self, batch: Batch) -> Batch:
        """A microbatch as this rank takes it: its share of the units, on its device. Made as late as it is needed."""
        return self.share(batch).to(self.engine.device)

    def share(self, batch: Batch) -> Batch:
        """This rank's share of a microbatch among those that hold it."""
        model, groups = self.config.model, self.groups
        if groups.share_size == 1:
            return batch
        share = share_out(batch, model=model, rank=groups.share_rank, ranks=groups.share_size)
        return replace(share, times=position_times(batch, modulated_media(model)))

    def _whole(self, sums: Sums) -> Sums:
        """Sums over all shares, on every rank that holds the microbatch. Collective over those."""
        if self.groups.share_size == 1 or not sums:
            return sums
        stacked = torch.stack(list(sums.values()))
        dist.all_reduce(stacked, group=self.groups.share)
        return dict(zip(sums, stacked, strict=True))

    def _through_schedule(self, batches: Sequence[Batch], objective: Objective | None) -> list[Sums]:
        around = self.around if objective else nullcontext
        return run_schedule(
            self.stages, batches, trunks=self.trunks, ready=self._ready, objective=objective, around=around
        )

    def _through_engine(self, batch: Batch, objective: Objective) -> Sums:
        with self.around():
            sums = self.engine(batch)
        self.engine.backward(objective(sums), scale_wrt_gas=False)
        return {name: value.detach() for name, value in sums.items()}

    @torch.no_grad()
    def forward_only(self, batches: Sequence[Batch]) -> list[Sums]:
        if self.config.parallel.zero_stage == 1:
            filled = [*batches, *[batches[-1]] * (-len(batches) % self._microbatch_group())]
            sums = self._through_schedule(filled, None)[: len(batches)]
        else:
            sums = [self.engine(self._ready(batch)) for batch in batches]
            zero.forget_gathered(self.engine)  # else an average that is swapped in afterwards has no effect
        return [self._whole(one) for one in sums]

    def _microbatch_group(self) -> int:
        """What an interleaved schedule takes microbatches in multiples of."""
        plan = self.config.parallel
        return plan.pp if plan.virtual_stages > 1 else 1

    def sums_with_graph(self, batch: Batch) -> Sums:
        return self.model(self._ready(batch))

    def layer_weights(self) -> list[LayerWeight]:
        found = []
        for name, parameter in self.model.named_parameters():
            pieces = self.layouts[name].pieces
            layer = layer_of(pieces[0].name)
            if layer is not None:
                found.append(LayerWeight(layer, parameter, any(piece.dim is not None for piece in pieces)))
        return found

    @torch.no_grad()
    def state(self) -> TrainingState:
        keys = ("weights", *zero.MOMENTS) if self._has_moments() else ("weights",)
        found = {key: self._gathered(lambda p, key=key: zero.full_value(p, key)) for key in keys}
        return TrainingState(found.pop("weights"), found, self.steps)

    def _has_moments(self) -> bool:
        return self.config.train.optimizer == "adamw"

    def gather_stored(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {id(p): stored[name] for name, p in self.model.named_parameters()}
        return self._gathered(lambda p: zero.stored_to_full(p, values[id(p)], group=self.groups.reduce))

    def _gathered(self, value_of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        """Global tensors in the host's memory: on the device one parameter at a time is whole, and let go again."""
        groups, tensors = self.groups, {}
        here = groups.reduce_rank * groups.tp_size + groups.tp_rank
        for name, parameter in self.model.named_parameters():
            full = value_of(parameter).view(shape_of(parameter)).float()
            for piece, tensor in to_global(full, self.layouts[name], groups=groups):
                if self.writers[piece] == here:
                    tensors[piece] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return tensors

    @torch.no_grad()
    def load(self, read: Reader, *, step: int) -> None:
        self.steps = step
        keys = ("weights", *zero.MOMENTS) if self._has_moments() else ("weights",)
        if self._has_moments():
            zero.make_room_for_moments(self.engine, step)
        for name, parameter in self.model.named_parameters():
            values = {key: self._read_local(read, key, name) for key in keys}
            zero.write_values(parameter, values, rank=self.groups.reduce_rank)

    def _read_local(self, read: Reader, key: str, name: str) -> Tensor:
        layout = self.layouts[name]
        shapes = {f"{key}/{piece.name}": piece.global_shape(self.groups.tp_size) for piece in layout.pieces}
        found = read_shaped(read, shapes)
        return to_local(
            {piece.name: found[f"{key}/{piece.name}"] for piece in layout.pieces}, layout, groups=self.groups
        )

    @torch.no_grad()
    def scatter_stored(self, read: Reader, key: str) -> dict[str, Tensor]:
        return {
            name: zero.full_to_stored(p, self._read_local(read, key, name), rank=self.groups.reduce_rank).clone()
            for name, p in self.model.named_parameters()
        }

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, zero.stored_weight(parameter)
