"""FlexAttention in a process of its own: torch traces the rule, which no checker of shapes may wrap."""

from __future__ import annotations

import warnings

import torch

from matformer.atto.masks import Rule, visible
from matformer.atto.trunk import blocks_of_rule
from matformer.layers.attention import DenseCore
from matformer.parcels import Grid, Kind


def apart_from_dense(grid: Grid, rule: Rule, heads: tuple[int, int]) -> float:
    """The largest difference of outputs, in float64 and padding apart, from those under the whole mask."""
    draws = torch.Generator().manual_seed(0)
    sizes = [(*grid.kind_BS.shape, count, 8) for count in (heads[0], heads[1], heads[1])]
    query, key, value = (torch.randn(size, generator=draws, dtype=torch.float64) for size in sizes)
    with warnings.catch_warnings():  # that it is not compiled
        warnings.simplefilter("ignore")
        got = blocks_of_rule(grid, rule).attend(query, key, value)
    expected = DenseCore(visible(grid, rule)).attend(query, key, value)
    return float((got - expected)[grid.kind_BS != Kind.PAD].abs().max())
