"""Tiny models and documents, made from seeds: the same in every process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.write import npy, static_patches
from matformer.config.schema import (
    AttoConfig,
    DataConfig,
    MediaConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
)
from matformer.data.packing import Piece, Place, build_batch, draw_zeros, pack_batch, with_noise
from matformer.data.patching import StaticPatcher
from matformer.data.shards import ShardWriter
from matformer.data.sources import Document, MediaSpan, Role, media_span, merge_spans
from matformer.data.text_rows import with_masks
from matformer.hosts.plain import PlainHost
from matformer.model import Matformer
from matformer.parcels import Batch
from tests.tolerances import SAME_SUM

PATCHER = StaticPatcher(3)
LENGTH = 48  # latents of a sequence


def tiny_model(*, layers: int = 2) -> ModelConfig:
    """Two media, two buckets each; grouped heads; every rotary axis has a pair."""
    atto = AttoConfig(width=32, layers=layers, heads=4, kv_heads=2, ffn_width=48, rotary_pairs=(1, 1, 1, 1))
    text = TextConfig(width=16, heads=2, ffn_width=24, preludio_layers=1, coda_layers=2, window=5, ngram_rows=64)
    image = MediaConfig(channels=2, rank=2, patch=2, buckets=((4, 4), (4, 8)), coda_width=16)
    audio = MediaConfig(channels=3, rank=1, patch=2, buckets=((8,), (16,)), coda_width=16, coda_layers=1)
    return ModelConfig(atto=atto, text=text, media={"image": image, "audio": audio})


def as_blt(model: ModelConfig) -> ModelConfig:
    """The same sizes with the byte path and the trunk of BLT."""
    text = model.text.model_dump() | {
        "preludio_pool": "max",
        "preludio_places": False,
        "coda_input": "preludio",
        "coda_projection": True,
    }
    atto = model.atto.model_dump() | {"qk_norm": False}
    return ModelConfig.model_validate(model.model_dump() | {"text": text, "atto": atto})


def as_diffused(model: ModelConfig, objective: str) -> ModelConfig:
    """The same sizes with text by filling in masks, in patches of 3 and blocks of two patches."""
    text = model.text.model_dump() | {"objective": objective, "patch_bytes": 3, "block_patches": 2}
    return ModelConfig.model_validate(model.model_dump() | {"text": text})


def with_media(model: ModelConfig, *, media_context: str = "clean_copy", **keys: Any) -> ModelConfig:
    """The same sizes with these keys in every modality."""
    media = {name: media.model_dump() | keys for name, media in model.media.items()}
    return ModelConfig.model_validate(model.model_dump() | {"media": media, "media_context": media_context})


def as_tokens(model: ModelConfig, vocabulary: int) -> ModelConfig:
    """The same trunk with pieces of a vocabulary for text."""
    text = model.text.model_dump() | {"vocabulary": vocabulary}
    return ModelConfig.model_validate(model.model_dump() | {"text": text})


def tiny_run(*, layers: int = 2, train: dict[str, Any] | None = None, **parallel: Any) -> RunConfig:
    """A run of the tiny model: four microbatches of two sequences a step, AdamW, no clipping.

    epsilon 1e-5: with 1e-8 AdamW turns the sign of a rounding error into a whole step.
    """
    numbers = {"steps": 10, "global_batch": 8, "micro_batch": 2, "lr": 3e-3, "clip": 0.0, "epsilon": 1e-5}
    source = SourceConfig(path="made", form="text", weight=1.0)
    return RunConfig(
        name="made",
        model=tiny_model(layers=layers),
        data=DataConfig(root="made", recipe=None, lanes=8, sequence_latents=LENGTH, sources={"made": source}),
        parallel=ParallelConfig(timeout_seconds=60, threads=1, **parallel),
        train=TrainConfig.model_validate(numbers | (train or {})),
    )


MODEL = tiny_model()


def image(seed: int, *, role: Role = "generate", wide: bool = False) -> MediaSpan:
    latent = np.random.default_rng(seed).standard_normal((2, 4, 8 if wide else 4), dtype=np.float32)
    return media_span(latent, "image", media=MODEL.media["image"], role=role)


def audio(seed: int, *, role: Role = "generate", long: bool = False) -> MediaSpan:
    latent = np.random.default_rng(seed).standard_normal((3, 16 if long else 8), dtype=np.float32)
    return media_span(latent, "audio", media=MODEL.media["audio"], role=role)


def document(key: str, *spans: bytes | MediaSpan) -> Document:
    return Document(key, merge_spans(spans, PATCHER))


def mixed_documents() -> list[Document]:
    """Eight documents: every role, both buckets of each modality, media first, last and in the middle."""
    return [
        document("a", b"a red square ", image(1), b" on grass"),
        document("b", audio(2, role="given"), b"they say hello"),
        document("c", b"only text, a little longer than the window"),
        document("d", b"a long sound", audio(3, long=True)),
        document("e", image(4, role="given", wide=True), b"and", audio(5), b"x"),
        document("f", b"\x00\xff\xc3\xa9"),
        document("g", b"wide", image(6, wide=True)),
        document("h", b"two: ", image(7), image(8), b" end"),
    ]


def one_a_row(
    documents: Sequence[Document], *, length: int = LENGTH, time: float = 0.4, model: ModelConfig = MODEL
) -> Batch:
    """Each document alone in a row, padded; noise drawn from the document's key."""
    return with_noise(build_batch(documents, model=model, sequence_latents=length), time=time, seed=0, index=0)


