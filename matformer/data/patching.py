"""Where text patches begin: rules over bytes and `<end>` that look only at what is already there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from matformer.config.schema import PatcherConfig
from matformer.data.entropy import EntropyModel, ExactEntropy, entropies, input_symbols, load_entropy_model
from matformer.data.pieces import Pieces, load_pieces
from matformer.errors import ConfigError
from matformer.shapes import END


class Boundary(ABC):
    """A patcher one symbol at a time, for generation."""

    @abstractmethod
    def push(self, symbol: int, *, ends: bool = False) -> bool:
        """Take the next symbol; whether a patch ends with it (then the next symbol begins a new one).

        ends: what the Coda says of it, which only a patcher that is `learned` asks for.
        """


class Patcher(ABC):
    """Cuts the symbols of a span into patches.

    A boundary depends on the symbols before it alone: the Coda must know, before it predicts a symbol, to which
    patch that symbol belongs. A `learned` patcher breaks that rule, and its Coda predicts the boundaries too.
    """

    learned = False

    @abstractmethod
    def lengths(self, symbols: np.ndarray) -> np.ndarray:
        """Patch lengths (int32, all positive) that sum to the number of symbols (bytes and, last, `<end>`)."""

    def tokens(self, data: bytes, lengths: np.ndarray) -> np.ndarray | None:
        """The number of each patch (int64) where a patch is a piece of a vocabulary; `lengths` may include `<end>`."""
        return None

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
        return _Bounded(self.patch_bytes)

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
        return chunked(np.diff(np.flatnonzero(ends), prepend=-1), longest=self.max_patch_bytes)

    def boundary(self) -> Boundary:
        """See Patcher."""
        return _SpaceBoundary(self.max_patch_bytes)

    def identity(self) -> dict[str, Any]:
        """See Patcher."""
        return {"kind": "space", "max_patch_bytes": self.max_patch_bytes}


class EntropyPatcher(Patcher):
    """A patch begins where the next symbol is hard to guess: H(symbol | bytes before it) > threshold.

    `monotonic`: where H rose by more than the threshold since the symbol before. The first symbol always begins a
    patch, `<end>` may; no patch is longer than `max_patch_bytes`. Sources: BLT, section 2.3, equations 2 and 3: their
    `i < 2 or H[i - 1] > threshold` over BOS and bytes is the same rule.
    """

    def __init__(self, model: EntropyModel, *, threshold: float, max_patch_bytes: int, monotonic: bool = False) -> None:
        self.model, self.exact = model, ExactEntropy(model)
        self.threshold, self.max_patch_bytes, self.monotonic = threshold, max_patch_bytes, monotonic

    def lengths(self, symbols: np.ndarray) -> np.ndarray:
        """See Patcher."""
        if len(symbols) == 0:
            return np.zeros(0, np.int32)
        data = symbols[symbols != END].astype(np.uint8).tobytes()
        return self.lengths_of(data, nats=entropies(self.model, [data])[0][: len(symbols)])

    def lengths_of(self, data: bytes, *, nats: np.ndarray) -> np.ndarray:
        """The same from entropies that are known, one a symbol (n, or n + 1 with `<end>`).

        Where single precision could not tell the sides of the threshold apart, the exact entropy decides.
        """
        excess = self._excess(nats.astype(np.float64))
        inputs = input_symbols(data)
        for i in np.flatnonzero(np.abs(excess) < _MARGIN).tolist():
            excess[i] = self.exact_excess(inputs[: i + 1])
        return self._cut(excess > 0)

    def rough_count(self, nats: np.ndarray, *, firsts: np.ndarray) -> int:
        """Patches of documents one after the other, the first symbol of each at `firsts`.

        Without a second look at what lies near the threshold: for picking one.
        """
        begins = self._excess(nats) > 0
        begins[firsts] = True
        runs = np.diff(np.flatnonzero(begins), append=len(begins))
        return int((-(-runs // self.max_patch_bytes)).sum())

    def largest_excess(self, nats: np.ndarray) -> float:
        """How far the most surprising symbol is above the threshold."""
        return float(self._excess(nats).max())

    def _cut(self, begins: np.ndarray) -> np.ndarray:
        begins[0] = True
        return chunked(np.diff(np.flatnonzero(begins), append=len(begins)), longest=self.max_patch_bytes)

    def _excess(self, nats: np.ndarray) -> np.ndarray:
        """How far each symbol is above the threshold."""
        return nats - self.threshold - (np.concatenate([nats[:1], nats[:-1]]) if self.monotonic else 0.0)

    def exact_excess(self, inputs: np.ndarray) -> float:
        """Of the symbol after these inputs."""
        before = self.exact(inputs[:-1]) if self.monotonic and len(inputs) > 1 else 0.0
        return self.exact(inputs) - before - self.threshold

    def boundary(self) -> Boundary:
        """See Patcher."""
        return _EntropyBoundary(self)

    def identity(self) -> dict[str, Any]:
        """See Patcher."""
        return {
            "kind": "entropy_monotonic" if self.monotonic else "entropy",
            "threshold": self.threshold,
            "max_patch_bytes": self.max_patch_bytes,
            "model": self.model.fingerprint,
        }


class BpePatcher(Patcher):
    """A patch is a piece of a sentencepiece model; `<end>` is one of its own. Longer pieces are cut."""

    learned = True

    def __init__(self, pieces: Pieces, *, max_patch_bytes: int) -> None:
        self.pieces, self.max_patch_bytes = pieces, max_patch_bytes

    def lengths(self, symbols: np.ndarray) -> np.ndarray:
        """See Patcher."""
        data = symbols[symbols != END].astype(np.uint8).tobytes()
        of_pieces = self.pieces.lengths(data)
        last = np.ones(len(symbols) - len(data), np.int32)
        return np.concatenate([chunked(of_pieces, longest=self.max_patch_bytes) if data else of_pieces, last])

    def boundary(self) -> Boundary:
        """See Patcher."""
        return _Bounded(self.max_patch_bytes)

    def identity(self) -> dict[str, Any]:
        """See Patcher."""
        return {"kind": "bpe", "max_patch_bytes": self.max_patch_bytes, "pieces": self.pieces.fingerprint}


class TokenPatcher(BpePatcher):
    """A patch is a piece, and what stands for it is the piece's number. `<end>` has the number after the last piece."""

    def __init__(self, pieces: Pieces, *, max_patch_bytes: int) -> None:
        longest = max(map(len, pieces.number_of))
        if longest > max_patch_bytes:
            raise ConfigError(
                f"data.patcher.max_patch_bytes must be at least the longest piece for data.patcher.kind tokens, got "
                f"{max_patch_bytes} and a piece of {longest} bytes; change data.patcher.max_patch_bytes"
            )
        super().__init__(pieces, max_patch_bytes=max_patch_bytes)

    def tokens(self, data: bytes, lengths: np.ndarray) -> np.ndarray:
        """See Patcher."""
        numbers, ends = self.pieces.number_of, np.cumsum(lengths).tolist()
        found = [numbers[data[first:last]] for first, last in zip([0, *ends], ends, strict=False) if last <= len(data)]
        return np.array(found + [len(self.pieces)] * (len(lengths) - len(found)), np.int64)

    def identity(self) -> dict[str, Any]:
        """See Patcher."""
        return {**super().identity(), "kind": "tokens"}


