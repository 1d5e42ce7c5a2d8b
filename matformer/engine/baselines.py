"""What closed forms reach on the held-out data: byte counts and xz for text, the best linear denoiser for latents.

A model that learned something stands below these lines; they are fitted on the train split, and scored on the very
documents that evaluation scores (`data.loader.heldout_documents`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from matformer.config.schema import RunConfig
from matformer.data.holdings import latents_of, scored_sources
from matformer.data.latents import Normalisation, read_latent
from matformer.data.loader import heldout_documents
from matformer.data.shards import ShardReader
from matformer.data.sources import MediaSpan, TextSpan
from matformer.errors import DataError
from matformer.files import write_whole
from matformer.parallel.seeds import generator
from matformer.shapes import END

log = logging.getLogger(__name__)

VERSION = 2
TIMES = tuple((k - 0.5) / 8 for k in range(1, 9))
"""Noise levels of the held-out flow loss."""
MAX_TRAIN_LATENTS = 20_000
"""Latents of fixed shape that a full covariance is fitted on, evenly spaced over the train split."""
MAX_SCALARS = 4096
"""Of a latent with a full covariance: its directions cost the cube of it (a minute on two cores at this size)."""
Latents = dict[str, list[np.ndarray]]
"""Key of a document -> its latents of one modality."""

_SYMBOLS = END + 1
_BEGIN = END
"""As context, what stands before a document; as target, `<end>`: the two never stand at the same place."""
_CHUNK = 1 << 23


@dataclass(frozen=True)
class Score:
    """A mean over all held-out terms, its standard error over samples (documents or spans), and each sample's sum."""

    value: float
    stderr: float
    totals: np.ndarray = field(compare=False)


@dataclass(frozen=True)
class Baselines:
    """numbers: what `compute_baselines` names. totals: of those that score documents, the sum of each by its key."""

    numbers: dict[str, float]
    totals: dict[str, dict[str, float]]


class ByteCounts:
    """Byte models of order 0 and 2 by counting: 256 bytes and `<end>`.

    Order 0 is the Krichevsky-Trofimov estimate, (c + 1/2) / (n + 257/2). Orders 1 and 2 interpolate with the order
    below by Witten and Bell's weight: p(x | h) = (c(hx) + d(h) p(x | h')) / (c(h) + d(h)), d(h) the number of
    different symbols seen after h. What stands before a document's first byte is a symbol of its own.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_SYMBOLS**3, np.int32)

    def add(self, data: bytes | memoryview, docs: Int[np.ndarray, " E1"]) -> None:
        """Count the documents of one block; docs are their offsets in `data`, the last is its length."""
        symbols = _with_ends(data, docs)
        codes = _codes(symbols)
        for first in range(0, len(codes), _CHUNK):
            self._counts += np.bincount(codes[first : first + _CHUNK], minlength=len(self._counts)).astype(np.int32)

    def fit(self) -> ByteModels:
        """The probabilities of what was counted."""
        two = self._counts.reshape(_SYMBOLS, _SYMBOLS, _SYMBOLS)
        one = two.sum(0, dtype=np.int64)
        zero = one.sum(0)
        unigram = (zero + 0.5) / (zero.sum() + 0.5 * _SYMBOLS)
        bigram = _interpolated(one, unigram)
        trigram_bits = np.empty(two.shape, np.float32)
        for before, counts in enumerate(two):
            trigram_bits[before] = -np.log2(_interpolated(counts, bigram))
        return ByteModels(-np.log2(unigram), trigram_bits.reshape(-1))


@dataclass(frozen=True)
class ByteModels:
    """Bits of every symbol under order 0, and of every code (before last, last, symbol) under order 2."""

    order0_bits: Float[np.ndarray, " V"]
    order2_bits: Float[np.ndarray, " V3"]

    def score(self, documents: Sequence[bytes]) -> dict[str, Score]:
        """Bits per raw byte of whole documents, `<end>` paid for but not divided by."""
        bits: dict[str, list[float]] = {"order0": [], "order2": []}
        for document in documents:
            symbols = _with_ends(document, np.array([0, len(document)]))
            bits["order0"].append(float(self.order0_bits[symbols].sum(dtype=np.float64)))
            bits["order2"].append(float(self.order2_bits[_codes(symbols)].sum(dtype=np.float64)))
        sizes = [len(document) for document in documents]
        return {name: ratio(sums, sizes) for name, sums in bits.items()}


def xz_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Bits per byte of the documents one after the other under `xz -9e`, its container included."""
    joined = b"".join(documents)
    return 8.0 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / max(len(joined), 1)