def packed(rows: Sequence[Sequence[Document]], *, length: int, time: float = 0.4, model: ModelConfig = MODEL) -> Batch:
    """Whole documents, several a row; noise drawn from the document's key."""
    pieces = [[Piece(document, Place(), Place(len(document.spans))) for document in row] for row in rows]
    batch = pack_batch(pieces, [draw_zeros] * len(rows), model=model, sequence_latents=length)
    return with_noise(batch, time=time, seed=0, index=0)


def masked_batch(documents: Sequence[Document], *, model: ModelConfig, number: int, length: int = LENGTH) -> Batch:
    """Each document alone in a row, its text masked at stratum `number` of 16."""
    batch = with_noise(build_batch(documents, model=model, sequence_latents=length), time=0.4, seed=0, index=0)
    return with_masks(batch, number=number, draws=16, seed=0)


def text_only(seed: int) -> Batch:
    """Two rows of bytes."""
    draws = np.random.default_rng(seed)
    return one_a_row([document(f"t{seed}.{i}", draws.bytes(int(draws.integers(5, 90)))) for i in range(2)])


def with_images(seed: int) -> Batch:
    """Two rows, one generated and one given image; no audio."""
    generated = document(f"i{seed}.0", b"image %d " % seed, image(seed), b" after")
    given = document(f"i{seed}.1", image(seed + 1, role="given", wide=True), b"caption %d" % seed)
    return one_a_row([generated, given], time=0.3)


def with_audio(seed: int) -> Batch:
    """Two rows, one generated and one given sound; no image."""
    generated = document(f"s{seed}.0", b"sound %d" % seed, audio(seed, long=True))
    given = document(f"s{seed}.1", audio(seed + 1, role="given"), b"says %d" % seed)
    return one_a_row([generated, given], time=0.7)


def with_both(seed: int) -> Batch:
    """Two rows: an image and a sound in one document, and a blind image."""
    first = document(f"b{seed}.0", b"both", image(seed), audio(seed), b"%d" % seed)
    blind = build_batch(
        [first, document(f"b{seed}.1", b"blind", image(seed + 2), b"!")],
        model=MODEL,
        sequence_latents=LENGTH,
        blind=True,
    )
    return with_noise(blind, time=0.5, seed=0, index=0)


