"""Documents, pairs and albums -> shards, each form as `docs/data.md` describes it."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Int
from PIL import Image

from data_prep.albums import Album, Shown
from data_prep.clean import cut
from data_prep.demo_latents import Coded
from data_prep.records import Document, Picture, Sample, Sound, number_of
from data_prep.speech import SAMPLE_RATE
from matformer.data.shards import ShardWriter

BLOCK_BYTES = 1 << 20
PATCH_BYTES = 4


def write_texts(documents: Iterable[Document], *, folder: Path, extra: dict[str, Any]) -> dict[str, Any]:
    """Form `text`: blocks of about 1 MB of documents in an order that depends on their text alone.

    Gives the counts that the manifest also holds.
    """
    pieces = [
        (document, number, part)
        for document in documents
        for number, part in enumerate(cut(document.text.encode()))
        if part
    ]
    pieces.sort(key=lambda piece: number_of(f"{piece[0].source}/{piece[0].key}/{piece[1]}"))
    counts: dict[str, Any] = {
        "documents": len(pieces),
        "text_bytes": sum(len(part) for *_, part in pieces),
        "text_bytes_by_language": _bytes_by(pieces, of="language"),
        "text_bytes_by_source": _bytes_by(pieces, of="source"),
    }
    patcher = {"kind": "static", "patch_bytes": PATCH_BYTES}
    with ShardWriter(folder, form="text", extra={**extra, **counts, "patcher": patcher}) as writer:
        for block, chosen in enumerate(_blocks(pieces)):
            lengths = np.array([len(part) for *_, part in chosen], np.int64)
            names = [
                {"source": doc.source, "lang": doc.language, "key": f"{doc.source}/{doc.key}#{number}"}
                for doc, number, _ in chosen
            ]
            writer.add(
                f"block-{block:05d}",
                {
                    "bytes": b"".join(part for *_, part in chosen),
                    "docs.npy": npy(np.concatenate([[0], lengths.cumsum()])),
                    "patches.npy": npy(static_patches(lengths, patch_bytes=PATCH_BYTES)),
                    "json": _json(names),
                },
            )
    return counts


def static_patches(num_bytes: Int[np.ndarray, " docs"], *, patch_bytes: int) -> Int[np.ndarray, " patches"]:
    """Patch lengths of documents one after the other: each has one symbol more than bytes, its `<end>`."""
    symbols = num_bytes + 1
    patches = -(-symbols // patch_bytes)
    lengths = np.full(patches.sum(), patch_bytes, np.int32)
    lengths[patches.cumsum() - 1] = symbols - patch_bytes * (patches - 1)
    return lengths


def write_pairs(
    samples: Sequence[Sample],
    *,
    coded: dict[str, Coded],
    modality: str,
    folder: Path,
    extra: dict[str, Any],
    originals: bool = False,
) -> dict[str, Any]:
    """Form `pairs`: a latent with its captions; samples without a latent are left out and counted as dropped.

    `originals` stores the picture (png) or sound (flac) too, for reports to show beside what was decoded.
    """
    kept = sorted((sample for sample in samples if sample.key in coded), key=lambda sample: number_of(sample.key))
    counts: dict[str, Any] = {
        "kind": "mean",
        "modality": modality,
        "dropped_too_long": len(samples) - len(kept),
        "languages": dict(Counter(language for sample in kept for language in sample.texts).most_common()),
        "styles": dict(Counter(sample.style for sample in kept).most_common()),
        "cells": sum(int(np.prod(coded[sample.key].bucket)) for sample in kept),
        "groups": _groups(kept),
    }
    with ShardWriter(folder, form="pairs", extra={**extra, **counts}) as writer:
        for sample in kept:
            latent = coded[sample.key]
            writer.add(
                sample.key,
                {
                    "moments.npy": npy(latent.moments),
                    "txt": sample.main_text.encode(),
                    "json": _json(_described(sample, latent=latent, modality=modality)),
                    **(original(sample) if originals else {}),
                },
            )
    return {"samples": len(kept), **counts}


def write_albums(
    albums: Sequence[Album], *, coded: dict[str, Coded], folder: Path, extra: dict[str, Any]
) -> dict[str, Any]:
    """Form `documents`: spans of text and pictures in reading order."""
    pictures = sum(isinstance(part, Shown) for album in albums for part in album.parts)
    counts: dict[str, Any] = {
        "kind": "mean",
        "modality": "image",
        "pictures": pictures,
        "languages": dict(Counter(album.language for album in albums).most_common()),
    }
    with ShardWriter(folder, form="documents", extra={**extra, **counts}) as writer:
        for album in albums:
            writer.add(album.key, _album_members(album, coded=coded))
    return {"samples": len(albums), **counts}


def original(sample: Sample) -> dict[str, bytes]:
    """The sample as a file, by its extension."""
    buffer = io.BytesIO()
    if isinstance(sample, Picture):
        Image.fromarray(sample.pixels).save(buffer, format="png")
        return {"png": buffer.getvalue()}
    if isinstance(sample, Sound):
        soundfile.write(buffer, sample.wave, SAMPLE_RATE, format="flac", subtype="PCM_16")
        return {"flac": buffer.getvalue()}
    return {}


def npy(array: np.ndarray) -> bytes:
    """The array as a `.npy` file, version 1.0, C order."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _album_members(album: Album, *, coded: dict[str, Coded]) -> dict[str, bytes]:
    spans: list[dict[str, Any]] = []
    members: dict[str, bytes] = {}
    for part in album.parts:
        if isinstance(part, Shown):
            name = f"{len(members)}.moments.npy"
            members[name] = npy(coded[part.picture.key].moments)
            span = {"modality": "image", "member": name, "role": part.role, "key": part.picture.key}
            spans.append(span | {"concept": part.picture.concept, "bucket": coded[part.picture.key].bucket})
        else:
            spans.append({"text": part})
    return {**members, "json": _json({"key": album.key, "lang": album.language, "spans": spans})}


def _described(sample: Sample, *, latent: Coded, modality: str) -> dict[str, Any]:
    return {
        "modality": modality,
        "key": sample.key,
        "concept": sample.concept,
        "base": sample.base,
        "style": sample.style,
        "group": sample.group,
        "bucket": latent.bucket,
        "length": latent.length,
        "texts": [{"lang": language, "text": text} for language, text in sorted(sample.texts.items())],
        "source": sample.source,
    }


def _groups(samples: Sequence[Sample]) -> dict[str, dict[str, list[str]]]:
    """Style -> base concept -> keys: a wrong caption for a sample is one of another base in the same style."""
    groups: dict[str, dict[str, list[str]]] = {}
    for sample in samples:
        groups.setdefault(sample.style, {}).setdefault(sample.base, []).append(sample.key)
    return groups


def _blocks(pieces: list[tuple[Document, int, bytes]]) -> Iterable[list[tuple[Document, int, bytes]]]:
    block: list[tuple[Document, int, bytes]] = []
    size = 0
    for piece in pieces:
        block.append(piece)
        size += len(piece[2])
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _bytes_by(pieces: list[tuple[Document, int, bytes]], *, of: str) -> dict[str, int]:
    counter: Counter[str] = Counter()
    for document, _, part in pieces:
        counter[getattr(document, of)] += len(part)
    return dict(counter.most_common())


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