def gaussian_flow_loss(
    train: Float[np.ndarray, "n d"],
    heldout: Float[np.ndarray, "m d"],
    *,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    covariance: Literal["full", "channel"] = "full",
    sample: Int[np.ndarray, " m"] | None = None,
) -> Score:
    """Flow loss of the best velocity predictor for Gaussian data: x_t = (1 - t) x + t eps, v = eps - x.

    E[v | x_t] is linear with the mean and covariance of `train`: along a direction of variance s, its gain on the
    centred x_t is (t - (1 - t) s) / ((1 - t)^2 s + t^2), and what it leaves is s / the same denominator. "full" shrinks
    the covariance towards a multiple of the identity by Ledoit and Wolf's closed-form weight (2004); "channel" takes a
    variance for each column alone. The mean is over all scalars and times; the standard error over samples: rows of
    equal `sample` are one (cells of a span), else each row is one. The noise is drawn along the covariance's
    directions, where it is as white as anywhere.
    """
    train, heldout = np.asarray(train, np.float32), np.asarray(heldout, np.float32)
    mean = train.mean(0, dtype=np.float64).astype(np.float32)
    centred = train - mean
    if covariance == "full":
        variance, directions = _shrunk_covariance(centred)
        clean = (heldout - mean) @ directions
    else:
        variance, clean = np.square(centred).mean(0, dtype=np.float64), heldout - mean
    errors = np.zeros(len(clean), np.float64)
    for number, t in enumerate(times):
        noise = generator(seed, "gaussian", number).standard_normal(clean.shape, dtype=np.float32)
        gain = ((t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)).astype(np.float32)
        left = noise - clean - gain * ((1 - t) * clean + t * noise)
        errors += np.square(left).sum(1, dtype=np.float64) / len(times)
    rows = np.arange(len(clean)) if sample is None else np.unique(sample, return_inverse=True)[1]
    return ratio(np.bincount(rows, weights=errors), np.bincount(rows) * clean.shape[1])


def compute_baselines(config: RunConfig, *, text_bytes: int, media_spans: int) -> Baselines:
    """Every baseline of this data set; kept beside it as baselines-<fingerprint>.json and read back from there.

    Numbers: text/order0, text/order2 (each with _stderr), text/xz, <modality>/gaussian (where all its latents have one
    shape, not too large) and <modality>/gaussian_channel (each with _stderr). Raises DataError if data cannot be read.
    """
    texts = _heldout_texts(config, text_bytes=text_bytes)
    media = {name: _heldout_latents(config, modality=name, media_spans=media_spans) for name in config.model.media}
    kept = Path(config.data.root) / f"baselines-{_fingerprint(config, texts=texts, media=media)}.json"
    if kept.is_file():
        return Baselines(**json.loads(kept.read_text(encoding="utf-8")))
    found = Baselines({}, {})
    _add_text(found, config, heldout=texts)
    for modality, heldout in media.items():
        _add_media(found, config, modality=modality, heldout=heldout)
    _keep(found, kept)
    return found


def _with_ends(data: bytes | memoryview, docs: Int[np.ndarray, " E1"]) -> Int[np.ndarray, " U"]:
    """Symbols of the documents, `<end>` after each."""
    return np.insert(np.frombuffer(data, np.uint8).astype(np.int32), np.asarray(docs, np.int64)[1:], END)


def _codes(symbols: Int[np.ndarray, " U"]) -> Int[np.ndarray, " U"]:
    """(before last, last, symbol) as one number; the `<end>` before a document is its `<begin>`, twice over."""
    last = np.concatenate([[_BEGIN], symbols[:-1]])
    before = np.concatenate([[_BEGIN], last[:-1]])
    before[last == _BEGIN] = _BEGIN
    return (before * _SYMBOLS + last) * _SYMBOLS + symbols


def _interpolated(counts: Int[np.ndarray, "h V"], below: Float[np.ndarray, ...]) -> Float[np.ndarray, "h V"]:
    """Witten and Bell's mixture of counts and the order below; where nothing was counted, the order below alone."""
    different = (counts > 0).sum(-1, keepdims=True)
    total = counts.sum(-1, keepdims=True)
    mixed = (counts + different * below) / np.maximum(total + different, 1)
    return np.where(total > 0, mixed, below)


def _shrunk_covariance(centred: Float[np.ndarray, "n d"]) -> tuple[np.ndarray, np.ndarray]:
    """(variances, directions as columns) of the shrunk covariance."""
    n, d = centred.shape
    covariance = (centred.T @ centred).astype(np.float64) / n
    level = np.trace(covariance) / d
    square = np.square(covariance).sum()
    spread = square - d * level**2
    norms = np.square(centred).sum(1, dtype=np.float64)
    noise = (np.square(norms).mean() - square) / n
    weight = min(1.0, max(0.0, noise / spread)) if spread > 0 else 1.0
    variance, directions = np.linalg.eigh(covariance.astype(np.float32))
    shrunk = (1 - weight) * np.maximum(variance, 0).astype(np.float64) + weight * level
    return np.maximum(shrunk, 1e-12), directions


def ratio(sums: Sequence[float] | np.ndarray, sizes: Sequence[int] | np.ndarray) -> Score:
    """Sum over size, with the standard error of a ratio over independent samples."""
    totals, counts = np.asarray(sums, np.float64), np.asarray(sizes, np.float64)
    value = totals.sum() / max(counts.sum(), 1.0)
    n = len(totals)
    if n < 2:
        return Score(float(value), math.nan, totals)
    spread = np.square(totals - value * counts).sum() * n / (n - 1)
    return Score(float(value), float(math.sqrt(spread) / max(counts.sum(), 1.0)), totals)


