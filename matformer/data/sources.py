"""Data sets as endless, random-access streams of documents: which one stands at a place is arithmetic, not state."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from matformer.config.schema import DataConfig, MediaConfig, ModelConfig, SourceConfig
from matformer.data.coders import check_accepted, coders_of
from matformer.data.latents import Normalisation, read_latent
from matformer.data.patching import Patcher, build_patcher, text_symbols
from matformer.data.shards import ShardReader
from matformer.errors import DataError
from matformer.layers.patchify import patchify
from matformer.layers.quad_tree import budgeted_levels
from matformer.parallel.seeds import Permutation, generator

Role = Literal["generate", "given"]
_BLOCKS_IN_MEMORY = 4096


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Bytes and how they are cut: patch lengths sum to the bytes and `<end>`.

    A span that is not ended (a prompt to be continued) has no `<end>`; it may only be the last of its document.
    tokens: the patches' numbers, where the patcher has a vocabulary.
    given: so many patches at its head stand clean alone, under diffusion objectives; the others are generated.
    """

    data: bytes
    patch_lengths: np.ndarray
    ended: bool = True
    tokens: np.ndarray | None = None
    given: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class MediaSpan:
    """One normalised latent [C, *grid] (float32), its shape bucket's index, and whether it is generated or given.

    tree: under a budget, the level of each patch's leaf in the clean copy (`layers/quad_tree.py`); None: no budget.
    noised_tree: the same of the noised copy; None: it has every patch.
    """

    modality: str
    latent: np.ndarray
    bucket: int
    role: Role
    tree: np.ndarray | None = None
    noised_tree: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """Spans in order; no two text spans are adjacent. `key` is "source/key"."""

    key: str
    spans: tuple[TextSpan | MediaSpan, ...]


def text_span(data: bytes, patcher: Patcher, *, ended: bool = True) -> TextSpan:
    """A text span cut by `patcher`."""
    return cut_span(data, patcher.lengths(text_symbols(data, ended=ended)), patcher, ended=ended)


def cut_span(data: bytes, lengths: np.ndarray, patcher: Patcher, *, ended: bool = True) -> TextSpan:
    """A text span that `patcher` has cut before."""
    return TextSpan(data, lengths, ended, patcher.tokens(data, lengths))


def media_span(
    latent: np.ndarray, modality: str, *, media: MediaConfig, role: Role, where: str | None = None
) -> MediaSpan:
    """A media span of a normalised latent [C, *grid], with the tree that the modality's budget gives it.

    `where` says in errors what it was read from.

    Raises DataError if its channels or grid are not the model's, or it holds what is not finite.
    """
    channels, *grid = latent.shape
    place = f" in {where}" if where else ""
    if channels != media.channels or tuple(grid) not in media.buckets:
        raise DataError(
            f"a latent of {modality} must have {media.channels} channels and a grid among {list(media.buckets)}, "
            f"got shape {latent.shape}{place}; set model.media.{modality}.buckets or prepare the data again"
        )
    if not np.isfinite(latent).all():
        raise DataError(f"a latent of {modality} must be finite, got nan or infinity{place}; prepare the data again")
    latent, bucket = np.ascontiguousarray(latent, np.float32), media.buckets.index(tuple(grid))
    tree = tree_of(latent, media=media)
    return MediaSpan(modality, latent, bucket, role, tree, tree if media.noises_trees else None)


