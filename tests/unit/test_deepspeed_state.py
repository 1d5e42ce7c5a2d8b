"""What is written into DeepSpeed's state lies where the weights lie: the meta device stands in for a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from matformer.hosts import deepspeed as zero


def test_moments_and_count_lie_beside_the_masters() -> None:
    flat = torch.zeros(6, device="meta")
    inner = SimpleNamespace(state={})
    zero.make_room_for_moments(
        SimpleNamespace(optimizer=SimpleNamespace(fp32_partitioned_groups_flat=[flat], optimizer=inner)), 3
    )
    assert {key: value.device.type for key, value in inner.state[flat].items()} == {
        "step": "meta",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }


def test_what_is_read_from_a_checkpoint_is_moved_to_the_weights() -> None:
    whole = nn.Parameter(torch.zeros(2, 3, device="meta"))
    assert zero.full_to_stored(whole, torch.ones(2, 3), rank=0).device.type == "meta"
    shard = nn.Parameter(torch.zeros(0, device="meta"))
    shard.ds_tensor = torch.zeros(4, device="meta")  # pyright: ignore[reportAttributeAccessIssue]
    found = zero.full_to_stored(shard, torch.arange(6.0).view(2, 3), rank=1)
    assert found.device.type == "meta" and found.shape == (4,)
