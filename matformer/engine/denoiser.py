"""Media by denoising, from t = 1 to 0, a span at once or patch after patch. Rows are documents that grow abreast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from matformer.config.schema import MediaObjective, RunConfig
from matformer.data.packing import DrawNoise, Noise, Piece, Place, document_positions, draw_zeros, pack_batch
from matformer.data.sources import Document, MediaSpan, tree_of
from matformer.engine.dpm_solver import denoise_by_dpm, scheduler_of
from matformer.engine.draws import Draws, OnStep, Row, Solver, dice_of, empty_span, given, unwatched
from matformer.engine.trees import draw_trees
from matformer.errors import CheckpointError, ConfigError, ParcelError
from matformer.layers.noise_levels import levels, time_of_log_snr
from matformer.layers.patchify import unpatchify
from matformer.model import Matformer
from matformer.parcels import Batch, MediaUnits

Velocity = Callable[[Tensor, float], Tensor]
FIRST_LOG_SNR = -8.0
"""Where DDPM begins, with alpha 0.018. An error of epsilon is 1 / alpha times as large in v: 20,000 at index 999."""


@torch.no_grad()
def draw_media(
    model: Matformer,
    rows: Sequence[Row],
    *,
    modality: str,
    buckets: Sequence[int],
    config: RunConfig,
    draws: Draws,
    on_step: OnStep = unwatched,
) -> list[MediaSpan]:
    """One span of `modality` a row, of the shape that `buckets` names, denoised from t = 1 to 0.

    `on_step` hears of every evaluation of the network.
    What a row gets does not depend on the rows beside it. Raises ParcelError where it does not fit into the sequence,
    CheckpointError or ConfigError, whichever is the cause, where a span is not finite.
    """
    media = config.model.media[modality]
    trees: Sequence[np.ndarray | None] = [None] * len(rows)
    if media.noises_trees:
        trees = draw_trees(model, rows, modality=modality, buckets=buckets, config=config, draws=draws)
    empty = [
        replace(empty_span(modality, bucket, media=media), noised_tree=tree)
        for bucket, tree in zip(buckets, trees, strict=True)
    ]
    documents = [Document(f"row {row.number}", (*given(row.spans), one)) for row, one in zip(rows, empty, strict=True)]
    batch = denoising_batch(documents, config=config, guided=draws.guidance != 1)
    sizes = [math.prod(media.grid(bucket)) for bucket in buckets]
    noise = [
        dice_of(draws, row, modality).standard_normal((size, media.patch_scalars), dtype=np.float32)
        for row, size in zip(rows, sizes, strict=True)
    ]
    start = torch.from_numpy(np.concatenate(noise))
    if media.causal:
        x_QF = patch_after_patch(model, batch, start, modality=modality, sizes=sizes, draws=draws, on_step=on_step)
    else:
        velocity = guided_velocity(model, batch, modality=modality, guidance=draws.guidance)
        x_QF = denoise(
            velocity, start, steps=draws.steps, solver=draws.solver, objective=media.prediction, on_step=on_step
        )
    if not x_QF.isfinite().all():
        raise _not_finite(model, modality=modality, draws=draws)
    latents = [
        unpatchify(x_NF, grid=media.buckets[bucket], patch=media.patch).numpy()
        for x_NF, bucket in zip(x_QF.split(sizes), buckets, strict=True)
    ]
    return [
        replace(one, latent=latent, tree=tree_of(latent, media=media))
        for one, latent in zip(empty, latents, strict=True)
    ]


def _not_finite(model: Matformer, *, modality: str, draws: Draws) -> CheckpointError | ConfigError:
    """Who is to blame for what was drawn: the weights, or how it was drawn."""
    broken = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if broken:
        return CheckpointError(
            f"the weights of a run must be finite, got nan or infinity in {len(broken)} of them, first in {broken[0]}; "
            "remove this checkpoint or train again"
        )
    return ConfigError(
        f"{modality} that is drawn must be finite, got nan or infinity by --solver {draws.solver} --steps "
        f"{draws.steps} --guidance {draws.guidance:g}; change one of these"
    )


def check_solver(solver: Solver, *, steps: int, objective: MediaObjective) -> None:
    """Raises ConfigError where `denoise` would: before anything is loaded."""
    if solver == "dpm":
        scheduler_of(objective, steps=steps, first_log_snr=FIRST_LOG_SNR)


def denoise(
    velocity: Velocity,
    x: Tensor,
    *,
    steps: int,
    solver: Solver = "euler",
    objective: MediaObjective = "flow",
    on_step: OnStep = unwatched,
) -> Tensor:
    """x_0 of x_1 = `x` along the objective's path, in equal steps of t.

    velocity: dx/dt on the straight path, dx/dangle = v on DDPM's circle; there an Euler step is DDIM's (Song 2021).
    on_step: hears of every evaluation of it; Heun asks twice a step. Raises ConfigError as `scheduler_of`.
    Source: Karras 2022, algorithm 1 (Heun). Theirs ends with an Euler step, because (x - D) / sigma is 0 / 0 at the
    end; a velocity is not, so ours corrects the last step too, at t = 0: the exact velocity of a Gaussian of spread 0.4
    leads to 0.406 in 5 steps, to 0.351 with an Euler step last, to 0.339 by Euler in 10.
    """
    velocity = _counted(velocity, on_step, total=2 * steps if solver == "heun" else steps)
    if solver == "dpm":
        return denoise_by_dpm(velocity, x, steps=steps, objective=objective, first_log_snr=FIRST_LOG_SNR)
    first = 1.0 if objective == "flow" else time_of_log_snr(FIRST_LOG_SNR, objective=objective)
    times = np.linspace(first, 0.0, steps + 1)
    for time, after in zip(times[:-1], times[1:], strict=True):
        slope = velocity(x, float(time))
        ahead = moved(x, slope, float(time), float(after), objective=objective)
        if solver == "heun":
            length = float(after - time) if objective == "flow" else _turn(float(time), float(after))
            ahead = x + length / 2 * (slope + velocity(ahead, float(after)))
        x = ahead
    return x


def _counted(velocity: Velocity, on_step: OnStep, *, total: int) -> Velocity:
    numbers = itertools.count(1)

    def counted(x: Tensor, time: float) -> Tensor:
        found = velocity(x, time)
        on_step(next(numbers), total)
        return found

    return counted


def moved(x: Tensor, velocity: Tensor, time: float, after: float, *, objective: MediaObjective) -> Tensor:
    """x at `after` if the clean x and the noise that `velocity` says stay what they are."""
    if objective == "flow":
        return x + (after - time) * velocity
    turn = _turn(time, after)
    return math.cos(turn) * x + math.sin(turn) * velocity


def _turn(time: float, after: float) -> float:
    """Angle between two times on DDPM's circle."""
    alpha, sigma = levels(torch.tensor([time, after], dtype=torch.float64), objective="ddpm_v")
    angle = torch.atan2(sigma, alpha)
    return float(angle[1] - angle[0])


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
    """y_blind + w (y_cond - y_blind) of the noised rows of a `denoising_batch`, as the velocity that `denoise` takes.

    With w = 1 the batch has no blind rows.
    """

    def predict(now: MediaUnits) -> Tensor:
        latents = model.latents(replace(batch, media={**batch.media, modality: now}))
        return model.code[modality](latents.flatten(0, 1), now)

    objective = model.model_config.media[modality].prediction
    return _velocity(predict, batch.media[modality], objective=objective, guidance=guidance)


