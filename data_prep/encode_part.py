"""One part of a data set -> a small data set of its latents, whole or not at all; what several processes do at once."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data_prep.media_items import Item, Part
from data_prep.write import npy
from matformer.autoencoders import Autoencoder, load_autoencoder
from matformer.autoencoders.preparation import Preparation, as_media
from matformer.data.shards import ShardWriter
from matformer.errors import DataError

log = logging.getLogger("data_prep.encode_latents")

READ_AHEAD = 2
"""Batches of files that are read and prepared while the autoencoder works on another."""


@dataclass(frozen=True, slots=True)
class Job:
    """A part and the folder that its latents go into."""

    part: Part
    folder: Path


@dataclass(frozen=True, slots=True)
class Coder:
    """What a process needs beside the part. autoencoder: its folder. batch: samples that are encoded at once."""

    autoencoder: Path
    preparation: Preparation
    batch: int
    device: str = "cpu"


@dataclass(slots=True)
class Ready:
    """A sample that is read and prepared, and once it is encoded its latent."""

    number: int
    item: Item
    text: bytes
    facts: bytes
    bucket: int
    array: np.ndarray
    moments: np.ndarray | None = None


@dataclass(slots=True)
class Outcome:
    """Encoded samples by their place in the part, and what was left out."""

    coded: dict[int, Ready] = field(default_factory=dict)
    bad: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, item: Item, error: DataError) -> None:
        """Note a bad sample."""
        self.bad.append({"shard": item.shard, "key": item.key, "reason": str(error)})


class PartEncoder:
    """An autoencoder that is loaded once and encodes part after part."""

    def __init__(self, coder: Coder, *, autoencoder: Autoencoder | None = None) -> None:
        self.coder = coder
        self.autoencoder = (autoencoder or load_autoencoder(coder.autoencoder)).to(coder.device)

    def encode(self, job: Job) -> Job:
        """Write the part's folder. Raises DataError if it cannot be written."""
        outcome = Outcome()
        with ThreadPoolExecutor(1) as ahead:
            waiting: dict[int, list[Ready]] = {}
            for ready in self._prepared(job.part, outcome=outcome, ahead=ahead):
                group = waiting.setdefault(ready.bucket, [])
                group.append(ready)
                if len(group) == self.coder.batch:
                    self._encode(waiting.pop(ready.bucket), outcome=outcome)
            for group in waiting.values():
                self._encode(group, outcome=outcome)
        self._write(job.folder, outcome)
        return job

    def _prepared(self, part: Part, *, outcome: Outcome, ahead: ThreadPoolExecutor) -> Iterator[Ready]:
        """Samples in order; the next batches are read while the caller encodes (decoders work outside the lock)."""
        numbered = enumerate(part.items())
        batches = iter(lambda: list(itertools.islice(numbered, self.coder.batch)), [])
        pending = [ahead.submit(self._read, batch) for batch in itertools.islice(batches, READ_AHEAD)]
        while pending:
            done = pending.pop(0).result()
            pending += [ahead.submit(self._read, batch) for batch in itertools.islice(batches, 1)]
            for item, ready in done:
                if isinstance(ready, DataError):
                    outcome.refuse(item, ready)
                else:
                    yield ready

    def _read(self, batch: Sequence[tuple[int, Item]]) -> list[tuple[Item, Ready | DataError]]:
        found: list[tuple[Item, Ready | DataError]] = []
        for number, item in batch:
            try:
                if item.media is None:
                    raise DataError("a sample must have a medium in a whole shard, got none; copy the shard again")
                bucket, array = self.coder.preparation.read(item.media.read(), suffix=item.suffix)
                text, facts = self._described(item, bucket=bucket)
                found.append((item, Ready(number, item, text, facts, bucket, array)))
            except DataError as error:
                found.append((item, error))
        return found

    @torch.inference_mode()
    def _encode(self, group: Sequence[Ready], *, outcome: Outcome) -> None:
        media = as_media([ready.array for ready in group]).to(self.coder.device)
        try:
            moments = self.autoencoder.encode(media)
        except DataError as error:
            if len(group) == 1:
                outcome.refuse(group[0].item, error)
            else:  # the autoencoder does not say which of them it means
                for ready in group:
                    self._encode([ready], outcome=outcome)
            return
        both = [moments.mean] if moments.logvar is None else [moments.mean, moments.logvar]
        stored = torch.cat(both, 1).half().cpu().numpy()
        expected = (self.autoencoder.channels * len(both), *self.coder.preparation.buckets[group[0].bucket])
        for ready, array in zip(group, stored, strict=True):
            if array.shape != expected:
                outcome.refuse(ready.item, DataError(f"moments must have shape {expected}, got {array.shape}"))
            elif not np.isfinite(array).all():
                outcome.refuse(
                    ready.item, DataError("latents must be finite in float16, got nan or infinity; check its medium")
                )
            else:
                ready.moments, ready.array = array, array[:0]  # what was encoded is let go
                outcome.coded[ready.number] = ready

    def _write(self, folder: Path, outcome: Outcome) -> None:
        with ShardWriter(folder, form="pairs", extra={"bad": outcome.bad}) as writer:
            keys: set[str] = set()
            for number in sorted(outcome.coded):
                ready = outcome.coded[number]
                if ready.item.key in keys:
                    outcome.refuse(ready.item, DataError("a key must be unique, got it twice; rename the sample"))
                    continue
                keys.add(ready.item.key)
                assert ready.moments is not None
                writer.add(
                    ready.item.key,
                    {
                        "moments.npy": npy(ready.moments),
                        "txt": ready.text,
                        "json": ready.facts,
                    },
                )

    def _described(self, item: Item, *, bucket: int) -> tuple[bytes, bytes]:
        """Caption, and JSON as of the demo's pairs; a sample of which nothing is known is a concept of its own.

        Raises DataError where what stands beside the medium is missing, or no text.
        """
        texts, known, grid = item.texts(), item.known(), list(self.coder.preparation.buckets[bucket])
        try:
            given = {name: str(known.get(name, default)) for name, default in (
                ("concept", item.key), ("base", item.key), ("style", "unknown"), ("group", "unknown"),
                ("source", item.shard),
            )}  # fmt: skip
            cells = {"bucket": grid, "length": int(np.prod(grid))}
            facts = {"modality": self.coder.preparation.modality, "key": item.key, **given, **cells, "texts": texts}
            return texts[0]["text"].encode(), json.dumps(facts, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:  # JSON may hold half an emoji
            raise DataError(f"the .json of a sample must hold text, got: {error!r}; repair it") from error
