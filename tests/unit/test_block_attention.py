"""The GPU's cores, which run on a CPU too, against the whole mask."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matformer.atto.masks import Rule, same_document, sees, sees_noised_context, visible
from matformer.atto.trunk import attention_core, blocks_of_rule
from matformer.layers import block_attention
from matformer.layers.attention import AttentionCore, DenseCore
from matformer.layers.block_attention import BlockCore, CausalCore
from matformer.parcels import Grid, Kind
from tests.made import document, mixed_documents, packed
from tests.ranks.flex import apart_from_dense, compiled_apart_from_dense
from tests.ranks.launcher import Ranks

LENGTH = 75  # no multiple of a block
BOTH = pytest.mark.parametrize("rule", [sees, sees_noised_context])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 positions, two rows of them at a time: a short sequence has some of every sort."""
    monkeypatch.setattr(block_attention, "BLOCK", 16)
    monkeypatch.setattr(block_attention, "AT_ONCE", 2 * 3 * 5 * 16 * 16)


def media_grid() -> Grid:
    """Three rows: text and media, the same with blind spans, and one text that fills some blocks."""
    documents = mixed_documents()
    grid = packed([documents[:3], documents[3:6], [document("long", b"word " * 40)]], length=LENGTH).grid
    blind = (grid.kind_BS == Kind.NOISED) | (grid.kind_BS == Kind.HEADER)
    blind[0] = False
    return replace(grid, blind_BS=blind)


def text_grid() -> Grid:
    """Two rows of short texts, and padding."""
    rows = [[document("a", b"one two three"), document("b", b"four five")], [document("c", b"six " * 20)]]
    return packed(rows, length=LENGTH).grid


def written_out(core: BlockCore) -> Tensor:
    """The mask `[B, S, S]` that the lists of blocks and the rule for one entry stand for."""
    mask, block = core.mask, block_attention.BLOCK
    count, order = mask.kv_num_blocks[:, 0], mask.kv_indices[:, 0]
    whole_count, whole_order = (x[:, 0] for x in (mask.full_kv_num_blocks, mask.full_kv_indices) if x is not None)
    rows, blocks = count.shape
    seen = torch.zeros(rows, blocks * block, blocks * block, dtype=torch.bool)
    index = torch.arange(LENGTH)
    for row in range(rows):
        entries = torch.zeros(blocks * block, blocks * block, dtype=torch.bool)
        here, head = torch.full((LENGTH, LENGTH), row), torch.zeros(LENGTH, LENGTH)
        query, key = (x.expand(LENGTH, LENGTH) for x in (index[:, None], index[None]))
        entries[:LENGTH, :LENGTH] = mask.mask_mod(here, head, query, key)
        for line in range(blocks):
            queries = slice(line * block, (line + 1) * block)
            for column in order[row, line, : count[row, line]].tolist():
                keys = slice(column * block, (column + 1) * block)
                assert 0 < entries[queries, keys].sum()
                seen[row, queries, keys] = entries[queries, keys]
            for column in whole_order[row, line, : whole_count[row, line]].tolist():
                assert not seen[row, queries, column * block : (column + 1) * block].any(), "listed twice"
                seen[row, queries, column * block : (column + 1) * block] = True
    return seen


@BOTH
def test_blocks_and_rule_say_what_the_whole_mask_says(rule: Rule) -> None:
    grid = media_grid()
    core = blocks_of_rule(grid, rule)
    seen = written_out(core)[:, :LENGTH, :LENGTH]
    assert torch.equal(seen, visible(grid, rule))
    listed = core.mask.kv_num_blocks.sum() + core.mask.full_kv_num_blocks.sum()  # pyright: ignore
    assert core.mask.full_kv_num_blocks.any() and listed < 0.7 * 3 * 5 * 5  # pyright: ignore


def test_a_rule_that_the_blocks_do_not_follow_is_seen() -> None:
    grid = media_grid()
    wrong = BlockCore(replace_rule(blocks_of_rule(grid, sees), blocks_of_rule(grid, same_document)))
    with pytest.raises(AssertionError):
        assert torch.equal(written_out(wrong)[:, :LENGTH, :LENGTH], visible(grid, sees))


def replace_rule(blocks: BlockCore, rule: BlockCore) -> Any:  # noqa: ANN401 - torch's BlockMask
    """The blocks of one core with the entries of another."""
    blocks.mask.mask_mod = rule.mask.mask_mod
    return blocks.mask


