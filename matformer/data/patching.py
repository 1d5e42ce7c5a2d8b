"""Where text patches begin: rules over bytes and `<end>` that look only at what is already there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from matformer.config.schema import PatcherConfig
from matformer.shapes import END


class Boundary(ABC):
    """A patcher one symbol at a time, for generation."""

    @abstractmethod
    def push(self, symbol: int) -> bool:
        """Take the next symbol; whether a patch ends with it (then the next symbol begins a new one)."""


class Patcher(ABC):
    """Cuts the symbols of a span into patches.

    A boundary depends on the symbols before it alone: the Coda must know, before it predicts a symbol, to which
    patch that symbol belongs.
    """

    @abstractmethod
    def lengths(self, symbols: np.ndarray) -> np.ndarray:
        """Patch lengths (int32, all positive) that sum to the number of symbols (bytes and, last, `<end>`)."""

    @abstractmethod
    def boundary(self) -> Boundary:
        """The same rule from the start of a span, incrementally."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What makes two patchers equal: compared with a data set's manifest before its stored lengths are used."""


class StaticPatcher(Patcher):
    """Patches of a fixed number of symbols; the last may be shorter."""

    def __init__(self, patch_bytes: int) -> None:
        self.patch_bytes = patch_bytes

    def lengths(self, symbols: np.ndarray) -> np.ndarray:
        """See Patcher."""
        whole, rest = divmod(len(symbols), self.patch_bytes)
        lengths = np.full(whole + (rest > 0), self.patch_bytes, np.int32)
        if rest:
            lengths[-1] = rest
        return lengths

    def boundary(self) -> Boundary:
        """See Patcher."""
        return _StaticBoundary(self.patch_bytes)

    def identity(self) -> dict[str, Any]:
        """See Patcher."""
        return {"kind": "static", "patch_bytes": self.patch_bytes}


class SpacePatcher(Patcher):
    """A patch ends with the first space-like byte after a byte that is not; further ones open the next patch.

    Space-like is every symbol but ASCII letters, digits and UTF-8 continuation bytes (a leading byte is space-like,
    so scripts of many-byte characters are cut about once a character). No patch is longer than `max_patch_bytes`.
    Source: BLT's space patching (section 2.2 of the paper); ours adds the longest length.
    """

    def __init__(self, max_patch_bytes: int) -> None:
        self.max_patch_bytes = max_patch_bytes

    def lengths(self, symbols: np.ndarray) -> np.ndarray:
        """See Patcher."""
        if len(symbols) == 0:
            return np.zeros(0, np.int32)
        spaces = _is_space_like(symbols)
        ends = spaces.copy()
        ends[0] = False  # nothing stands before it that a patch could end
        ends[1:] &= ~spaces[:-1]
        ends[-1] = True
        runs = np.diff(np.flatnonzero(ends), prepend=-1)
        chunks = -(-runs // self.max_patch_bytes)
        lengths = np.full(int(chunks.sum()), self.max_patch_bytes, np.int32)
        lengths[np.cumsum(chunks) - 1] = runs - (chunks - 1) * self.max_patch_bytes
        return lengths

    def boundary(self) -> Boundary:
        """See Patcher."""
        return _SpaceBoundary(self.max_patch_bytes)

    def identity(self) -> dict[str, Any]:
        """See Patcher."""
        return {"kind": "space", "max_patch_bytes": self.max_patch_bytes}


class _StaticBoundary(Boundary):
    def __init__(self, patch_bytes: int) -> None:
        self._patch_bytes = patch_bytes
        self._length = 0

    def push(self, symbol: int) -> bool:
        self._length = (self._length + 1) % self._patch_bytes
        return self._length == 0 or symbol == END


class _SpaceBoundary(Boundary):
    def __init__(self, max_patch_bytes: int) -> None:
        self._max_patch_bytes = max_patch_bytes
        self._length = 0
        self._after_space = True

    def push(self, symbol: int) -> bool:
        space = bool(_SPACE_LIKE[symbol])
        self._length += 1
        ends = (space and not self._after_space) or self._length == self._max_patch_bytes or symbol == END
        self._after_space = space
        if ends:
            self._length = 0
        return ends


def build_patcher(config: PatcherConfig) -> Patcher:
    """The patcher that a config names."""
    if config.kind == "static":
        return StaticPatcher(min(config.patch_bytes, config.max_patch_bytes))
    return SpacePatcher(config.max_patch_bytes)


def text_symbols(data: bytes | memoryview, *, ended: bool = True) -> np.ndarray:
    """A span's bytes as int64 symbols, with `<end>` after them if the span is ended."""
    symbols = np.empty(len(data) + ended, np.int64)
    symbols[: len(data)] = np.frombuffer(data, np.uint8)
    symbols[len(data) :] = END
    return symbols


def _space_like_table() -> np.ndarray:
    table = np.ones(END + 1, bool)
    for first, last in ((ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("a"), ord("z")), (0x80, 0xBF)):
        table[first : last + 1] = False
    table.setflags(write=False)
    return table


_SPACE_LIKE = _space_like_table()


def _is_space_like(symbols: np.ndarray) -> np.ndarray:
    return _SPACE_LIKE[symbols]
