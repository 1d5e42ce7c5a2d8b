"""The noise level as a vector."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matformer.shapes import TIME_WAVES


class TimeEmbedding(nn.Module):
    """Sinusoids of 1000 t, then a two-layer MLP. Source: DiT, `models.py` TimestepEmbedder; ours takes t in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * TIME_WAVES, width)
        self.second = nn.Linear(width, width)

    def forward(self, time_T: Float[Tensor, " T"]) -> Float[Tensor, "T H"]:
        waves = time_waves(time_T).to(self.first.weight.dtype)
        return self.second(nn.functional.silu(self.first(waves)))


def time_waves(time_T: Float[Tensor, " T"]) -> Float[Tensor, "T waves"]:
    """Cosines and sines of 1000 t at frequencies from 1 to about 1 / 10,000."""
    exponent = torch.arange(TIME_WAVES, device=time_T.device, dtype=torch.float32) / TIME_WAVES
    angle = 1000.0 * time_T.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
