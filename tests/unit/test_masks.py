"""Who sees whom: the matrices written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from matformer.atto import masks
from matformer.data.packing import Noise, Piece, Place, pack_batch
from matformer.parcels import Grid, Kind
from tests.made import MODEL, document, image, mixed_documents, packed

S, T, H, N, C, E, P = (
    int(kind) for kind in (Kind.START, Kind.TEXT, Kind.HEADER, Kind.NOISED, Kind.CLEAN, Kind.CLOSING, Kind.PAD)
)


def grid(
    kinds: list[int],
    *,
    documents: list[int] | None = None,
    spans: list[int] | None = None,
    media: list[int] | None = None,
    blind: list[int] | None = None,
) -> Grid:
    """One sequence; what is not given is one document of causal positions."""
    size = len(kinds)

    def row(values: list[int] | None, other: int) -> Tensor:
        return torch.tensor([values if values is not None else [other] * size])

    return Grid(
        kind_BS=torch.tensor([kinds]),
        modality_BS=row(None, 0),
        document_BS=row(documents, 0),
        span_BS=row(spans, -1),
        media_BS=row(media, -1),
        blind_BS=row(blind, 0).bool(),
        axes_BSX=torch.zeros(1, size, 4, dtype=torch.long),
    )


def drawn(mask_SS: Tensor) -> list[str]:
    """A mask as rows of x and dots."""
    return ["".join("x" if seen else "." for seen in row) for row in mask_SS.tolist()]


def picture(docstring: str) -> list[str]:
    """The matrix in a docstring: rows that begin with a letter and hold x and dots."""
    rows = []
    for line in docstring.splitlines():
        marks = line.split()[1:]
        taken = [mark for mark in marks if mark in ("x", ".")]
        if len(taken) >= 10:
            rows.append("".join(taken[:10]))
    return rows


def test_the_matrix_of_the_docstring_is_the_mask() -> None:
    seen = grid(
        [S, T, T, H, N, N, C, C, E, T],
        spans=[-1, -1, -1, -1, 0, 0, 1, 1, -1, -1],
        media=[-1, -1, -1, 0, 0, 0, 0, 0, 0, -1],
    )
    assert masks.__doc__ is not None
    expected = picture(masks.__doc__)
    assert len(expected) == 10
    assert drawn(masks.visible(seen)[0]) == expected


def test_a_blind_span_sees_the_start_and_itself_and_no_one_sees_its_header() -> None:
    # start a | header n n (blind) c c closing | b
    seen = grid(
        [S, T, H, N, N, C, C, E, T],
        spans=[-1, -1, -1, 0, 0, 1, 1, -1, -1],
        media=[-1, -1, 0, 0, 0, 0, 0, 0, -1],
        blind=[0, 0, 1, 1, 1, 0, 0, 0, 0],
    )
    assert drawn(masks.visible(seen)[0]) == [
        "x........",
        "xx.......",
        "x.x......",  # header: start and itself, not the text
        "x.xxx....",
        "x.xxx....",
        "xx...xx..",  # clean copy: the text, not the blind header
        "xx...xx..",
        "xx...xxx.",
        "xx...xxxx",
    ]


def test_a_blind_span_does_not_see_another_blind_span() -> None:
    # start | header n (blind) closing | header n (blind) closing
    seen = grid(
        [S, H, N, E, H, N, E],
        spans=[-1, -1, 0, -1, -1, 2, -1],
        media=[-1, 0, 0, 0, 1, 1, 1],
        blind=[0, 1, 1, 0, 1, 1, 0],
    )
    assert drawn(masks.visible(seen)[0]) == [
        "x......",
        "xx.....",
        "xxx....",
        "x..x...",
        "x...x..",
        "x...xx.",
        "x..x..x",
    ]


def test_documents_do_not_see_each_other_and_padding_sees_itself() -> None:
    seen = grid([S, T, S, T, T, P, P], documents=[0, 0, 1, 1, 1, -1, -1])
    assert drawn(masks.visible(seen)[0]) == [
        "x......",
        "xx.....",
        "..x....",
        "..xx...",
        "..xxx..",
        ".....x.",
        "......x",
    ]


def test_two_given_spans_are_two_blocks() -> None:
    # start | header c c closing | header c c closing
    seen = grid([S, H, C, C, E, H, C, C, E], spans=[-1, -1, 1, 1, -1, -1, 3, 3, -1], media=[-1] + [0] * 4 + [1] * 4)
    assert drawn(masks.visible(seen)[0]) == [
        "x........",
        "xx.......",
        "xxxx.....",
        "xxxx.....",
        "xxxxx....",
        "xxxxxx...",
        "xxxxxxxx.",
        "xxxxxxxx.",
        "xxxxxxxxx",
    ]


def test_under_a_noised_context_what_follows_sees_noised_media_and_not_noised_text() -> None:
    # start a | header n n closing | b, and the same with text as the noised span, which has a clean copy
    kinds, media = [S, T, H, N, N, E, T], [-1, -1, 0, 0, 0, 0, -1]
    seen = grid(kinds, spans=[-1, -1, -1, 0, 0, -1, -1], media=media)
    seen = replace(seen, modality_BS=torch.tensor([[-1, 0, 1, 1, 1, 1, 0]]))
    assert drawn(masks.visible(seen, masks.sees_noised_context)[0]) == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxxx..",
        "xxxxx..",
        "xxxxxx.",
        "xxxxxxx",
    ]
    blind = replace(seen, blind_BS=torch.tensor([[0, 0, 1, 1, 1, 0, 0]]).bool())
    assert drawn(masks.visible(blind, masks.sees_noised_context)[0])[2:] == [
        "x.x....",
        "x.xxx..",
        "x.xxx..",
        "xx.xxx.",  # the patches, which are themselves, but not the header, which has not read its document
        "xx.xxxx",
    ]
    text = grid([S, H, N, N, C, C, E], spans=[-1, -1, 0, 0, 1, 1, -1], media=[-1] + [0] * 6)
    assert torch.equal(masks.visible(text, masks.sees_noised_context), masks.visible(text))


@pytest.mark.parametrize("blind", [False, True])
def test_the_mask_of_packed_documents_is_the_sentence_of_the_contract(blind: bool) -> None:
    """Position by position in plain Python, over sequences that the packing itself made."""
    documents = mixed_documents()
    rows = [documents[:3], documents[5:6] + documents[3:4], [documents[7]]]

    def draw(key: str, span: int, shape: tuple[int, int]) -> Noise:
        return Noise(blind and span == 0, 0.5, np.zeros(shape, np.float32))

    pieces = [[Piece(one, Place(), Place(len(one.spans))) for one in row] for row in rows]
    seen = pack_batch(pieces, [draw] * len(rows), model=MODEL, sequence_latents=64).grid
    assert bool(seen.blind_BS.any()) == blind
    assert masks.visible(seen).tolist() == [_by_sentence(seen, row) for row in range(len(rows))]


def _by_sentence(seen: Grid, row: int) -> list[list[bool]]:
    kind, documents, spans, media = (
        x[row].tolist() for x in (seen.kind_BS, seen.document_BS, seen.span_BS, seen.media_BS)
    )
    blind = seen.blind_BS[row].tolist()

    def sees(q: int, k: int) -> bool:
        if P in (kind[q], kind[k]):
            return q == k
        same_span = spans[q] >= 0 and spans[q] == spans[k]
        allowed = documents[q] == documents[k] and (k <= q or same_span)
        allowed = allowed and (kind[k] != N or same_span)
        if blind[q]:
            return allowed and (kind[k] == S or (blind[k] and media[q] == media[k]))
        return allowed and not (blind[k] and kind[k] == H)

    return [[sees(q, k) for k in range(len(kind))] for q in range(len(kind))]


def test_packing_moves_a_mask_and_does_not_change_it() -> None:
    first, second = mixed_documents()[0], document("z", b"zz", image(3), b"!")
    alone = masks.visible(packed([[second]], length=20).grid)[0]
    beside = masks.visible(packed([[first, second]], length=40).grid)[0]
    size = int((packed([[second]], length=20).grid.kind_BS != P).sum())
    begin = int((packed([[first]], length=40).grid.kind_BS != P).sum())
    assert torch.equal(beside[begin : begin + size, begin : begin + size], alone[:size, :size])