def poisoned(batch: Batch) -> Batch:
    """The same batch with pictures that are not finite."""
    units = batch.media["image"]
    return replace(batch, media={**batch.media, "image": replace(units, value_NF=units.value_NF * float("nan"))})


@dataclass(frozen=True)
class SameBatches:
    """In a loader's place: a rank's microbatches of each step; the last step's for ever."""

    steps: Sequence[Sequence[Batch]]

    def next_global_batch(self, step: int) -> list[Batch]:
        return list(self.steps[min(step, len(self.steps) - 1)])

    def state(self) -> dict[str, Any]:
        return {"step": 0, "num_lanes": 1, "lanes": {}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


def stirred_value(name: str, value: Tensor) -> Tensor:
    """A weight away from its start (zeros and ones hide faults: a zero last layer passes no gradient on)."""
    seed = sum((i + 1) * byte for i, byte in enumerate(name.encode()))
    return value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))


def plain_host(config: RunConfig, *, stirred: bool = True) -> PlainHost:
    """The tiny model on one rank in plain PyTorch, its weights stirred."""
    host = PlainHost(config)
    model = Matformer(config.model, trunk=host.build_trunk())
    host.prepare(model)
    if stirred:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(stirred_value(name, weight))
    return host


def sums_by_document(model: Matformer, batch: Batch) -> dict[str, dict[str, float]]:
    """Document -> part -> its sum."""
    with torch.no_grad():
        sums = model(batch)
    return {key: {part: float(sums[part][i]) for part in sums} for i, key in enumerate(batch.document_keys)}


def assert_same_sums(found: Mapping[str, Mapping[str, float]], expected: Mapping[str, Mapping[str, float]]) -> None:
    """Every document that was found has the sums that are expected of it, in float64."""
    for key, parts in found.items():
        for part, value in parts.items():
            limit = SAME_SUM[torch.float64] * max(abs(expected[key][part]), 1.0)
            assert abs(value - expected[key][part]) <= limit, (key, part)


def gradient_by_pictures(model: Matformer, part: str, batch: Batch, *, by: str) -> Tensor:
    """Of a part of the loss by values or noise of the pictures; zeros where it does not depend on them."""
    units = batch.media["image"]
    leaf = getattr(units, by).double().requires_grad_()
    sums = model(replace(batch, media={**batch.media, "image": replace(units, **{by: leaf})}))
    (found,) = torch.autograd.grad(sums[part].sum(), leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def write_text(folder: Path, *, blocks: list[list[bytes]]) -> None:
    """A text data set of these documents, in patches of 4."""
    with ShardWriter(folder, form="text", extra={"origin": "made"}) as writer:
        for number, documents in enumerate(blocks):
            lengths = np.array([len(one) for one in documents])
            members = {
                "bytes": b"".join(documents),
                "docs.npy": npy(np.concatenate([[0], lengths.cumsum()])),
                "patches.npy": npy(static_patches(lengths, patch_bytes=4)),
                "json": json.dumps([{"key": str(i)} for i in range(len(documents))]).encode(),
            }
            writer.add(f"block-{number}", members)


def tiny_diffusers(name: str, *, seed: int = 0) -> Any:
    """A random autoencoder of diffusers with a few hundred to thousand weights."""
    import diffusers

    torch.manual_seed(seed)
    settings: dict[str, dict[str, Any]] = {
        "AutoencoderKL": {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 2,
            "sample_size": 16,
        },
        "AutoencoderDC": {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
        },
        "AutoencoderKLWan": {
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [True, True],
            "latents_mean": [0.0, 1.0, 2.0, 3.0],
            "latents_std": [2.0] * 4,
        },
        "AutoencoderOobleck": {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
            "decoder_channels": 4,
            "decoder_input_channels": 4,
            "sampling_rate": 8000,
        },
    }
    return getattr(diffusers, name)(**settings[name]).eval()
