"""FlexAttention in a process of its own: torch traces the rule, which no checker of shapes may wrap."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from matformer.atto.masks import Rule, visible
from matformer.atto.trunk import blocks_of_rule
from matformer.layers.attention import DenseCore
from matformer.parcels import Grid, Kind


def apart_from_dense(grid: Grid, rule: Rule, heads: tuple[int, int]) -> float:
    """The largest difference of outputs, in float64 and padding apart, from those under the whole mask."""
    rows = drawn(grid, heads, torch.float64)
    with warnings.catch_warnings():  # that it is not compiled
        warnings.simplefilter("ignore")
        got = blocks_of_rule(grid, rule).attend(*rows)
    return difference(got, grid, rule, rows)


def compiled_apart_from_dense(grids: Sequence[Grid], rule: Rule, heads: tuple[int, int]) -> tuple[float, int]:
    """The same of several microbatches through torch's compiler, in float32; and how often it compiled."""
    run, worst = torch.compile(flex_attention, dynamic=False), 0.0
    for grid in grids:
        rows = drawn(grid, heads, torch.float32)
        query, key, value = (x.transpose(1, 2) for x in rows)
        out = run(query, key, value, block_mask=blocks_of_rule(grid, rule).mask, enable_gqa=True)
        assert isinstance(out, torch.Tensor)
        worst = max(worst, difference(out.transpose(1, 2), grid, rule, rows))
    return worst, counters["stats"]["unique_graphs"]


def drawn(grid: Grid, heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values."""
    draws = torch.Generator().manual_seed(0)
    sizes = [(*grid.kind_BS.shape, count, 16) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(size, generator=draws, dtype=dtype) for size in sizes]


def difference(got: torch.Tensor, grid: Grid, rule: Rule, rows: Sequence[torch.Tensor]) -> float:
    """From attention under the whole mask, padding apart."""
    expected = DenseCore(visible(grid, rule)).attend(*rows)
    return float((got - expected)[grid.kind_BS != Kind.PAD].abs().max())
