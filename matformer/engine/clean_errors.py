"""How far the predicted clean latent is off at fixed levels of noise: the number that all objectives share."""

from __future__ import annotations

import math

import torch

from matformer.config.schema import RunConfig
from matformer.data.continued import with_before
from matformer.data.holdings import scored_sources
from matformer.data.loader import heldout_batches
from matformer.data.packing import with_noise
from matformer.engine.baselines import ratio
from matformer.engine.document_sums import document_sums, gather_documents, velocity_scalars
from matformer.hosts.base import Host
from matformer.layers.noise_levels import clean_scale, time_of_log_snr
from matformer.parcels import Batch

LOG_SNRS = (-4, -2, 0, 2, 4)
NOISE_SEED = 0
FIRST_INDEX = 9  # of the noise: the loss of the same spans has 1 to 8


def media_batches(config: RunConfig, modality: str) -> list[Batch]:
    """Held-out media of all sources of this modality, behind captions if shown; up to eval.media_spans of each."""
    names = scored_sources(config.data, modality)
    return [batch for name in names for batch in heldout_batches(config, name, max_spans=config.eval.media_spans)]


def clean_errors(host: Host, config: RunConfig, *, modality: str) -> dict[str, float]:
    """Keys `heldout/<modality>/x0_error_snr<log-SNR>`, and `_stderr` over documents. Collective.

    Mean over scalars of (predicted clean x - x)^2 at alpha^2 / sigma^2 = exp(log-SNR), the same noise whatever the
    objective. The prediction of x is linear in what the Coda predicts, so its error is that error times a known factor.
    """
    objective = config.model.media[modality].prediction
    plain = media_batches(config, modality)
    if not any(velocity_scalars(batch, modality)[0].numel() for batch in plain):
        return {}
    times = [time_of_log_snr(float(log_snr), objective=objective) for log_snr in LOG_SNRS]
    tables = [
        gather_documents(
            (
                with_noise(batch, time=time, seed=NOISE_SEED, index=index, before=before)
                for batch, before in with_before(plain)
            ),
            num_rows=config.train.micro_batch,
        )
        for index, time in enumerate(times, start=FIRST_INDEX)
    ]
    found: dict[str, float] = {}
    for log_snr, time, table, sums in zip(LOG_SNRS, times, tables, document_sums(host, tables), strict=True):
        factor = float(clean_scale(torch.tensor(time, dtype=torch.float64), objective=objective)) ** 2
        score = ratio(factor * sums[modality], table.count(lambda batch: velocity_scalars(batch, modality)))
        key = f"heldout/{modality}/x0_error_snr{log_snr}"
        found |= {key: score.value} | ({f"{key}_stderr": score.stderr} if math.isfinite(score.stderr) else {})
    return found
