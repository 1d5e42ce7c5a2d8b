import warnings

import pytest
import torch
from transformers.models.blt.modeling_blt import byte_group_hash_function

from matformer.layers.ngrams import NgramEmbedding, NgramSettings, ngram_hashes

PRIME = 1_000_000_007


def wrapped(number: int) -> int:
    """What an int64 that wraps around holds of a number."""
    return (number + 2**63) % 2**64 - 2**63


def places(symbols: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(symbols))


def test_hashes_are_written_out() -> None:
    symbols = torch.tensor([7, 0, 255, 256])
    found = ngram_hashes(symbols, places(symbols), sizes=(2, 3))
    assert found[:, 0].tolist() == [7 * PRIME, 7, 255 * PRIME, 255 + 256 * PRIME]
    assert found[:, 1].tolist() == [
        wrapped(7 * PRIME**2),
        wrapped(7 * PRIME),
        wrapped(7 + 255 * PRIME**2),
        wrapped(255 * PRIME + 256 * PRIME**2),
    ]


def test_hashes_wrap_as_int64() -> None:
    symbols = torch.full((8,), 255)
    found = int(ngram_hashes(symbols, places(symbols), sizes=(8,))[-1, 0])
    exact = sum(255 * PRIME**i for i in range(8))
    assert found == wrapped(exact) != exact
    assert found % 500_002 == 177_786  # what the source's arithmetic gives; exact integers give 316,662
    assert exact % 500_002 == 316_662


@pytest.mark.parametrize("size", range(2, 9))
def test_hashes_are_those_of_transformers(size: int) -> None:
    symbols = torch.randint(0, 259, (3, 40), generator=torch.Generator().manual_seed(size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = byte_group_hash_function(symbols, size, PRIME, 5000)
    # all rows one after the other, as pieces of a microbatch lie: theirs are padded rows
    flat, place = symbols.flatten(), places(symbols[0]).repeat(3)
    assert torch.equal(ngram_hashes(flat, place, sizes=(size,))[:, 0] % 5000, theirs.flatten())


def test_no_ngram_looks_into_the_piece_before() -> None:
    place = torch.tensor([0, 1, 2, 0, 1])
    one = ngram_hashes(torch.tensor([1, 2, 3, 8, 9]), place, sizes=(2, 4))
    other = ngram_hashes(torch.tensor([5, 6, 7, 8, 9]), place, sizes=(2, 4))
    assert torch.equal(one[3:], other[3:]) and not torch.equal(one[:3], other[:3])


def test_embedding_sums_a_row_of_each_size() -> None:
    ngrams = NgramEmbedding(3, NgramSettings((2, 3), rows=50, gain=2.0))
    symbols = torch.tensor([10, 20, 30])
    rows = ngram_hashes(symbols, places(symbols), sizes=(2, 3)) % 50
    table = ngrams.table.weight
    expected = 2.0 * (table[rows[:, 0]] + table[50 + rows[:, 1]])
    torch.testing.assert_close(ngrams(symbols, places(symbols)), expected)


def test_no_symbols_give_no_rows_and_a_gradient_of_zeros() -> None:
    ngrams = NgramEmbedding(3, NgramSettings((2,), rows=5, gain=1.0))
    none = torch.zeros(0, dtype=torch.long)
    ngrams(none, none).sum().backward()
    assert ngrams.table.weight.grad is not None and not ngrams.table.weight.grad.any()
