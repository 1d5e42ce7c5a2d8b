"""What a microbatch holds, as plain numbers: all that the FLOPs and the activations of a part depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Pairs(NamedTuple):
    """(query, key) pairs of an attention, the same for each of its heads.

    seen: pairs that the mask shows, the model's own work. computed: pairs that the code multiplies, hidden ones too.
    """

    seen: int = 0
    computed: int = 0


@dataclass(frozen=True, slots=True)
class TextCounts:
    """Symbols and patches that a byte Preludio reads, or a Coda decodes. pairs: of one layer's local attention.

    symbols: rows of the local layers. pooled: symbols that patches pool (fewer than rows where `<begin>` is read).
    """

    symbols: int = 0
    pooled: int = 0
    patches: int = 0
    pairs: Pairs = Pairs()


@dataclass(frozen=True, slots=True)
class MediaCounts:
    """Patches of one latent modality.

    noised, clean: rows of each kind. spans: J. times: T, the different times. told: rows that hold nothing but t.
    leaves: of a budget's trees, those of level 1, 2, ...; blocks: of `trees` trees, asked whether they are split.
    pairs: of one layer of a Coda that attends.
    """

    noised: int = 0
    clean: int = 0
    spans: int = 0
    times: int = 0
    told: int = 0
    leaves: tuple[int, ...] = ()
    trees: int = 0
    blocks: int = 0
    pairs: Pairs = Pairs()


@dataclass(frozen=True, slots=True)
class Counts:
    """One microbatch. positions: B * S, padding too. read: what the Preludio reads; text: what the Coda decodes."""

    positions: int = 0
    atto: Pairs = Pairs()
    read: TextCounts = TextCounts()
    text: TextCounts = TextCounts()
    media: Mapping[str, MediaCounts] = field(default_factory=dict, hash=False)
    questions: int = 0


Run = tuple[Literal["causal", "noised", "clean", "blind"], int]


def document_pairs(runs: Iterable[Run], *, noised_context: bool = False) -> int:
    """Pairs that the Atto's mask shows in one document, from its runs of positions in order.

    causal: start, text, headers, closings, patches under `next_latent`; noised, clean: a copy of a span, seen both
    ways; blind: a header and its noised copy without the document, as one run. noised_context: what follows sees them.
    Padding shows one pair a position. Source: SEMANTICS, Mask; atto/masks.py says the same position by position.
    """
    context = pairs = 0
    for kind, count in runs:
        if kind == "blind":  # start and header for the header, and the copy beside them for each of its own
            copy = count - 1
            pairs += 2 + copy * (2 + copy)
            context += copy if noised_context else 0
            continue
        pairs += count * context + (count * (count + 1) // 2 if kind == "causal" else count * count)
        context += 0 if kind == "noised" and not noised_context else count
    return pairs


def window_pairs(lengths: Iterable[int], *, window: int, both_ways: bool = False) -> int:
    """Pairs of a local attention over pieces of these lengths: each symbol and the `window` - 1 before (and behind)."""
    return sum(_window_pairs(length, window=window, both_ways=both_ways) for length in lengths)


def _window_pairs(length: int, *, window: int, both_ways: bool) -> int:
    reach = min(length, window)
    behind = reach * (reach + 1) // 2 + (length - reach) * reach
    return 2 * behind - length if both_ways else behind
