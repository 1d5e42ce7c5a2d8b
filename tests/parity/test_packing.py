"""A document's losses are its own: alone, packed in any order, padded, in any batch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch

from matformer.atto import masks, trunk
from matformer.atto.masks import Positions
from matformer.data.packing import document_positions
from matformer.data.sources import Document
from matformer.model import Matformer
from matformer.parcels import Batch
from tests.made import MODEL, document, image, mixed_documents, one_a_row, packed, plain_host, tiny_run
from tests.tolerances import SAME_SUM

ByDocument = Mapping[str, Mapping[str, float]]


def model_in(dtype: torch.dtype) -> Matformer:
    """The stirred tiny model."""
    host = plain_host(tiny_run())
    assert isinstance(host.model, Matformer)
    return host.model.to(dtype)


@torch.no_grad()
def sums_of(model: Matformer, batch: Batch) -> ByDocument:
    """Every part of the loss of every document of a batch."""
    sums = model(batch)
    return {
        key: {part: float(values[number]) for part, values in sums.items()}
        for number, key in enumerate(batch.document_keys)
    }


def alone(model: Matformer, documents: Sequence[Document]) -> ByDocument:
    """Each document in a batch of its own, without a position of padding."""
    found: dict[str, Mapping[str, float]] = {}
    for one in documents:
        found |= sums_of(model, one_a_row([one], length=document_positions(one, model=MODEL)))
    return found


def assert_same_sums(seen: ByDocument, expected: ByDocument, *, dtype: torch.dtype) -> None:
    """Relative to each sum; documents of `seen` alone."""
    assert seen
    for key, parts in seen.items():
        for part, value in parts.items():
            limit = SAME_SUM[dtype] * max(abs(expected[key][part]), 1.0)
            assert abs(value - expected[key][part]) <= limit, f"{key}, {part}: {value}, alone {expected[key][part]}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def test_documents_of_the_mix_have_all_parts_of_the_loss() -> None:
    expected = alone(model_in(torch.float64), mixed_documents())
    for part in ("text", "image", "audio", "router"):
        assert sum(parts[part] > 0 for parts in expected.values()) >= 2, part
    assert expected["h"]["image"] > 0 and expected["c"]["image"] == 0


@DTYPES
def test_packed_with_others_in_any_order_is_alone(dtype: torch.dtype) -> None:
    model, documents = model_in(dtype), mixed_documents()
    expected = alone(model, documents)
    orders = [documents, documents[::-1], documents[3:] + documents[:3], documents[1::2] + documents[::2]]
    for order in orders:
        assert_same_sums(sums_of(model, packed([order], length=200)), expected, dtype=dtype)
        rows = [order[:1], order[1:4], order[4:]]
        assert_same_sums(sums_of(model, packed(rows, length=120)), expected, dtype=dtype)


@DTYPES
def test_padded_is_alone(dtype: torch.dtype) -> None:
    model, documents = model_in(dtype), mixed_documents()
    expected = alone(model, documents)
    for length in (48, 61, 130):
        assert_same_sums(sums_of(model, one_a_row(documents, length=length)), expected, dtype=dtype)


@DTYPES
def test_in_batches_of_any_size_is_alone(dtype: torch.dtype) -> None:
    model, documents = model_in(dtype), mixed_documents()
    expected = alone(model, documents)
    for size in range(1, len(documents) + 1):
        found: dict[str, Mapping[str, float]] = {}
        for first in range(0, len(documents), size):
            found |= sums_of(model, one_a_row(documents[first : first + size]))
        assert_same_sums(found, expected, dtype=dtype)


def test_every_pair_of_documents_in_one_row_is_alone() -> None:
    model, documents = model_in(torch.float64), mixed_documents()
    expected = alone(model, documents)
    pairs = [[first, second] for first, second in itertools.permutations(documents[:5], 2)]
    for pair in pairs:
        assert_same_sums(sums_of(model, packed([pair], length=70)), expected, dtype=torch.float64)


def without_documents(query: Positions, key: Positions) -> torch.Tensor:
    """A planted fault: who sees whom, across documents."""
    together = masks.same_span(query, key)
    return (masks.causal(query, key) | together) & (~masks.noised(key) | together)


def padding_seen(query: Positions, key: Positions) -> torch.Tensor:
    """A planted fault: everyone also sees the last position of the sequence."""
    return masks.sees(query, key) | (key.place == key.place.max())


@pytest.mark.parametrize("planted", [without_documents, padding_seen])
def test_a_wrong_mask_is_seen(planted: object, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in(torch.float64)
    documents = [document("p", b"some text"), document("q", b"caption", image(1), b"end")]
    expected = alone(model, documents)
    assert_same_sums(sums_of(model, packed([documents], length=60)), expected, dtype=torch.float64)
    monkeypatch.setattr(trunk, "sees", planted)
    with pytest.raises(AssertionError):
        assert_same_sums(sums_of(model, packed([documents], length=60)), expected, dtype=torch.float64)