def assert_same_attention(core: AttentionCore, grid: Grid, rule: Rule, *, heads: tuple[int, int]) -> None:
    """Outputs of all positions but padding, and their gradients, in float64, against the whole mask."""
    draws = torch.Generator().manual_seed(0)
    rows = len(grid.kind_BS)

    def drawn(count: int) -> Tensor:
        return torch.randn(rows, LENGTH, count, 8, generator=draws, dtype=torch.float64, requires_grad=True)

    query, key, value = drawn(heads[0]), drawn(heads[1]), drawn(heads[1])
    real = (grid.kind_BS != Kind.PAD)[:, :, None, None]
    toward = torch.randn(query.shape, generator=draws, dtype=torch.float64) * real
    found = []
    for one in (core, DenseCore(visible(grid, rule))):
        out = one.attend(query, key, value) * real
        found.append((out, *torch.autograd.grad((out * toward).sum(), (query, key, value))))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@BOTH
def test_flex_attention_is_attention_under_the_mask(rule: Rule, heads: tuple[int, int]) -> None:
    """Outputs alone: on a CPU torch has no way back through it."""
    with Ranks(1) as ranks:
        (apart,) = ranks.run(apart_from_dense, media_grid(), rule, heads, limit_seconds=120.0)
    assert apart < 1e-12


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++ on a CPU")
def test_the_compiler_takes_the_rule_and_compiles_once_for_all_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "BLOCK", 128)  # as in the other process
    documents = mixed_documents()
    long = document("long", b"word " * 240)  # of three blocks and more: one is seen whole
    grids = [packed([[long], documents[n : n + 3]], length=4 * 128 + 7).grid for n in range(3)]
    assert all(blocks_of_rule(grid, sees).mask.full_kv_num_blocks.any() for grid in grids)  # pyright: ignore
    with Ranks(1) as ranks:
        ((apart, graphs),) = ranks.run(compiled_apart_from_dense, grids, sees, (4, 2), limit_seconds=300.0)
    assert apart < 1e-5 and graphs == 1


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_by_runs_is_attention_under_a_causal_mask(heads: tuple[int, int]) -> None:
    grid = text_grid()
    runs = grid.plain_causal_runs()
    assert runs is not None and sum(runs) == 2 * LENGTH and len(runs) == 5
    assert_same_attention(CausalCore(runs, device=torch.device("cpu")), grid, sees, heads=heads)
    joined = CausalCore([runs[0] + runs[1], *runs[2:]], device=torch.device("cpu"))
    with pytest.raises(AssertionError):  # the planted fault: two documents as one run
        assert_same_attention(joined, grid, sees, heads=heads)


def test_runs_begin_where_flash_attention_is_told() -> None:
    core = CausalCore([3, 1, 4], device=torch.device("cpu"))
    assert core.first.tolist() == [0, 3, 4, 8] and core.first.dtype == torch.int32


@pytest.mark.parametrize("hidden", [lambda grid: media_grid(), lambda grid: blind_somewhere(grid)])
def test_a_grid_with_more_in_it_than_order_has_no_runs(hidden: Callable[[Grid], Grid]) -> None:
    assert hidden(text_grid()).plain_causal_runs() is None


def blind_somewhere(grid: Grid) -> Grid:
    """A header that does not see its document."""
    blind = grid.blind_BS.clone()
    blind[1, 3] = True
    return replace(grid, blind_BS=blind)


def test_a_device_takes_the_core_that_its_mask_allows() -> None:
    meta = torch.device("meta")
    assert isinstance(attention_core(text_grid().to(meta), sees), CausalCore)
    assert isinstance(attention_core(media_grid().to(meta), sees), BlockCore)


class Largest(TorchDispatchMode):
    """The most numbers that any operation inside gave."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return found


def test_no_mask_of_the_whole_sequence_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "BLOCK", 128)
    monkeypatch.setattr(block_attention, "AT_ONCE", 2**20)
    length = 4096
    grid = packed([mixed_documents()], length=length).grid
    with Largest() as largest:
        blocks_of_rule(grid, sees)
    assert largest.numbers <= 2**20 < length**2
    with Largest() as largest:  # the control
        visible(grid, sees)
    assert largest.numbers == length**2