def patch_after_patch(
    model: Matformer,
    batch: Batch,
    noise_QF: Tensor,
    *,
    modality: str,
    sizes: Sequence[int],
    draws: Draws,
    on_step: OnStep = unwatched,
) -> Tensor:
    """The patches of `next_latent` spans, `sizes` a row: each denoised from the latent before it, all rows abreast.

    `batch` is a `denoising_batch`. The Atto runs once a patch, over all positions: later ones are seen by none.
    `on_step` hears of every evaluation of the Coda, counted over all patches.
    Source: LatentLM (Sun 2024), section 3.
    """
    units, objective = batch.media[modality], model.model_config.media[modality].prediction
    seeing, copies = len(noise_QF), 1 if draws.guidance == 1 else 2
    firsts, x_QF = np.cumsum([0, *sizes[:-1]]), torch.empty_like(noise_QF)
    for patch in range(max(sizes)):
        turn = torch.tensor([int(first) + patch for first, size in zip(firsts, sizes, strict=True) if patch < size])
        now = decoded_at(units, torch.cat([turn + seeing * copy for copy in range(copies)]))
        latent_LH = model.latents(replace(batch, media={**batch.media, modality: units})).flatten(0, 1)

        def predict(noised: MediaUnits, latent_LH: Tensor = latent_LH) -> Tensor:
            return model.code[modality](latent_LH, noised)

        def counted(done: int, of: int, patch: int = patch) -> None:
            on_step(patch * of + done, max(sizes) * of)

        velocity = _velocity(predict, now, objective=objective, guidance=draws.guidance)
        made = denoise(
            velocity, noise_QF[turn], steps=draws.steps, solver=draws.solver, objective=objective, on_step=counted
        )
        x_QF[turn] = made
        value_NF = units.value_NF.index_copy(0, now.noised_row_Q, torch.cat((made,) * copies))
        units = replace(units, value_NF=value_NF)
    return x_QF


