"""Patchers whose patches hold a wanted number of symbols in the mean: a threshold, or a vocabulary, by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from matformer.data.patching import EntropyPatcher
from matformer.data.pieces import Pieces
from matformer.errors import DataError

SMALLEST, LARGEST = 260, 65_536
"""Pieces of a vocabulary that is looked for."""
TOLERANCE = 0.05


def pick_threshold(
    documents: Sequence[tuple[bytes, Float[np.ndarray, " n1"]]], *, patcher: EntropyPatcher, mean_patch: float
) -> float:
    """The threshold whose patches hold `mean_patch` symbols in the mean, by bisection; four decimals.

    Raises DataError if no threshold gives so long or so short patches.
    """
    nats = np.concatenate([own for _, own in documents])
    firsts = np.cumsum([0] + [len(own) for _, own in documents[:-1]])
    below, above = 0.0, 10.0
    for _ in range(24):
        patcher.threshold = (below + above) / 2
        found = len(nats) / patcher.rough_count(nats, firsts=firsts)
        below, above = (patcher.threshold, above) if found < mean_patch else (below, patcher.threshold)
    threshold = round((below + above) / 2, 4)
    patcher.threshold = threshold
    found = len(nats) / patcher.rough_count(nats, firsts=firsts)
    if threshold <= 0 or abs(found / mean_patch - 1) > TOLERANCE:
        raise DataError(
            f"a threshold must give patches of {mean_patch:g} symbols, got at best {found:.3f} with "
            f"{patcher.max_patch_bytes} at most; change --mean-patch or --max-patch-bytes"
        )
    return threshold


def mean_patch(pieces: Pieces, texts: Sequence[bytes]) -> float:
    """Symbols (bytes and `<end>`) a patch."""
    return sum(len(text) + 1 for text in texts) / sum(len(pieces.lengths(text)) + 1 for text in texts)


def matched(trained: Callable[[int], Pieces], sample: Sequence[bytes], *, mean: float) -> Pieces:
    """The model whose mean patch comes nearest, by bisection on a logarithmic scale.

    Raises DataError if none comes within five per cent.
    """
    below, above = math.log(SMALLEST), math.log(LARGEST)
    best: Pieces | None = None
    for _ in range(8):
        try:
            found = trained(round(math.exp((below + above) / 2)))
        except DataError:  # more pieces than the text has
            above = (below + above) / 2
            continue
        here = mean_patch(found, sample)
        if best is None or abs(here - mean) < abs(mean_patch(best, sample) - mean):
            best = found
        below, above = ((below + above) / 2, above) if here < mean else (below, (below + above) / 2)
    if best is None or abs(mean_patch(best, sample) / mean - 1) > TOLERANCE:
        got = "none" if best is None else f"at best {mean_patch(best, sample):.3f}"
        raise DataError(
            f"a vocabulary of {SMALLEST} to {LARGEST} pieces must give patches of {mean:g} symbols, got {got}; change "
            "--mean-patch, --max-patch-bytes or --sample-bytes"
        )
    return best
