"""One optimizer step, and the numbers it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from matformer.config.schema import RunConfig
from matformer.engine.optim import learning_rate
from matformer.hosts.base import Host, Sums
from matformer.losses.total import total_loss
from matformer.parallel.groups import Groups, sum_over_world
from matformer.parcels import Batch, Kind

METRIC_SUMS = ("router_right", "span_ends", "span_ends_right")


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """Sums of one global batch over all ranks. stop: some rank was asked to stop."""

    sums: dict[str, float]
    counts: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool
    stop: bool


def loss_weights(config: RunConfig) -> dict[str, float]:
    """The weight of every part of the loss, by its name."""
    weights = config.train.loss_weights
    media = {name: weights.by_modality.get(name, weights.media) for name in config.model.media}
    return {"text": weights.text, **media, "router": weights.router}


def global_counts(batches: Sequence[Batch], groups: Groups) -> dict[str, float]:
    """Terms of every loss, bytes, positions and FLOPs of the global batch, and most FLOPs of a rank: known before the
    forward. Collective over DP.
    """
    rows = [
        {
            **batch.counts(),
            "bytes": float(batch.num_bytes),
            "latents": float((batch.grid.kind_BS != Kind.PAD).sum()),
            "flops": float(batch.flops),
        }
        for batch in batches
    ]
    names = list(rows[0])
    totals = torch.tensor([sum(row[name] for row in rows) for name in names], dtype=torch.float64)
    most = totals[names.index("flops")].clone()
    if groups.dp_size > 1:
        totals, most = on_comm_device(totals), on_comm_device(most)
        dist.all_reduce(totals, group=groups.dp)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=groups.dp)
    return dict(zip(names, totals.tolist(), strict=True)) | {"most_flops": float(most)}


def on_comm_device(values: Tensor) -> Tensor:
    """Where this world's collectives take tensors."""
    return values.cuda() if dist.is_initialized() and dist.get_backend() == "nccl" else values


def optimizer_step(
    host: Host, batches: Sequence[Batch], *, config: RunConfig, step: int, stop: bool = False
) -> StepNumbers:
    """Step number `step` (from 0) over this rank's microbatches. Collective."""
    counts = global_counts(batches, host.groups)
    weights = loss_weights(config)

    def objective(sums: Mapping[str, Tensor]) -> Tensor:
        return total_loss(sums, counts=counts, weights=weights)

    lr = learning_rate(config.train, step)
    result = host.train_step(batches, objective=objective, lr=lr)
    names = (*weights, *METRIC_SUMS)
    sums, stopping = world_sums(result.sums, names, groups=host.groups, stop=stop)
    return StepNumbers(sums, counts, result.grad_norm, lr, result.skipped, stopping)


def world_sums(sums: Sums, names: Sequence[str], *, groups: Groups, stop: bool) -> tuple[dict[str, float], bool]:
    """Totals over the ranks that hold them, and whether any rank wants to stop. Collective."""
    mine = [float(sums[name]) for name in names] if groups.speaks else [0.0] * len(names)
    totals = sum_over_world(on_comm_device(torch.tensor([*mine, float(stop)], dtype=torch.float64)), groups).tolist()
    return dict(zip(names, totals[:-1], strict=True)), totals[-1] > 0


def metrics_row(numbers: StepNumbers, config: RunConfig) -> dict[str, float]:
    """What a step writes into metrics.jsonl, times and rates apart. A modality absent from the batch has no entry."""
    sums, counts = numbers.sums, numbers.counts
    row: dict[str, float] = {
        "loss": sum(w * sums[name] / max(counts[name], 1.0) for name, w in loss_weights(config).items()),
        "grad_norm": numbers.grad_norm,
        "lr": numbers.lr,
    }
    if counts["bytes"]:
        row["text/bits_per_byte"] = sums["text"] / (math.log(2) * counts["bytes"])
        row["text/nats_per_symbol"] = sums["text"] / counts["text"]
    for name, media in config.model.media.items():
        if counts[name]:
            row[f"{name}/{media.loss_name}"] = sums[name] / counts[name]
    row["router/loss"] = sums["router"] / max(counts["router"], 1.0)
    row["router/accuracy"] = sums["router_right"] / max(counts["router"], 1.0)
    if sums["span_ends"]:
        row["router/span_end_accuracy"] = sums["span_ends_right"] / sums["span_ends"]
    if counts["flops"]:
        row["flops"] = counts["flops"]
        row["flops_max_over_mean"] = counts["most_flops"] * config.parallel.dp / counts["flops"]
    if numbers.skipped:
        row["skipped"] = 1.0
    return row