def decoded_at(units: MediaUnits, which_Q: Tensor) -> MediaUnits:
    """The same spans with these noised patches alone, all of one t."""
    return replace(
        units,
        noised_row_Q=units.noised_row_Q[which_Q],
        noised_slot_Q=units.noised_slot_Q[which_Q],
        noise_QF=units.noise_QF[which_Q],
        time_of_Q=torch.zeros_like(which_Q),
        time_T=units.time_T[:1],
        weight_T=units.weight_T[:1],
    )


def _velocity(
    predict: Callable[[MediaUnits], Tensor], units: MediaUnits, *, objective: MediaObjective, guidance: float
) -> Velocity:
    """What `predict` says of the noised patches of `units`, guided, as a velocity.

    What stands as value and as noise alike is x_t / (alpha + sigma): whatever the path, it is x_t at t. The value of a
    noised patch must be read by nobody else: a span that ends its document has no clean copy.
    """
    generated = torch.zeros_like(units.time_T).index_fill(0, units.time_of_Q.unique(), 1.0)
    copies = 1 if guidance == 1 else 2

    def velocity(x_QF: Tensor, time: float) -> Tensor:
        at = levels(torch.tensor(time, dtype=torch.float32), objective=objective)  # as the network rounds it
        twice = x_QF if objective == "flow" else x_QF / float(at.alpha + at.sigma)
        twice_QF = torch.cat((twice,) * copies)
        value_NF = units.value_NF.index_copy(0, units.noised_row_Q, twice_QF)
        found = predict(replace(units, value_NF=value_NF, noise_QF=twice_QF, time_T=time * generated)).float()
        if copies == 2:
            seeing, blind = found.chunk(2)
            found = blind + guidance * (seeing - blind)
        if objective == "ddpm_eps":  # v = alpha eps - sigma x with x = (x_t - sigma eps) / alpha
            found = (found - float(at.sigma) * x_QF) / float(at.alpha)
        return found

    return velocity


def _no_noise(*, blind: bool) -> DrawNoise:
    def draw(key: str, span: int, shape: tuple[int, ...]) -> Noise:
        return draw_zeros(key, span, shape)._replace(blind=blind)

    return draw