def tree_of(latent: np.ndarray, *, media: MediaConfig) -> np.ndarray | None:
    """The tree that the budget gives a normalised latent [C, *grid]; None without a budget."""
    if media.budget is None:
        return None
    patches = patchify(torch.from_numpy(latent), rank=media.rank, patch=media.patch).numpy()
    grid = [size // media.patch for size in latent.shape[1:]]
    return budgeted_levels(patches, grid=grid, share=media.budget.share, levels=media.budget.levels)


def merge_spans(spans: Sequence[bytes | MediaSpan], patcher: Patcher) -> tuple[TextSpan | MediaSpan, ...]:
    """Maximal spans: neighbouring texts become one, empty texts vanish."""
    merged: list[bytes | MediaSpan] = []
    for span in spans:
        if isinstance(span, bytes) and merged and isinstance(last := merged[-1], bytes):
            merged[-1] = last + span
        elif span != b"":
            merged.append(span)
    return tuple(text_span(span, patcher) if isinstance(span, bytes) else span for span in merged)


class Source(ABC):
    """One split of a data set."""

    def __init__(self, name: str, config: SourceConfig, *, data: DataConfig, model: ModelConfig, split: str) -> None:
        self.name = name
        self.config = config
        self.model = model
        self.patcher = build_patcher(data.patcher, vocabulary=model.text.vocabulary)
        self.reader = ShardReader(Path(data.root) / config.path / split)
        form = self.reader.manifest["form"]
        if form != config.form:
            raise DataError(
                f"data set {self.reader.folder} must have form {config.form}, got {form}; set data.sources.{name}.form"
            )

    @abstractmethod
    def __len__(self) -> int:
        """Number of documents."""

    @abstractmethod
    def document(self, index: int, *, draws: np.random.Generator, direction: Role | None = None) -> Document:
        """Document `index` in its written order; `draws` decides what its template leaves open, `direction` overrides.

        Raises DataError if a member is damaged or does not fit the model.
        """

    @abstractmethod
    def describe(self, index: int) -> dict[str, Any]:
        """What the data set says of document `index` (language, concept, ...)."""

    def pick(self, index: int, *, direction: Role | None = None) -> Document:
        """Document `index`, what its template leaves open drawn from its number alone: for evaluation."""
        return self.document(index, draws=generator(0, "template", self.name, index), direction=direction)

    def _json(self, i: int) -> Any:
        return json.loads(bytes(self.reader.view(i, "json")))


class TextSource(Source):
    """Blocks of concatenated documents. A document's key is "source/block-number"."""

    def __init__(self, name: str, config: SourceConfig, *, data: DataConfig, model: ModelConfig, split: str) -> None:
        super().__init__(name, config, data=data, model=model, split=split)
        counts = [self.reader.array_length(i, "docs.npy") - 1 for i in range(len(self.reader))]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._stored = self.reader.manifest.get("patcher") == self.patcher.identity()
        self._starts: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first[-1])

    def document(self, index: int, *, draws: np.random.Generator, direction: Role | None = None) -> Document:
        """See Source."""
        block, number = self._find(index)
        docs = self.reader.array(block, "docs.npy")
        first, last = int(docs[number]), int(docs[number + 1])
        data = bytes(self.reader.view(block, "bytes")[first:last])
        key = f"{self.name}/{self.reader.key(block)}-{number}"
        if not data:
            raise DataError(f"a document must hold text, got none in {key}; prepare the data again")
        if not self._stored:
            return Document(key, (text_span(data, self.patcher),))
        start, end = self._patch_starts(block)[number : number + 2]
        lengths = self.reader.array(block, "patches.npy")[start:end]
        if lengths.sum() != len(data) + 1:
            raise DataError(
                f"patch lengths of {key} must sum to {len(data) + 1}, got {lengths.sum()}; prepare it again"
            )
        return Document(key, (cut_span(data, lengths, self.patcher),))

    def describe(self, index: int) -> dict[str, Any]:
        """See Source."""
        block, number = self._find(index)
        return self._json(block)[number]

    def _find(self, index: int) -> tuple[int, int]:
        block = int(np.searchsorted(self._first, index, side="right")) - 1
        return block, index - int(self._first[block])

    def _patch_starts(self, block: int) -> np.ndarray:
        """Which patch of the block each document begins with, and the number of patches."""
        if block not in self._starts:
            ends = np.cumsum(self.reader.array(block, "patches.npy"), dtype=np.int64)
            docs = self.reader.array(block, "docs.npy")
            # a document of n bytes has n + 1 symbols, hence its number beside its bytes
            symbols = docs + np.arange(len(docs))
            self._starts[block] = np.searchsorted(ends, symbols, side="right")
            if len(self._starts) > _BLOCKS_IN_MEMORY:
                self._starts.popitem(last=False)
        return self._starts[block]


class MediaSource(Source):
    """What the forms with latents share: one key a document."""

    def __init__(self, name: str, config: SourceConfig, *, data: DataConfig, model: ModelConfig, split: str) -> None:
        super().__init__(name, config, data=data, model=model, split=split)
        for coder in coders_of(self.reader.manifest).values():
            check_accepted(coder, where=self.reader.folder)
        self.data = data
        self._normalisations: dict[str, Normalisation] = {}

    def __len__(self) -> int:
        return len(self.reader)

    def describe(self, index: int) -> dict[str, Any]:
        """See Source."""
        return self._json(index)

    def _key(self, index: int) -> str:
        return f"{self.name}/{self.reader.key(index)}"

    def _span(
        self, index: int, member: str, *, modality: str, role: Role, draws: np.random.Generator
    ) -> MediaSpan:  # fmt: skip
        if modality not in self.model.media:
            raise DataError(
                f"modality of {self._key(index)} must be one of {list(self.model.media)}, got {modality!r}; "
                f"set model.media or data.sources.{self.name}"
            )
        media = self.model.media[modality]
        if modality not in self._normalisations:
            self._normalisations[modality] = Normalisation.of(self.data, modality, media=media)
        known = self._normalisations[modality]
        latent = read_latent(self.reader, (index, member), normalisation=known, media=media, draws=draws)
        return media_span(latent, modality, media=media, role=role, where=self.reader.where(index, member))


