"""Our plan and config -> DeepSpeed: the engine, and the way to its partitions under ZeRO 1, 2 and 3."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from matformer.config.schema import RunConfig
from matformer.parallel.memory import LARGEST_BUCKET

if not torch.cuda.is_available():  # say so, else DeepSpeed looks for one and warns
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_engine(model: nn.Module, optimizer: torch.optim.Optimizer, *, config: RunConfig, mpu: object) -> Any:  # noqa: ANN401
    """DeepSpeed around one pipeline stage. `engine.step()` is the only place where gradients are reduced."""
    deepspeed_logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():  # else the first init compiles a C++ op: 50 s, a compiler and ninja
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False, dist_init_required=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            mpu=mpu,
            config=engine_config(config, parameters=sum(p.numel() for p in model.parameters())),
            dist_init_required=False,
        )
    return engine


def engine_config(config: RunConfig, *, parameters: int) -> dict[str, Any]:
    """Every DeepSpeed key that this project sets, in one place. parameters: of this rank's stage."""
    train, plan = config.train, config.parallel
    keys: dict[str, Any] = {
        "managed_gradient_accumulation": False,  # the caller owns the boundary, as a pipeline schedule needs
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": config.microbatches,
        "gradient_clipping": train.clip,
        "zero_optimization": {
            "stage": plan.zero_stage,
            "reduce_bucket_size": min(parameters, LARGEST_BUCKET),
            "stage3_param_persistence_threshold": 0,  # every stored weight is a shard: averages can be swapped in
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if plan.offload_optimizer:
        keys["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        keys["zero_force_ds_cpu_optimizer"] = False  # torch's own AdamW runs there; DeepSpeed's needs a compiler
    if plan.dtype == "bfloat16":
        keys["bf16"] = {"enabled": True, "immediate_grad_update": True}
        keys["data_types"] = {"grad_accum_dtype": "fp32"}
        keys["communication_data_type"] = "fp32"  # else the sum is rounded to bfloat16 on its way, with one rank too
    return keys


def full_value(parameter: nn.Parameter, key: str) -> Tensor:
    """The float32 master (key "weights") or moment of a local parameter, whole over DP. Collective."""
    value = safe_get_full_fp32_param(parameter) if key == "weights" else safe_get_full_optimizer_state(parameter, key)
    assert value is not None, "every parameter is trained"
    return value


def stored_weight(parameter: nn.Parameter) -> Tensor:
    """The weight as this rank stores it: whole, or its shard under ZeRO 3."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data  # pyright: ignore


def forget_gathered(engine: Any) -> None:  # noqa: ANN401
    """Under ZeRO 3, let go of whole weights that a forward kept: the next one gathers the shards as they are then."""
    if hasattr(engine.optimizer, "parameter_offload"):
        engine.optimizer.parameter_offload.partition_all_parameters()


def stored_to_full(parameter: nn.Parameter, stored: Tensor, *, group: Any) -> Tensor:  # noqa: ANN401
    """A tensor stored like the parameter, whole. Collective under ZeRO 3."""
    if not hasattr(parameter, "ds_tensor"):
        return stored
    shards = [torch.empty_like(stored) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(shards, stored.contiguous(), group=group)
    return torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)  # pyright: ignore


def full_to_stored(parameter: nn.Parameter, full: Tensor, *, rank: int) -> Tensor:
    """What this rank stores of a whole tensor, on its device; the last shard of ZeRO 3 is padded with zeros."""
    full = full.to(stored_weight(parameter).device)  # a checkpoint is read on the host
    if not hasattr(parameter, "ds_tensor"):
        return full
    size = parameter.ds_tensor.numel()  # pyright: ignore
    flat = full.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _masters(zero: Any) -> list[Tensor]:  # noqa: ANN401
    """This rank's flat float32 masters, by whichever of DeepSpeed's optimizers holds them."""
    names = (
        "fp32_partitioned_groups_flat",  # ZeRO 3
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_groups_flat_partition",  # ZeRO 1 in bfloat16 with float32 accumulation
    )
    return next(getattr(zero, name) for name in names if hasattr(zero, name))


@torch.no_grad()
def make_room_for_moments(engine: Any, step: int) -> None:  # noqa: ANN401
    """Give a fresh engine's flat partitions AdamW state, so that moments can be written into it."""
    zero = engine.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    for flat in _masters(zero):
        state = {key: torch.zeros_like(flat) for key in MOMENTS}
        # the fused kernel asks for the count on the weights' device
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step), device=flat.device), **state}
    if not stage3:
        zero._hp_optimizer_states_linked = False  # link again: the tensors are new
        zero._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def write_values(parameter: nn.Parameter, values: Mapping[str, Tensor], *, rank: int) -> None:
    """Set the stored weight, its master and its moments from whole float32 tensors."""
    weight = values["weights"]
    stored_weight(parameter).copy_(full_to_stored(parameter, weight, rank=rank))
    stage3 = hasattr(parameter, "ds_tensor")
    for key, value in values.items():
        local = full_to_stored(parameter, value.float(), rank=rank)
        if key == "weights":
            (safe_set_local_fp32_param if stage3 else safe_set_full_fp32_param)(parameter, local)
        elif stage3:
            safe_set_local_optimizer_state(parameter, local, key)
        else:
            safe_set_full_optimizer_state(parameter, local, key)


def inner_groups(engine: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401
    """The optimizer's parameter groups, to set the learning rate."""
    yield from engine.optimizer.optimizer.param_groups
