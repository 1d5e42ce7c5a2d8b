"""A stage of a large model on no memory: meta tensors, under torch's fake process group of any size."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from matformer.config.schema import RunConfig
from matformer.engine.loop import build_stages
from matformer.hosts.hosted import MegatronHost
from tests.ranks.cases import parallel_state


def parameters_on_meta(config: RunConfig, ranks: tuple[int, ...]) -> list[int]:
    """Parameters of the real host's stage on each of these ranks; the process belongs to no other world."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    found = []
    for rank in ranks:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(config.parallel.ranks), "LOCAL_RANK": "0"}
        dist.init_process_group("fake", rank=rank, world_size=config.parallel.ranks, store=FakeStore())
        _build_groups(config)
        host = MegatronHost(config)
        with torch.device("meta"):
            model = build_stages(host, config)
        assert all(parameter.is_meta for parameter in model.parameters())
        found.append(sum(parameter.numel() for parameter in model.parameters()))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return found


def _build_groups(config: RunConfig) -> None:
    """As the host does, but without the gloo groups beside, which no fake store can carry."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # after the host's own import

    plan = config.parallel
    virtual = plan.virtual_stages if plan.virtual_stages > 1 else None
    parallel_state.initialize_model_parallel(plan.tp, plan.pp, virtual, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1234)
