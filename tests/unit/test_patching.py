"""Patchers: boundaries written out, and equal on every prefix."""

from __future__ import annotations

import numpy as np
import pytest

from matformer.config.schema import PatcherConfig
from matformer.data.patching import Patcher, SpacePatcher, StaticPatcher, build_patcher, text_symbols
from matformer.parallel.seeds import generator
from matformer.shapes import END

DOCUMENTS = [b"", b"a", b" ", b"one two,  three\n\n4", "né 你好 ok".encode(), b"\xff\xc3\x80\x80", b"x" * 40, b" " * 40]


def patches(patcher: Patcher, data: bytes) -> list[bytes]:
    ends = np.cumsum(patcher.lengths(text_symbols(data)))
    whole = data + b"$"
    return [whole[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def test_static_patches_are_of_one_length_but_the_last() -> None:
    assert patches(StaticPatcher(4), b"hello you") == [b"hell", b"o yo", b"u$"]
    assert patches(StaticPatcher(4), b"abc") == [b"abc$"]


def test_space_patches_end_with_the_first_space_like_byte_after_a_word() -> None:
    assert patches(SpacePatcher(16), b"one two,  three") == [b"one ", b"two,", b"  three$"]
    assert patches(SpacePatcher(4), b"abcdefghij k") == [b"abcd", b"efgh", b"ij ", b"k$"]
    assert patches(SpacePatcher(16), b"ok.") == [b"ok.", b"$"]
    assert patches(SpacePatcher(16), b"  a b") == [b"  a ", b"b$"]


@pytest.mark.parametrize("patcher", [StaticPatcher(3), SpacePatcher(4), SpacePatcher(16)])
def test_boundaries_are_the_same_on_every_prefix_and_incrementally(patcher: Patcher) -> None:
    noise = generator(0, "documents").integers(0, 256, size=300, dtype=np.uint8).tobytes()
    for data in (*DOCUMENTS, noise):
        symbols = text_symbols(data)
        ends = set(np.cumsum(patcher.lengths(symbols)).tolist())
        boundary = patcher.boundary()
        assert {i + 1 for i, symbol in enumerate(symbols) if boundary.push(int(symbol))} == ends
        for length in range(1, len(symbols)):
            prefix = np.cumsum(patcher.lengths(symbols[:length]))
            assert set(prefix.tolist()) == {end for end in ends if end < length} | {length}


@pytest.mark.parametrize("patcher", [StaticPatcher(5), SpacePatcher(7)])
def test_lengths_are_positive_int32_and_sum_to_the_symbols(patcher: Patcher) -> None:
    for data in DOCUMENTS:
        lengths = patcher.lengths(text_symbols(data))
        assert lengths.dtype == np.int32
        assert lengths.min() > 0
        assert lengths.sum() == len(data) + 1


def test_no_patch_is_longer_than_the_config_says() -> None:
    for kind in ("static", "space"):
        patcher = build_patcher(PatcherConfig(kind=kind, patch_bytes=32, max_patch_bytes=8))
        assert patcher.lengths(text_symbols(b"x" * 100)).max() == 8


def test_symbols_are_bytes_then_end() -> None:
    assert text_symbols(b"\x00\xff").tolist() == [0, 255, END]
    assert text_symbols(b"a", ended=False).tolist() == [97]
