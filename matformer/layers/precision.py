"""Where sums are taken: never below float32."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """The same numbers in float32, or in float64 where they come so (tests show invariances there)."""
    return x if x.dtype == torch.float64 else x.float()