class PairSource(MediaSource):
    """A latent and its captions: caption -> media (generated), or media (given) -> caption; or one of the two alone."""

    def document(self, index: int, *, draws: np.random.Generator, direction: Role | None = None) -> Document:
        """See Source."""
        facts = self._json(index)
        forward, main, other = draws.random(), draws.random(), draws.random()
        role: Role = direction or ("generate" if forward < self.config.generate_probability else "given")
        spans: list[bytes | MediaSpan] = []
        if self.config.shows != "medium":
            spans.append(self._caption(facts["texts"], main=main, other=other).encode())
            if not spans[0]:
                raise DataError(f"a document must hold text, got none in {self._key(index)}; prepare the data again")
        if self.config.shows != "caption":
            modality = self.config.modality or facts["modality"]
            spans.append(self._medium(index, modality=modality, role=role, draws=draws))
        return Document(self._key(index), merge_spans(spans if role == "generate" else spans[::-1], self.patcher))

    def _medium(self, index: int, *, modality: str, role: Role, draws: np.random.Generator) -> MediaSpan:
        """A pair's medium; under `noised_tree: shuffled` its noised copy is in another's tree."""
        span = self._span(index, "moments.npy", modality=modality, role=role, draws=draws)
        budget = self.model.media[modality].budget
        if role == "generate" and budget is not None and budget.noised_tree == "shuffled":
            return replace(span, noised_tree=self._other(index, span, draws=draws).tree)
        return span

    def _other(self, index: int, span: MediaSpan, *, draws: np.random.Generator) -> MediaSpan:
        """Another document's medium of the same shape, from half the data set away (neighbours are variants of one)."""
        for step in range(len(self)):
            other = (index + len(self) // 2 + step) % len(self)
            found = self._span(other, "moments.npy", modality=span.modality, role=span.role, draws=draws)
            if other != index and found.bucket == span.bucket:
                return found
        raise DataError(
            f"a shape must stand in two documents where trees are shuffled, got one alone in {self._key(index)}; set "
            f"model.media.{span.modality}.budget.noised_tree"
        )

    def _caption(self, texts: list[dict[str, str]], *, main: float, other: float) -> str:
        mains = [text["text"] for text in texts if text["lang"] == self.config.main_language]
        others = [text["text"] for text in texts if text["lang"] != self.config.main_language]
        chosen = mains if mains and (main < self.config.main_language_probability or not others) else others
        return chosen[math.floor(other * len(chosen))] if chosen else ""


class DocumentSource(MediaSource):
    """Interleaved documents, as their `json` lists the spans."""

    def document(self, index: int, *, draws: np.random.Generator, direction: Role | None = None) -> Document:
        """See Source."""
        spans = [self._part(index, part, direction=direction, draws=draws) for part in self._json(index)["spans"]]
        merged = merge_spans(spans, self.patcher)
        if not any(isinstance(span, TextSpan) for span in merged):
            raise DataError(f"a document must hold text, got none in {self._key(index)}; prepare the data again")
        return Document(self._key(index), merged)

    def _part(
        self, index: int, part: dict[str, Any], *, direction: Role | None, draws: np.random.Generator
    ) -> bytes | MediaSpan:
        if "text" in part:
            return part["text"].encode()
        role = direction or part["role"]
        return self._span(index, part["member"], modality=part["modality"], role=role, draws=draws)


_FORMS: dict[str, type[Source]] = {"text": TextSource, "pairs": PairSource, "documents": DocumentSource}


def open_source(name: str, *, data: DataConfig, model: ModelConfig, split: str) -> Source:
    """The source `name` of a config. Raises DataError if its folder is missing, empty or of another form."""
    config = data.sources[name]
    source = _FORMS[config.form](name, config, data=data, model=model, split=split)
    if len(source) == 0:
        raise DataError(f"data set {source.reader.folder} must hold documents, got none; prepare the data again")
    return source


class Stream:
    """The documents of one source for one lane, endless: place k of lane l is number k * L + l over all epochs."""

    def __init__(self, source: Source, *, seed: int, lane: int, lanes: int) -> None:
        self.source = source
        self.seed = seed
        self.lane = lane
        self.lanes = lanes
        self._epoch, self._order = 0, Permutation(len(source), seed, source.name, 0)

    def document(self, place: int) -> Document:
        """Document at `place`. Raises DataError as Source.document."""
        epoch, number = divmod(place * self.lanes + self.lane, len(self.source))
        name = self.source.name
        if epoch != self._epoch:
            self._epoch, self._order = epoch, Permutation(len(self.source), self.seed, name, epoch)
        index = self._order[number]
        return self.source.document(index, draws=generator(self.seed, "template", name, epoch, index))
