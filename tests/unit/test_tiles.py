"""Attention by tiles against torch's dense attention, and its gradients against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matformer.layers import tiles
from matformer.layers.attention import AttoView, DenseCore, TiledCore, atto_attention
from matformer.layers.rotary import rotary_tables, rotate
from matformer.layers.tiles import even_rows, mask_tiles, run_tiles, self_attention, tile_attention
from tests.tolerances import SAME_SUM

HEADS, SIZE = 2, 4


def runs(count: int, keys: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """First key and the one after the last, of `count` queries over `keys` keys, at random."""
    first = torch.randint(0, keys, (count,), generator=draws).sort().values
    return first, torch.maximum(torch.randint(1, keys + 1, (count,), generator=draws).sort().values, first + 1)


def drawn(*shape: int, draws: torch.Generator, **settings: Any) -> Tensor:
    return torch.randn(shape, generator=draws, dtype=torch.float64, **settings)


def dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Rows `[N, A, K]` under one mask of all rows over all."""
    by_head = (x.transpose(0, 1) for x in (query, key, value))
    return F.scaled_dot_product_attention(*by_head, attn_mask=visible).transpose(0, 1)


def same(got: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """And the same gradients."""
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_SUM[torch.float64])
    weight = torch.linspace(-1, 2, got.numel(), dtype=got.dtype).view_as(got)
    seen, wanted = (torch.autograd.grad((x * weight).sum(), inputs) for x in (got, expected))
    for mine, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=10 * SAME_SUM[torch.float64])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rows", [3, 64])
def test_runs_of_keys_at_random(rows: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", rows)
    draws = torch.Generator().manual_seed(seed)
    count, keys = (int(n) for n in torch.randint(1, 40, (2,), generator=draws))
    first, end = runs(count, keys, draws)
    query = drawn(count, HEADS, SIZE, draws=draws, requires_grad=True)
    key, value = (drawn(keys, HEADS, SIZE, draws=draws, requires_grad=True) for _ in range(2))
    visible = (torch.arange(keys) >= first[:, None]) & (torch.arange(keys) < end[:, None])
    got = tile_attention(query, key, value, tiles=run_tiles(first, end))
    same(got, dense(query, key, value, visible), (query, key, value))


def test_a_key_too_few_is_told_apart() -> None:
    draws = torch.Generator().manual_seed(0)
    place = torch.arange(20)
    query, key, value = (drawn(20, HEADS, SIZE, draws=draws) for _ in range(3))
    visible = place <= place[:, None]
    expected = dense(query, key, value, visible)
    for end, differs in ((place + 1, False), (torch.where(place == 11, place, place + 1), True)):
        got = tile_attention(query, key, value, tiles=run_tiles(0 * place, end))
        assert ((got - expected).abs().max() > 1e-4) == differs


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rows", [3, 64])
def test_a_mask_of_any_pattern_as_the_atto_sees_it(rows: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", rows)
    draws = torch.Generator().manual_seed(0)
    visible = (torch.rand(2, 11, 11, generator=draws) < 0.3) | torch.eye(11, dtype=torch.bool)
    query = drawn(2, 11, 4, SIZE, draws=draws, requires_grad=True)
    key, value = (drawn(2, 11, 4 // groups, SIZE, draws=draws, requires_grad=True) for _ in range(2))
    rotary = rotary_tables(torch.arange(22).view(2, 11, 1), pairs=(SIZE // 2,), bases=(100.0,))
    got, expected = (
        atto_attention(query, key, value, view=AttoView(core, rotary))
        for core in (TiledCore(mask_tiles(visible)), DenseCore(visible))
    )
    same(got, expected, (query, key, value))


def test_gradients_are_those_of_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "ROWS", 3)
    draws = torch.Generator().manual_seed(0)
    found = run_tiles(*runs(7, 5, draws))
    query = drawn(7, HEADS, SIZE, draws=draws, requires_grad=True)
    key, value = (drawn(5, HEADS, SIZE, draws=draws, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: tile_attention(*x, tiles=found), (query, key, value))
    place = torch.arange(7)
    found = run_tiles((place - 2).clamp(min=0), place + 1)
    rotary = rotary_tables(place[:, None], pairs=(SIZE // 2,), bases=(100.0,))
    packed = drawn(7, 3 * HEADS * SIZE, draws=draws, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: self_attention(x, rotary, heads=HEADS, tiles=found), packed)


def test_packed_rows_are_turned_and_left_as_they_were() -> None:
    draws = torch.Generator().manual_seed(0)
    place = torch.arange(9)
    found = run_tiles((place - 3).clamp(min=0), place + 1)
    rotary = rotary_tables(place[:, None], pairs=(SIZE // 2,), bases=(100.0,))
    packed = drawn(9, 3 * HEADS * SIZE, draws=draws, requires_grad=True)
    before = packed.detach().clone()
    query, key, value = packed.view(9, 3, HEADS, SIZE).unbind(1)
    expected = tile_attention(rotate(query, rotary), rotate(key, rotary), value, tiles=found).flatten(1)
    same(self_attention(packed, rotary, heads=HEADS, tiles=found), expected, (packed,))
    got = self_attention(packed, rotary, heads=HEADS, tiles=found)
    weight = torch.ones_like(got)
    once, twice = (torch.autograd.grad(got, packed, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice) and torch.equal(packed, before) and weight.eq(1).all()
    with torch.no_grad():
        assert torch.equal(self_attention(packed, rotary, heads=HEADS, tiles=found), got)


def test_autocast_gives_bfloat16_and_counts_in_float32() -> None:
    draws = torch.Generator().manual_seed(0)
    place = torch.arange(9)
    found = run_tiles((place - 3).clamp(min=0), place + 1)
    rotary = rotary_tables(place[:, None], pairs=(SIZE // 2,), bases=(100.0,))
    packed = drawn(9, 3 * HEADS * SIZE, draws=draws).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = self_attention(packed, rotary, heads=HEADS, tiles=found)
        (grad,) = torch.autograd.grad(got.float().sum(), packed)
    exact = self_attention(packed.float(), rotary, heads=HEADS, tiles=found)
    assert got.dtype == grad.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (64, 64), (65, 65), (95, 95), (97, 49), (257, 65), (514, 65)])
def test_no_tile_is_left_with_a_row_or_two(count: int, rows: int) -> None:
    assert even_rows(count) == rows
