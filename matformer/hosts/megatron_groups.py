"""Our plan -> the world of ranks, cut into groups: megatron-core's, and those of context parallelism."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from matformer.config.schema import ParallelConfig
from matformer.errors import ParallelError
from matformer.hosts.megatron_on_cpu import host_megatron_on_cpu, importing_megatron
from matformer.parallel.groups import Groups
from matformer.parallel.plan import Axis, Plan

host_megatron_on_cpu()
with importing_megatron():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def build_groups(plan: ParallelConfig) -> Groups:
    """Join the world (gloo on CPU, nccl on GPUs) and cut it into tp x cp x dp x pp. Collective.

    Megatron is not told of context parallelism: the ranks of a context group are neighbours on its data axis that hold
    one microbatch, so gradients are summed over them as over data, and its schedules multiply nothing by cp.

    Raises ParallelError where the launcher started another number of ranks than the plan needs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != plan.ranks:
        raise ParallelError(
            f"parallel.tp * cp * pp * dp = {plan.tp} * {plan.cp} * {plan.pp} * {plan.dp} needs {plan.ranks} ranks, but "
            f"{world} were started; start the run with slurm/pretrain.sh or change parallel.*"
        )
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # asked for by megatron's tensor parallel layers
    # both hosts still call collectives by the names that torch renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if not dist.is_initialized():
        _join_world(plan)
    if not parallel_state.is_initialized():
        virtual = plan.virtual_stages if plan.virtual_stages > 1 else None
        minutes: Any = plan.timeout_seconds / 60  # megatron's word is int; it becomes a timedelta
        parallel_state.initialize_model_parallel(
            plan.tp,
            plan.pp,
            virtual,
            distributed_timeout_minutes=minutes,
            create_gloo_process_groups=False,  # beside those of the backend: nobody speaks in them
        )
        model_parallel_cuda_manual_seed(1234)  # asked for under sequence parallelism; no random number is drawn from it
    state: Any = parallel_state
    tp, reduce = state.get_tensor_model_parallel_group(), state.get_data_parallel_group()
    ranks = Plan(tp=plan.tp, cp=plan.cp, dp=plan.dp, pp=plan.pp)
    here, timeout = ranks.coordinates(dist.get_rank()), timedelta(seconds=plan.timeout_seconds)
    return Groups(
        rank=dist.get_rank(),
        world=world,
        tp_rank=here.tp,
        tp_size=plan.tp,
        cp_rank=here.cp,
        cp_size=plan.cp,
        pp_rank=here.pp,
        pp_size=plan.pp,
        dp_rank=here.dp,
        dp_size=plan.dp,
        tp=tp,
        pp=state.get_pipeline_model_parallel_group(),
        dp=_joined(ranks, "dp", timeout=timeout) if plan.cp > 1 else reduce,
        cp=_joined(ranks, "cp", timeout=timeout) if plan.cp > 1 else None,
        share=_joined(ranks, "tp", "cp", timeout=timeout) if plan.cp > 1 else tp,
        reduce=reduce,
    )


def _joined(ranks: Plan, *axes: Axis, timeout: timedelta) -> dist.ProcessGroup:
    """This rank's group along these axes. Collective: every rank makes every group."""
    members = [list(group) for group in ranks.groups(*axes)]
    group, _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _join_world(plan: ParallelConfig) -> None:
    timeout = timedelta(seconds=plan.timeout_seconds)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:  # one rank without a launcher; DeepSpeed asks for the variable
        os.environ.setdefault("LOCAL_RANK", "0")
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


class ModelParallelUnit:
    """What DeepSpeed asks of an `mpu`: megatron's parallel_state, and the two calls that it lacks."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - stands for a whole module
        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())
