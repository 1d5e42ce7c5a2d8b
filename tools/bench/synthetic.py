"""Packed batches without a data set: documents of random bytes and latents, through the real packing.

A bench on a rented machine has no shards. What costs time are sizes, masks and the mixture, and those are as in a run:
text documents, captions with what they describe (generated or given), cut and packed as the loader cuts and packs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from matformer.config.schema import ModelConfig, RunConfig
from matformer.data.packing import Piece, Place, cut, document_positions, draw_training_noise, pack_batch
from matformer.data.patching import StaticPatcher
from matformer.data.sources import Document, Role, media_span, merge_spans
from matformer.parcels import Batch

Mixture = Literal["mixed", "text"]
TEXT_BYTES, CAPTION_BYTES = (500, 8000), (20, 200)  # least and most
GENERATED = 0.7  # as data.sources.NAME.generate_probability
BLIND = 0.1  # as data.blind_probability


def documents(model: ModelConfig, *, dice: np.random.Generator, patcher: StaticPatcher) -> Iterator[Document]:
    """Without end: a pair of each modality, a text, a pair, ..."""
    number = 0
    while True:
        for name in (*model.media, None):
            number += 1
            yield _document(str(number), name, model, dice=dice, patcher=patcher)


def _document(
    key: str, name: str | None, model: ModelConfig, *, dice: np.random.Generator, patcher: StaticPatcher
) -> Document:
    text = dice.bytes(int(dice.integers(*(CAPTION_BYTES if name else TEXT_BYTES))))
    if name is None:
        return Document(key, merge_spans([text], patcher))
    media = model.media[name]
    shape = media.buckets[int(dice.integers(len(media.buckets)))]
    role: Role = "generate" if dice.random() < GENERATED else "given"
    latent = dice.standard_normal((media.channels, *shape), dtype=np.float32)
    span = media_span(latent, name, media=media, role=role)
    return Document(key, merge_spans([text, span] if role == "generate" else [span, text], patcher))


def packed_rows(
    model: ModelConfig, *, rows: int, length: int, mixture: Mixture = "mixed", seed: int = 0, patch_bytes: int = 4
) -> list[list[Piece]]:
    """Rows of whole documents, each filled to the last position with a text that is cut where the row ends."""
    dice, patcher = np.random.default_rng(seed), StaticPatcher(patch_bytes)
    endless = documents(model if mixture == "mixed" else _without_media(model), dice=dice, patcher=patcher)
    found = []
    for _ in range(rows):
        pieces, room = [], length
        while room >= document_positions(one := next(endless), model=model):
            pieces.append(Piece(one, Place(), Place(len(one.spans))))
            room -= document_positions(one, model=model)
        if room > 1:
            pieces.append(_filling(f"last-{len(found)}", room, model, dice=dice, patcher=patcher))
        found.append(pieces)
    return found


def _filling(key: str, room: int, model: ModelConfig, *, dice: np.random.Generator, patcher: StaticPatcher) -> Piece:
    text = dice.bytes(room * patcher.patch_bytes)
    filled = cut(Document(key, merge_spans([text], patcher)), Place(), room=room, model=model)
    assert filled is not None, "a start and a patch fit"
    return filled[0]


def _without_media(model: ModelConfig) -> ModelConfig:
    """Its documents hold text alone; packed for the whole model still."""
    return model.model_copy(update={"media": {}})


def batches_of(config: RunConfig, *, count: int, mixture: Mixture = "mixed") -> list[Batch]:
    """Microbatches of the config's size, each different."""
    model, length, rows = config.model, config.data.sequence_latents, config.train.micro_batch
    found = packed_rows(model, rows=rows * count, length=length, mixture=mixture, seed=config.seed)
    return [
        batch_of(model, found[rows * one : rows * (one + 1)], length=length, step=one, seed=config.seed)
        for one in range(count)
    ]


def batch_of(
    model: ModelConfig, rows: Sequence[Sequence[Piece]], *, length: int, step: int = 0, seed: int = 0
) -> Batch:
    """These rows with the noise that training draws at this step."""
    draws = [
        draw_training_noise(seed=seed, step=step, lane=lane, blind_probability=BLIND, time_shift=1.0)
        for lane in range(len(rows))
    ]
    return pack_batch(rows, draws, model=model, sequence_latents=length)
