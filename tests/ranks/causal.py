"""Megatron-core's own causal decoder, asked on a rank of its own."""

from __future__ import annotations

from typing import Any

import torch

from matformer.config.schema import AttoConfig, ParallelConfig
from matformer.hosts.megatron_causal import MegatronCausal, causal_cores
from matformer.hosts.megatron_groups import build_groups


def answers_by_core(atto: AttoConfig) -> dict[str, dict[str, Any]]:
    """Of the same weights and rows: what leaves, what comes back, and the number of parameters."""
    plan = ParallelConfig()
    build_groups(plan)
    rows, found = torch.randn(24, atto.width, generator=torch.Generator().manual_seed(1)), {}
    for core in causal_cores():
        torch.manual_seed(0)
        trunk, entering = MegatronCausal(atto, plan=plan, core=core), rows.clone().requires_grad_()
        leaving = trunk(entering)
        leaving[:12].square().sum().backward()
        assert entering.grad is not None
        found[core] = {
            "leaving": leaving.detach().numpy(),
            "back": entering.grad.numpy(),
            "parameters": sum(one.numel() for one in trunk.parameters()),
        }
    return found
