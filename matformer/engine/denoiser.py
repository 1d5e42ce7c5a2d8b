"""Media by denoising, from t = 1 to 0. Rows are documents that grow side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.data.packing import DrawNoise, Noise, Piece, Place, document_positions, draw_zeros, pack_batch
from matformer.data.sources import Document, MediaSpan
from matformer.engine.draws import Draws, Row, Solver, dice_of, given
from matformer.errors import ParcelError
from matformer.layers.patchify import unpatchify
from matformer.modalities import patch_scalars, patches_of_bucket
from matformer.model import Matformer
from matformer.parcels import Batch

Velocity = Callable[[Tensor, float], Tensor]


@torch.no_grad()
def draw_media(
    model: Matformer, rows: Sequence[Row], *, modality: str, buckets: Sequence[int], config: RunConfig, draws: Draws
) -> list[MediaSpan]:
    """One span of `modality` a row, of the shape that `buckets` names, denoised from t = 1 to 0.

    Raises ParcelError where it does not fit into the sequence.
    """
    media = config.model.media[modality]
    empty = [_empty_span(modality, bucket, config=config) for bucket in buckets]
    documents = [Document(f"row {row.number}", (*given(row.spans), one)) for row, one in zip(rows, empty, strict=True)]
    batch = denoising_batch(documents, config=config, guided=draws.guidance != 1)
    sizes = [patches_of_bucket(media, bucket) for bucket in buckets]
    noise = [
        dice_of(draws, row, modality).standard_normal((size, patch_scalars(media)), dtype=np.float32)
        for row, size in zip(rows, sizes, strict=True)
    ]
    velocity = guided_velocity(model, batch, modality=modality, guidance=draws.guidance)
    x_QF = denoise(velocity, torch.from_numpy(np.concatenate(noise)), steps=draws.steps, solver=draws.solver)
    latents = [
        unpatchify(x_NF, grid=media.buckets[bucket], patch=media.patch).numpy()
        for x_NF, bucket in zip(x_QF.split(sizes), buckets, strict=True)
    ]
    return [replace(one, latent=latent) for one, latent in zip(empty, latents, strict=True)]


def denoise(velocity: Velocity, x: Tensor, *, steps: int, solver: Solver = "euler") -> Tensor:
    """x_0 of x_1 = `x` along dx/dt = velocity(x, t), in equal steps of t. Source: Karras 2022, algorithm 1 (Heun)."""
    times = np.linspace(1.0, 0.0, steps + 1)
    for time, after in zip(times[:-1], times[1:], strict=True):
        slope = velocity(x, float(time))
        ahead = x + float(after - time) * slope
        if solver == "heun":
            ahead = x + float(after - time) / 2 * (slope + velocity(ahead, float(after)))
        x = ahead
    return x


def denoising_batch(documents: Sequence[Document], *, config: RunConfig, guided: bool) -> Batch:
    """Each document a row, its last span the generated one; `guided` repeats all rows without their condition.

    Raises ParcelError where a document does not fit.
    """
    model = config.model
    length = max(document_positions(document, model=model) for document in documents)
    if length > config.data.sequence_latents:
        raise ParcelError(
            f"a prompt and the span after it must fit into {config.data.sequence_latents} latents, got {length}; "
            "shorten the prompt"
        )
    blind = [replace(document, key=f"{document.key} blind") for document in documents] if guided else []
    pieces = [[Piece(one, Place(), Place(len(one.spans)))] for one in (*documents, *blind)]
    noises = [_no_noise(blind=False)] * len(documents) + [_no_noise(blind=True)] * len(blind)
    return pack_batch(pieces, noises, model=model, sequence_latents=length)


def guided_velocity(model: Matformer, batch: Batch, *, modality: str, guidance: float) -> Velocity:
    """v_blind + w (v_cond - v_blind) of the noised rows of a `denoising_batch`; with w = 1 it has no blind rows.

    x_t stands as value and as noise alike: the straight path between x_t and itself is x_t at every t. The value is
    read by nobody else, since a span that ends its document has no clean copy.
    """
    units = batch.media[modality]
    generated = torch.zeros_like(units.time_J).index_fill(0, units.span_N[units.noised_row_Q].unique(), 1.0)
    copies = 1 if guidance == 1 else 2

    def velocity(x_QF: Tensor, time: float) -> Tensor:
        value = units.value_NF.index_copy(0, units.noised_row_Q, torch.cat((x_QF,) * copies))
        now = replace(units, value_NF=value, noise_NF=value, time_J=time * generated)
        latents = model.latents(replace(batch, media={**batch.media, modality: now}))
        found = model.code[modality](latents.flatten(0, 1), now).float()
        if copies == 1:
            return found
        seeing, blind = found.chunk(2)
        return blind + guidance * (seeing - blind)

    return velocity


def _no_noise(*, blind: bool) -> DrawNoise:
    def draw(key: str, span: int, shape: tuple[int, int]) -> Noise:
        return draw_zeros(key, span, shape)._replace(blind=blind)

    return draw


def _empty_span(modality: str, bucket: int, *, config: RunConfig) -> MediaSpan:
    media = config.model.media[modality]
    shape = (media.channels, *media.buckets[bucket])
    return MediaSpan(modality, np.zeros(shape, np.float32), bucket, "generate")
