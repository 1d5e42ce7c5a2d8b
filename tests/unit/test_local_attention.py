"""Local attention, rotary positions and grouped heads against torch's own dense attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matformer.layers import local_attention, tiles
from matformer.layers.attention import AttoView, DenseCore, atto_attention
from matformer.layers.local_attention import LocalAttention, LocalBlock, local_view
from matformer.layers.rotary import rotary_tables, rotate
from tests.tolerances import SAME_SUM

HEADS, WIDTH = 2, 8


def pieces(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Number of the piece, and place in it, of every symbol."""
    piece = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return piece, torch.cat([torch.arange(size) for size in sizes])


def dense(attention: LocalAttention, x_UD: Tensor, sizes: list[int], *, window: int, both_ways: bool = False) -> Tensor:
    """The same weights, a full matrix with a band for each piece, and rotary positions by complex numbers."""
    piece, place = pieces(sizes)
    query, key, value = attention.query_key_value(x_UD).view(len(x_UD), 3, HEADS, -1).unbind(1)
    half = WIDTH // HEADS // 2
    angle = place[:, None] * 10_000.0 ** (-torch.arange(half, dtype=x_UD.dtype) / half)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def turned(x: Tensor) -> Tensor:
        y = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
        return torch.cat((y.real, y.imag), -1)

    distance = torch.arange(len(x_UD))[:, None] - torch.arange(len(x_UD))
    band = (piece[:, None] == piece) & (distance.abs() < window) & (both_ways | (distance >= 0))
    query, key, value = (x.transpose(0, 1) for x in (turned(query), turned(key), value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=band)
    return attention.output(out.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("chunk", [64, 3])
@pytest.mark.parametrize("window", [1, 4, 5, 7, 64])
@pytest.mark.parametrize("sizes", [[1], [4], [13], [3, 9, 1, 6], [8, 8], [2, 30, 5]])
def test_local_attention_is_dense_attention_with_a_band_for_each_piece(
    sizes: list[int], window: int, chunk: int, both_ways: bool, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """chunk 3: windows that reach over one, two or all chunks before, and after."""
    monkeypatch.setattr(local_attention, "LONGEST_CHUNK", chunk)
    monkeypatch.setattr(tiles, "ROWS", chunk)
    torch.manual_seed(0)
    attention = LocalAttention(WIDTH, HEADS).double()
    x = torch.randn(sum(sizes), WIDTH, dtype=torch.float64, requires_grad=True)
    piece, place = pieces(sizes)
    view = local_view(piece, place, window=window, head_size=WIDTH // HEADS, both_ways=both_ways, tiled=tiled)
    got, expected = attention(x, view), dense(attention, x, sizes, window=window, both_ways=both_ways)
    torch.testing.assert_close(got, expected, rtol=0, atol=SAME_SUM[torch.float64])
    weight, inputs = torch.randn_like(got), (x, *attention.parameters())
    seen, wanted = (torch.autograd.grad((y * weight).sum(), inputs) for y in (got, expected))
    for mine, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=SAME_SUM[torch.float64])


@pytest.mark.parametrize("wrong", [{"window": 4}, {"window": 6}, {"both_ways": False}, {"sizes": [20, 17]}])
def test_the_dense_matrix_tells_a_wrong_mask_from_the_right_one(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_attention, "LONGEST_CHUNK", 3)
    torch.manual_seed(0)
    attention = LocalAttention(WIDTH, HEADS).double()
    asked: dict[str, Any] = {"sizes": [21, 16], "window": 5, "both_ways": True}
    x = torch.randn(37, WIDTH, dtype=torch.float64)
    expected = dense(attention, x, **asked)
    for changed, differs in (({}, False), (wrong, True)):
        mine = asked | changed
        view = local_view(
            *pieces(mine["sizes"]), window=mine["window"], head_size=WIDTH // HEADS, both_ways=mine["both_ways"]
        )
        assert ((attention(x, view) - expected).abs().max() > 1e-4) == differs


def test_an_empty_row_runs_and_gives_every_weight_a_gradient_of_zeros() -> None:
    block = LocalBlock(WIDTH, HEADS, inner=8)
    none = torch.zeros(0, dtype=torch.long)
    out = block(torch.zeros(0, WIDTH), local_view(none, none, window=4, head_size=WIDTH // HEADS))
    assert out.shape == (0, WIDTH)
    out.sum().backward()
    for name, weight in block.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


@pytest.mark.parametrize("both_ways", [False, True])
def test_a_symbol_sees_its_window_inside_its_piece_and_nothing_else(both_ways: bool) -> None:
    torch.manual_seed(0)
    attention, sizes, window = LocalAttention(WIDTH, HEADS), [6, 5], 3
    view = local_view(*pieces(sizes), window=window, head_size=WIDTH // HEADS, both_ways=both_ways)
    x = torch.randn(11, WIDTH, requires_grad=True)
    out = attention(x, view)
    seen = [
        torch.autograd.grad(out[i].sum(), x, retain_graph=True)[0].abs().sum(1).nonzero().flatten() for i in range(11)
    ]
    firsts, ends = [0] * 6 + [6] * 5, [6] * 6 + [11] * 5
    last = [min(ends[i], i + window) if both_ways else i + 1 for i in range(11)]
    assert [s.tolist() for s in seen] == [list(range(max(firsts[i], i - window + 1), last[i])) for i in range(11)]


def test_rotary_scores_depend_on_differences_of_positions_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(at_query: list[int], at_key: list[int], *, scale: int = 0) -> Tensor:
        tables = [
            rotary_tables(torch.tensor([at]) + scale, pairs=(1, 1, 1, 1), bases=(1e4, 1e2, 1e2, 1e2))
            for at in (at_query, at_key)
        ]
        return (rotate(query, tables[0]) * rotate(key, tables[1])).sum()

    here = score([7, 1, 2, 3], [4, 1, 0, 5])
    torch.testing.assert_close(score([7, 1, 2, 3], [4, 1, 0, 5], scale=100_000), here, rtol=0, atol=1e-9)
    for axis in range(4):
        moved = [7, 1, 2, 3]
        moved[axis] += 1
        assert (score(moved, [4, 1, 0, 5]) - here).abs() > 1e-3


def test_a_pair_turns_by_place_over_a_power_of_the_base() -> None:
    cos, sin = rotary_tables(torch.tensor([[3, 5]]), pairs=(2, 1), bases=(100.0, 10.0))
    angle = torch.tensor([[3.0, 0.3, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(cos, angle.cos())
    torch.testing.assert_close(sin, angle.sin())
    turned = rotate(torch.tensor([[1.0, 0, 0, 0, 0, 0]]), (cos[0], sin[0]))
    torch.testing.assert_close(
        turned[0, [0, 3]],
        torch.tensor([3.0, 3.0]).cos() * torch.tensor([1.0, 0])
        + torch.tensor([3.0, 3.0]).sin() * torch.tensor([0, 1.0]),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_are_torch_grouped_heads(kv_heads: int) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 6, kv_heads, 8, dtype=torch.float64)
    visible = torch.rand(2, 6, 6) < 0.5
    visible |= torch.eye(6, dtype=torch.bool)
    got = DenseCore(visible).attend(query, key, value)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=visible[:, None], enable_gqa=True
    )
    torch.testing.assert_close(got, expected.transpose(1, 2), rtol=0, atol=SAME_SUM[torch.float64])
    still = rotary_tables(torch.zeros(2, 6, 1, dtype=torch.long), pairs=(4,), bases=(10.0,))
    torch.testing.assert_close(atto_attention(query, key, value, view=AttoView(DenseCore(visible), still)), got)
