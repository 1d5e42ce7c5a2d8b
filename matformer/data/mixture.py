"""Weighted choice among sources, in latents: each lane takes from the source that is furthest behind its share."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from matformer.data.sources import Document, Stream
from matformer.errors import DataError
from matformer.parallel.seeds import generator

log = logging.getLogger(__name__)


class BadSamples:
    """Counts damaged documents, each once, and stops the run beyond a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen: set[str] = set()

    def add(self, error: DataError) -> None:
        """Note one. Raises DataError beyond the limit."""
        if str(error) in self.seen:
            return
        self.seen.add(str(error))
        log.warning("skipped a damaged sample (%d so far): %s", len(self.seen), error)
        if len(self.seen) > self.limit:
            raise DataError(
                f"at most {self.limit} samples may be damaged, got {len(self.seen)}, the last: {error}; "
                "prepare the data again or set data.max_bad_samples"
            ) from error


class Mixture:
    """The documents of one lane. State: for each source, how many documents and latents it gave, and its share."""

    def __init__(
        self, streams: Mapping[str, Stream], weights: Mapping[str, float], *, seed: int, lane: int, bad: BadSamples
    ) -> None:
        total = sum(weights.values())
        self.streams = dict(streams)
        self.shares = {name: weight / total for name, weight in weights.items()}
        # lanes begin at different sources: otherwise the first batches would hold one source alone
        draws = generator(seed, "mixture", lane)
        self.heads = {name: float(draws.random()) * share for name, share in self.shares.items()}
        self.bad = bad
        self.num_documents = sum(len(stream.source) for stream in self.streams.values())
        self.taken = dict.fromkeys(self.shares, 0)
        self.latents = dict.fromkeys(self.shares, 0)

    def next(self, measure: Callable[[Document], int]) -> tuple[str, int, Document]:
        """(source, place, document) of the next sound document; `measure` gives its latents. Raises DataError."""
        skipped = 0
        while True:
            name = self._furthest_behind()
            place = self.taken[name]
            self.taken[name] += 1
            try:
                document = self.streams[name].document(place)
            except DataError as error:
                skipped += 1
                self.bad.add(error)
                if skipped > self.num_documents:  # nothing of a small data set is sound
                    raise
                continue
            self.latents[name] += measure(document)
            return name, place, document

    def state(self) -> dict[str, list[float]]:
        """{source: [documents, latents, share]}, fit for json."""
        return {name: [self.taken[name], self.latents[name], share] for name, share in self.shares.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, each source from its document.

        A source that it lacks begins level with its share, not as one that is far behind; so do all where the known
        ones' shares changed, because what was given under others says nothing about these.
        """
        known = [name for name in self.shares if name in state]
        share = sum(self.shares[name] for name in known)
        total = sum(state[name][1] for name in known) / share if known else 0.0
        before = [state[name][2] for name in known if len(state[name]) > 2]  # older states lack them
        changed = any(
            not math.isclose(old * share, self.shares[name] * sum(before))
            for name, old in zip(known, before, strict=False)
        )
        for name in self.shares:
            level = round(self.shares[name] * total)
            self.taken[name] = state[name][0] if name in state else 0
            self.latents[name] = level if changed or name not in state else state[name][1]

    def _furthest_behind(self) -> str:
        total = sum(self.latents.values())
        # the head is worth less than one document: it only breaks the tie at the start
        return max(self.shares, key=lambda name: self.shares[name] * total - self.latents[name] + self.heads[name])
