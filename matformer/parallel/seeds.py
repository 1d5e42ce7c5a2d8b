"""Random numbers by counter: a draw is a pure function of a seed and keys; no rank and no restart changes it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from jaxtyping import Float

from matformer.config.schema import TimeSampler

MODE_SCALE = 1.29
_WORD = (1 << 64) - 1
_ROUNDS = 6


def digest(seed: int, *keys: int | str) -> bytes:
    """32 bytes that differ wherever a key does (an int and its decimal string count as different keys)."""
    return hashlib.blake2b(json.dumps((seed, *keys)).encode(), digest_size=32).digest()


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """A Philox stream of its own for (seed, keys): no other keys share it, whatever was drawn before."""
    key = np.frombuffer(digest(seed, *keys)[:16], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class Permutation:
    """A keyed permutation of 0 .. size - 1, one index at a time: nothing is stored, whatever the size.

    A Feistel network over the next even power of two; what falls outside walks on until it falls inside.
    Source: Black and Rogaway, Ciphers with arbitrary finite domains (cycle walking); the round is splitmix64's.
    """

    def __init__(self, size: int, seed: int, *keys: int | str) -> None:
        self.size = size
        self._half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        stream = hashlib.shake_256(digest(seed, "permutation", *keys)).digest(8 * _ROUNDS)
        self._keys = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        """Where `index` goes. Raises IndexError outside 0 .. size - 1."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        index = self._once(index)
        while index >= self.size:
            index = self._once(index)
        return index

    def _once(self, index: int) -> int:
        left, right = index >> self._half, index & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return left << self._half | right


def _mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _WORD
    return x ^ x >> 31


def draw_time(generator: np.random.Generator, *, sampler: TimeSampler = "logit_normal", shift: float = 1.0) -> float:
    """Noise level t in (0, 1), 1 is noise: u by the sampler, t = s u / (1 + (s - 1) u)."""
    drawn = generator.standard_normal() if sampler == "logit_normal" else generator.random()
    return float(_time_of(drawn, sampler=sampler, shift=shift))


def draw_times(
    generator: np.random.Generator, shape: tuple[int, ...], *, sampler: TimeSampler, shift: float
) -> Float[np.ndarray, ...]:
    """Noise levels of this shape, each drawn by itself as `draw_time` does."""
    drawn = generator.standard_normal(shape) if sampler == "logit_normal" else generator.random(shape)
    return _time_of(drawn, sampler=sampler, shift=shift)


def _time_of(drawn: Any, *, sampler: TimeSampler, shift: float) -> Any:
    """t of a standard normal number (logit_normal) or of a uniform one."""
    u = 1.0 / (1.0 + np.exp(-drawn)) if sampler == "logit_normal" else drawn
    u = mode_of(u) if sampler == "mode" else u
    return shift * u / (1.0 + (shift - 1.0) * u)


def mode_of(u: Any) -> Any:
    """A uniform u as a time that lies more often near the middle. Source: SD3 (Esser 2024), section 3.1, scale 1.29."""
    return 1.0 - u - MODE_SCALE * (np.cos(np.pi * u / 2) ** 2 - 1.0 + u)
