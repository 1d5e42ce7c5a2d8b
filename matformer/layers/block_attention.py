"""Attention on a GPU: no mask of S x S anywhere, neither in memory nor in the kernel's work.

`BlockCore` is FlexAttention under a block mask that is made from the rule itself, some rows of blocks at a time;
`CausalCore` is FlashAttention by documents, where nothing but "earlier in my document" is to be seen. Both run on a CPU
too, by torch's reference and by one kernel a document, so that tests hold them against the dense mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from matformer.layers.attention import AttentionCore, with_equal_heads

BLOCK = 128  # FlexAttention's own default
AT_ONCE = 2**24  # entries of the mask that are looked at together while the blocks are found

MaskRows = Callable[[slice], Bool[Tensor, "B q S"]]  # the mask's rows of some queries
MaskEntry = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (row, head, query, key) -> seen


@dataclass(frozen=True, slots=True)
class BlockCore(AttentionCore):
    """Blocks where all is seen are computed bare, blocks where something is seen under the rule, the others never."""

    mask: BlockMask

    def attend(
        self,
        query_BSAK: Float[Tensor, "B S A K"],
        key_BSGK: Float[Tensor, "B S G K"],
        value_BSGK: Float[Tensor, "B S G K"],
    ) -> Float[Tensor, "B S A K"]:
        query, key, value = (x.transpose(1, 2) for x in (query_BSAK, key_BSGK, value_BSGK))
        run = _compiled() if query.is_cuda else flex_attention
        grouped = query.shape[1] != key.shape[1]
        return run(query, key, value, block_mask=self.mask, enable_gqa=grouped).transpose(1, 2)


@functools.cache
def _compiled() -> Any:  # noqa: ANN401 - flex_attention, compiled
    return torch.compile(flex_attention, dynamic=False)


def block_mask(rows: MaskRows, entry: MaskEntry, *, batch: int, length: int) -> BlockMask:
    """The blocks of a mask `[batch, length, length]`, given as its rows and as a rule for one entry, which must agree.

    No more than AT_ONCE entries, or one row of blocks, are there at a time.
    """
    blocks = -(-length // BLOCK)
    rows_at_once = max(1, AT_ONCE // (batch * blocks * BLOCK * BLOCK))
    some, whole = [], []
    for first in range(0, blocks, rows_at_once):
        queries = slice(first * BLOCK, min((first + rows_at_once) * BLOCK, length))
        one_some, one_whole = _blocks_of(rows(queries), columns=blocks)
        some.append(one_some)
        whole.append(one_whole)
    any_BMM, all_BMM = torch.cat(some, dim=1), torch.cat(whole, dim=1)
    partly, entirely = _listed(any_BMM & ~all_BMM), _listed(all_BMM)
    return BlockMask.from_kv_blocks(*partly, *entirely, BLOCK_SIZE=BLOCK, mask_mod=entry, seq_lengths=(length, length))


def _blocks_of(seen_BqS: Bool[Tensor, "B q S"], *, columns: int) -> tuple[Tensor, Tensor]:
    """Of rows of whole blocks (the last may be cut): is anything seen in a block `[B, m, columns]`, is everything?

    What lies behind the sequence is neither seen nor missed.
    """
    batch, queries, keys = seen_BqS.shape
    rest = (0, columns * BLOCK - keys, 0, -queries % BLOCK)
    shape = (batch, -1, BLOCK, columns, BLOCK)
    some = F.pad(seen_BqS, rest, value=False).view(shape).any(4).any(2)
    missing = F.pad(~seen_BqS, rest, value=False).view(shape).any(4).any(2)
    return some, some & ~missing


def _listed(flags_BMM: Bool[Tensor, "B M M"]) -> tuple[Tensor, Tensor]:
    """How many columns of each row of blocks, and which, those first: `[B, 1, M]` and `[B, 1, M, M]`."""
    count = flags_BMM.sum(-1, dtype=torch.int32)
    order = flags_BMM.int().argsort(dim=-1, descending=True, stable=True).int()
    return count[:, None], order[:, None]


class CausalCore(AttentionCore):
    """For masks that are plain causal: runs of positions, of which each sees the earlier ones of its own.

    lengths: of the runs, over all positions of the microbatch in flat order.
    """

    def __init__(self, lengths: Sequence[int], *, device: torch.device) -> None:
        self.lengths = list(lengths)
        self.first = F.pad(torch.tensor(self.lengths, dtype=torch.int32), (1, 0)).cumsum(0, dtype=torch.int32)
        self.first = self.first.to(device, non_blocking=True)

    def attend(
        self,
        query_BSAK: Float[Tensor, "B S A K"],
        key_BSGK: Float[Tensor, "B S G K"],
        value_BSGK: Float[Tensor, "B S G K"],
    ) -> Float[Tensor, "B S A K"]:
        rows = (x.flatten(0, 1) for x in (query_BSAK, key_BSGK, value_BSGK))
        by_flash = query_BSAK.is_cuda and flash_takes(query_BSAK.dtype)
        run = self._by_flash if by_flash else self._one_by_one
        return run(*rows).view_as(query_BSAK)

    def _by_flash(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # here: it imports 1.5 s of what no CPU needs

        longest, grouped = max(self.lengths), query.shape[1] != key.shape[1]
        before = (-1, 0)  # all that is to the left, nothing to the right
        out = varlen_attn(
            query, key, value, self.first, self.first, longest, longest, window_size=before, enable_gqa=grouped
        )
        assert isinstance(out, Tensor)
        return out

    def _one_by_one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        for rows in zip(*(x.split(self.lengths) for x in (query, key, value)), strict=True):
            asked, key_of_run, value_of_run = (x[None] for x in rows)
            keys, values = with_equal_heads(asked, key_of_run, value_of_run)
            asked, keys, values = (x.transpose(1, 2) for x in (asked, keys, values))
            out = F.scaled_dot_product_attention(asked, keys, values, is_causal=True)
            parts.append(out.transpose(1, 2)[0])
        return torch.cat(parts)


def flash_takes(dtype: torch.dtype) -> bool:
    """Whether FlashAttention has kernels for this dtype."""
    return dtype in (torch.bfloat16, torch.float16)
