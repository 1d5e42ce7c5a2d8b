"""The one division: weighted sums over counts of the whole global batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def total_loss(sums: Mapping[str, Tensor], *, counts: Mapping[str, float], weights: Mapping[str, float]) -> Tensor:
    """sum over parts of weight * sum / count. `counts` are summed over all ranks and microbatches beforehand.

    A part with count 0 in the whole global batch contributes 0 * its sum: nothing, but its weights keep a gradient.
    """
    parts = [sums[name].sum() * (weight / max(counts.get(name, 0.0), 1.0)) for name, weight in weights.items()]
    return torch.stack(parts).sum()