def _heldout_texts(config: RunConfig, *, text_bytes: int) -> dict[str, bytes]:
    return {
        document.key: b"".join(span.data for span in document.spans if isinstance(span, TextSpan))
        for name, source in config.data.sources.items()
        if source.form == "text"
        for document in heldout_documents(config, name, max_bytes=text_bytes)
    }


def _heldout_latents(config: RunConfig, *, modality: str, media_spans: int) -> Latents:
    found: Latents = {}
    for name in scored_sources(config.data, modality):
        for document in heldout_documents(config, name, max_spans=media_spans):
            latents = [one.latent for one in document.spans if isinstance(one, MediaSpan) and one.modality == modality]
            if latents:
                found[document.key] = latents
    return found


def _add_text(found: Baselines, config: RunConfig, *, heldout: dict[str, bytes]) -> None:
    if not heldout:
        return
    counts = ByteCounts()
    for source in config.data.sources.values():
        if source.form != "text":
            continue
        reader = ShardReader(Path(config.data.root) / source.path / "train")
        for i in range(len(reader)):
            counts.add(reader.view(i, "bytes"), reader.array(i, "docs.npy"))
    found.numbers["text/xz"] = xz_bits_per_byte(list(heldout.values()))
    for order, score in counts.fit().score(list(heldout.values())).items():
        _add(found, f"text/{order}", score, keys=heldout)


def _add_media(found: Baselines, config: RunConfig, *, modality: str, heldout: Latents) -> None:
    sources = scored_sources(config.data, modality)
    train = [latent for name in sources for latent in _train_latents(config, name, modality=modality)]
    if not heldout or not train:
        return
    document = np.repeat(np.arange(len(heldout)), [len(latents) for latents in heldout.values()])
    scored = [latent for latents in heldout.values() for latent in latents]
    cells = [_cells(latent) for latent in scored]
    sample = np.repeat(document, [len(rows) for rows in cells])
    rows = np.concatenate([_cells(latent) for latent in train])
    score = gaussian_flow_loss(rows, np.concatenate(cells), covariance="channel", sample=sample)
    _add(found, f"{modality}/gaussian_channel", score, keys=heldout)
    if len({latent.shape for latent in (*train, *scored)}) == 1 and train[0].size <= MAX_SCALARS:
        flat = [np.stack([latent.reshape(-1) for latent in latents]) for latents in (train, scored)]
        _add(found, f"{modality}/gaussian", gaussian_flow_loss(flat[0], flat[1], sample=document), keys=heldout)


def _train_latents(config: RunConfig, name: str, *, modality: str) -> Iterable[np.ndarray]:
    """Normalised latents of the train split, drawn as a run draws them, at most MAX_TRAIN_LATENTS evenly spaced."""
    source, media = config.data.sources[name], config.model.media[modality]
    reader = ShardReader(Path(config.data.root) / source.path / "train")
    if latents_of(reader.manifest, modality) is None:
        return
    normalisation = Normalisation.of(config.data, modality, media=media)
    places = list(_members(reader, source.form, modality=modality))
    for place in places[:: -(-len(places) // MAX_TRAIN_LATENTS)]:
        draws = generator(0, "baseline", name, *place)
        yield read_latent(reader, place, normalisation=normalisation, media=media, draws=draws)


def _members(reader: ShardReader, form: str, *, modality: str) -> Iterator[tuple[int, str]]:
    """(sample, member) of every latent of a modality."""
    for i in range(len(reader)):
        if form == "pairs":
            yield i, "moments.npy"
            continue
        for span in json.loads(bytes(reader.view(i, "json")))["spans"]:
            if span.get("modality") == modality:
                yield i, span["member"]


def _cells(latent: Float[np.ndarray, "C ..."]) -> Float[np.ndarray, "cells C"]:
    return latent.reshape(len(latent), -1).T


def _add(found: Baselines, name: str, score: Score, *, keys: Iterable[str]) -> None:
    found.numbers[name] = score.value
    if math.isfinite(score.stderr):
        found.numbers[f"{name}_stderr"] = score.stderr
    found.totals[name] = dict(zip(keys, score.totals.tolist(), strict=True))


def _fingerprint(config: RunConfig, *, texts: dict[str, bytes], media: dict[str, Latents]) -> str:
    """Of everything the numbers depend on: what is scored, the train splits' manifests, and this file's version."""
    digest = hashlib.sha256(f"{VERSION}".encode())
    clean = (latent.tobytes() for found in media.values() for latents in found.values() for latent in latents)
    scored = [*texts.values(), *clean]
    for content in scored:
        digest.update(hashlib.sha256(content).digest())
    for source in config.data.sources.values():
        path = Path(config.data.root) / source.path / "train" / "manifest.json"
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path} must be readable, got: {error}; set data.root") from error
    return digest.hexdigest()[:16]


def _keep(found: Baselines, path: Path) -> None:
    """Write beside the data; a data set that is read-only costs the computation again, not the run."""
    try:
        write_whole(path, (json.dumps(asdict(found), indent=1) + "\n").encode())
    except OSError as error:
        log.warning("baselines are not kept in %s: %s", path, error)
