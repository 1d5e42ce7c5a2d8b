"""Parts of fast entropy scoring: entropies straight from hidden vectors, and a memo of contexts that were scored."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 1024
"""Hidden vectors whose logits stand in the cache at once: two buffers of 1 MB, used again and again."""
LARGEST_LOGIT = 60.0
"""Exponentials of logits up to here need no shift by the row's largest: sums of them stay far from float32's end."""
LONGEST_KEY = 7
"""Symbols that an int64 tells apart exactly, nine bits each."""
MOST_SLOTS = 1 << 20
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: the upper bits of a product are well mixed


def entropy_of(logits_UV: Float[Tensor, "U 257"]) -> Float[Tensor, " U"]:
    """H of each row's softmax in nats; plain, for a few rows."""
    log_p = logits_UV.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def entropies_of_normed(normed_UD: Float[Tensor, "U D"], head_VD: Float[Tensor, "V D"]) -> Float[Tensor, " U"]:
    """`entropy_of` the logits `normed @ head.T`, chunk by chunk: H = log S - T / S, S = sum exp z, T = sum z exp z.

    normed: of length sqrt(D) at most, as an RMS norm without its weight gives it; that bounds the logits.
    """
    # A number added to all logits changes no softmax; without their mean they are small, and so is what is rounded.
    head_DV = (head_VD - head_VD.mean(0)).T.contiguous()
    bounded = float(head_DV.norm(dim=0).max()) * head_DV.shape[0] ** 0.5 < LARGEST_LOGIT
    nats_U = normed_UD.new_empty(len(normed_UD))
    buffers = normed_UD.new_empty(2, min(CHUNK, len(normed_UD)), head_DV.shape[1])
    for first in range(0, len(normed_UD), CHUNK):
        chunk = normed_UD[first : first + CHUNK]
        logits, powers = buffers[:, : len(chunk)]
        torch.mm(chunk, head_DV, out=logits)
        if not bounded:
            logits -= logits.amax(-1, keepdim=True)
        torch.exp(logits, out=powers)
        total = powers.sum(-1)
        mean = logits.mul_(powers).sum(-1).div_(total)
        torch.sub(total.log_(), mean, out=nats_U[first : first + CHUNK])
    return nats_U


def context_keys(
    symbols: Int[np.ndarray, " U"], places: Int[np.ndarray, " U"], *, length: int
) -> Int[np.ndarray, " U"]:
    """One number for the `length` symbols that end at each place, LONGEST_KEY at most; zeros before a piece's first.

    As `ngram_hashes` sees them: where a piece was cut out of its document, the row's end stands before the row's begin.
    """
    keys = symbols.copy()
    for back in range(1, length):
        keys |= np.where(places >= back, np.roll(symbols, back), 0) << (9 * back)
    return keys


class ContextMemo:
    """What was scored of each context, in a table of fixed size where a newer context takes an older one's slot.

    Exact: a slot holds the whole key, not a hash of it. It forgets, and then the context is scored again.
    """

    def __init__(self, num_symbols: int, dtype: torch.dtype) -> None:
        bits = (min(4 * num_symbols, MOST_SLOTS) - 1).bit_length()
        self._shift = np.uint64(64 - bits)
        self._keys = np.full(1 << bits, -1, np.int64)
        self._nats = torch.empty(1 << bits, dtype=dtype).numpy()
        self._owners = np.zeros(1 << bits, np.int32)

    def __call__(
        self, keys: Int[np.ndarray, " U"], score: Callable[[Int[np.ndarray, " R"]], Float[np.ndarray, " R"]]
    ) -> Float[np.ndarray, " U"]:
        """Nats of every key; `score` gives those of the places whose contexts are not known, each once."""
        slots = ((keys.view(np.uint64) * _SPREAD) >> self._shift).view(np.int64)
        nats = self._nats[slots]
        missing = np.flatnonzero(self._keys[slots] != keys)
        keys, slots = keys[missing], slots[missing]
        numbers = np.arange(len(missing), dtype=np.int32)
        self._owners[slots] = numbers  # of those that share a slot one stays, and stands for all of its key
        owner = self._owners[slots]
        owns = owner == numbers
        scored = owns | (keys[owner] != keys)
        found = np.empty(len(missing), nats.dtype)
        found[scored] = score(missing[scored])
        found[~scored] = found[owner[~scored]]
        self._keys[slots[owns]], self._nats[slots[owns]] = keys[owns], found[owns]
        nats[missing] = found
        return nats