_MARGIN = 1e-3
"""Nats within which a difference of entropies in float32 is not trusted: its error is about a hundredth of this."""


def chunked(runs: np.ndarray, *, longest: int) -> np.ndarray:
    """Runs of symbols, those beyond `longest` cut into pieces of it from their start; int32."""
    chunks = -(-runs // longest)
    lengths = np.full(int(chunks.sum()), longest, np.int32)
    lengths[np.cumsum(chunks) - 1] = runs - (chunks - 1) * longest
    return lengths


class _Bounded(Boundary):
    """A rule beside the two that hold for every patch: it is no longer than `longest`, and `<end>` ends it."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._length = 0

    def push(self, symbol: int, *, ends: bool = False) -> bool:
        if symbol == END:
            return True
        self._length += 1
        here = self._rule(symbol, ends=ends) or self._length == self._longest
        if here:
            self._length = 0
        return here

    def _rule(self, symbol: int, *, ends: bool) -> bool:
        """Whether the patch ends with this byte."""
        return ends


class _EntropyBoundary(_Bounded):
    def __init__(self, patcher: EntropyPatcher) -> None:
        super().__init__(patcher.max_patch_bytes)
        self._patcher = patcher
        self._inputs = input_symbols(b"")

    def _rule(self, symbol: int, *, ends: bool) -> bool:
        self._inputs = np.append(self._inputs, symbol)[-(self._patcher.model.settings.sight + 1) :]
        return self._length < self._longest and self._patcher.exact_excess(self._inputs) > 0


class _SpaceBoundary(_Bounded):
    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self._after_space = True

    def _rule(self, symbol: int, *, ends: bool) -> bool:
        space = bool(_SPACE_LIKE[symbol])
        here = space and not self._after_space
        self._after_space = space
        return here


def build_patcher(config: PatcherConfig, *, vocabulary: int | None = None) -> Patcher:
    """The patcher that a config names. Raises DataError if its model cannot be read, ConfigError if it does not fit.

    vocabulary: what the model takes the number of pieces to be, if they are its symbols.
    """
    if config.kind == "static":
        return StaticPatcher(min(config.patch_bytes, config.max_patch_bytes))
    if config.kind == "space":
        return SpacePatcher(config.max_patch_bytes)
    if config.kind in ("bpe", "tokens"):
        assert config.sentencepiece is not None, "the config's check asks for it"
        pieces = load_pieces(Path(config.sentencepiece))
        if vocabulary not in (None, len(pieces)):
            raise ConfigError(
                f"model.text.vocabulary must be the number of pieces of data.patcher.sentencepiece "
                f"{config.sentencepiece}, {len(pieces)}, got {vocabulary}; change model.text.vocabulary"
            )
        build = BpePatcher if config.kind == "bpe" else TokenPatcher
        return build(pieces, max_patch_bytes=config.max_patch_bytes)
    assert config.threshold is not None and config.entropy_model is not None, "the config's check asks for both"
    return EntropyPatcher(
        load_entropy_model(Path(config.entropy_model)),
        threshold=config.threshold,
        max_patch_bytes=config.max_patch_bytes,
        monotonic=config.kind == "entropy_monotonic",
    )


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
