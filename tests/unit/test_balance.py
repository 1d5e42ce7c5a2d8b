"""Rows are dealt out evenly by FLOPs, and their FLOPs are told before they are packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from matformer.data.counts import counts_of
from matformer.data.packing import Piece, Place, draw_zeros, pack_batch
from matformer.data.row_cost import row_counts, row_flops
from matformer.data.sources import Document
from matformer.parallel.balance import deal_rows, ranks_that_share
from matformer.parallel.flops import batch_flops
from tests.made import MODEL, audio, document, image, mixed_documents, with_media

LENGTH = 96


def test_a_deal_is_even_in_number_and_nearly_in_cost() -> None:
    draws = np.random.default_rng(0)
    for _ in range(20):
        costs = draws.integers(50, 300, 64).tolist()
        dealt = deal_rows(costs, ranks=8)
        assert sorted(row for rows in dealt for row in rows) == list(range(64))
        assert {len(rows) for rows in dealt} == {8}
        loads = [sum(costs[row] for row in rows) for rows in dealt]
        turns = [sum(costs[rank::8]) for rank in range(8)]
        assert max(loads) / np.mean(loads) < 1.005 < max(turns) / np.mean(turns)


def test_a_deal_that_greed_alone_misses() -> None:
    dealt = deal_rows([8, 7, 6, 5, 4, 0], ranks=2)
    assert {sum([8, 7, 6, 5, 4, 0][row] for row in rows) for rows in dealt} == {15}
    assert deal_rows([3, 3, 3, 3], ranks=4) == [[0], [1], [2], [3]]
    assert deal_rows([9, 1, 5], ranks=1) == [[0, 1, 2]]


def test_ranks_share_in_groups_of_one_size() -> None:
    assert [ranks_that_share(dp, most=8) for dp in (1, 2, 8, 12, 7, 64, 11)] == [1, 2, 8, 6, 7, 8, 1]
    assert ranks_that_share(8, most=1) == 1


def cut_after(one: Document, span: int, patch: int) -> Piece:
    return Piece(one, Place(), Place(span, patch))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"time_conditioning": "token"},
        {"media_context": "noised"},
        {"objective": "next_latent", "next_latent": {"noises": 1}},
    ],
)
def test_what_is_told_before_packing_is_what_is_counted_after(keys: dict[str, Any]) -> None:
    model = with_media(MODEL, **keys)
    rows = [[Piece(one, Place(), Place(len(one.spans)))] for one in mixed_documents()]
    rows.append([cut_after(document("cut", b"a text that is cut", image(1)), 0, 3)])
    rows.append([cut_after(document("x", audio(3), b"a text that is cut", image(1)), 1, 4), *rows[0]])
    for pieces in rows:
        batch = pack_batch([pieces], [draw_zeros], model=model, sequence_latents=LENGTH)
        counted, told = counts_of(batch, model), row_counts(pieces, model=model, sequence_latents=LENGTH)
        assert (told.text.symbols, told.text.patches) == (counted.text.symbols, counted.text.patches)
        for name in model.media:
            assert (told.media[name].noised, told.media[name].clean) == (
                counted.media[name].noised,
                counted.media[name].clean,
            )
        assert row_flops(pieces, model=model, sequence_latents=LENGTH) == pytest.approx(
            batch_flops(model, counted), rel=0.03
        )
