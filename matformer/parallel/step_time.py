"""Expected time of one step: products over a calibrated rate, bytes over calibrated links, and the pipeline's bubble.

Nothing overlaps here: the hosts reduce gradients after the schedule, and tensor-parallel sums stand in the way of the
next product. So this is an upper bound where a host hides some of it, as megatron does what an interleaved pipeline
sends. The update of an optimizer in the host's memory is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from matformer.config.device import DeviceConfig
from matformer.config.schema import Dtype, ModelConfig, ParallelConfig, RunConfig
from matformer.parallel.activations import FLOAT32, exchanged
from matformer.parallel.counts import Counts
from matformer.parallel.flops import added, flops_again, flops_by_part
from matformer.parallel.memory import LARGEST_BUCKET, Stage, different_stages, parameters_of_stage, size_of
from matformer.parallel.pipeline import sends

_flops_by_part = lru_cache(maxsize=64)(flops_by_part)  # a search asks the same of many layouts


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends in a step, by axis."""

    tensor: float
    context: float
    pipeline: float
    data: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step; again: products that the way back repeats; `share` of the peak in model FLOPs (MFU)."""

    compute: float
    again: float
    tensor: float
    context: float
    pipeline: float
    bubble: float
    data: float
    update: float
    share: float

    @property
    def total(self) -> float:
        sent = self.tensor + self.context + self.pipeline + self.data
        return self.compute + self.again + sent + self.bubble + self.update


def step_time(config: RunConfig, counts: Counts, device: DeviceConfig) -> StepTime:
    """Of the config's plan on these devices."""
    many, ranks = config.microbatches, different_stages(config)
    passes = [_pass(config, counts, stage, device) for stage in ranks]
    slowest = max(passes, key=sum)
    through_all = sum(alike * sum(one) for alike, one in zip(ranks.values(), passes, strict=True))
    pipeline = many * _pipeline_seconds(config, counts, device)
    data, update = _largest_ends(config, device)
    seconds = StepTime(
        compute=many * slowest.compute,
        again=many * slowest.again,
        tensor=many * slowest.tensor,
        context=many * slowest.context,
        pipeline=pipeline,
        bubble=(through_all - sum(slowest)) / config.parallel.virtual_stages,
        data=data,
        update=update,
        share=0.0,
    )
    total = config.parallel.dp * many * added(_flops_by_part(config.model, counts)).total
    share = total / (seconds.total * config.parallel.ranks * device.peak(config.parallel.dtype))
    return replace(seconds, share=share)


class _Pass(NamedTuple):
    """Seconds of one microbatch on a rank, forward and backward."""

    compute: float
    again: float
    tensor: float
    context: float


def _pass(config: RunConfig, counts: Counts, stage: Stage, device: DeviceConfig) -> _Pass:
    return _Pass(
        _compute(config, counts, stage, device),
        _again(config, counts, stage, device),
        _tensor_seconds(config, counts, stage, device),
        _context_seconds(config, counts, stage, device),
    )


def _rate(width: float, device: DeviceConfig, *, dtype: Dtype) -> float:
    """FLOPs a second of products of this width on one rank."""
    return device.peak(dtype) * device.achieved_share * width / (width + device.half_width)


def _link(device: DeviceConfig, *, ranks: int) -> float:
    """Bytes a second between ranks of which so many stand side by side: inside a node while they fit into one."""
    inside = ranks <= device.devices_a_node
    return (device.in_node_gb_s if inside else device.between_nodes_gb_s) * 1e9


def _compute(config: RunConfig, counts: Counts, stage: Stage, device: DeviceConfig) -> float:
    """Seconds of one microbatch's products on a stage, both ways; each rank that holds it has its part of the units."""
    model, ranks, dtype = config.model, config.parallel.share_ranks, config.parallel.dtype
    by_part = _flops_by_part(model, counts)
    atto = by_part["atto"].total * stage.layers / model.atto.layers / ranks
    seconds = atto / _rate(model.atto.width / config.parallel.tp, device, dtype=dtype)
    for name, flops in by_part.items():
        if stage.holds(name):
            seconds += flops.total / _rate(_width(model, name), device, dtype=dtype) / ranks
    return seconds


def _again(config: RunConfig, counts: Counts, stage: Stage, device: DeviceConfig) -> float:
    """Seconds of one microbatch's products on a stage that its way back repeats."""
    model, parallel = config.model, config.parallel
    flops = flops_again(model, counts, parallel.recompute) * stage.layers / model.atto.layers / parallel.share_ranks
    return flops / _rate(model.atto.width / parallel.tp, device, dtype=parallel.dtype)


def _width(model: ModelConfig, name: str) -> int:
    """Of the products of a part beside the Atto."""
    medium = name.split("/")[-1]
    return model.media[medium].coda_width if medium in model.media else model.text.width


def _boundary(config: RunConfig, counts: Counts) -> float:
    """Bytes of a context rank's part of the residual stream of one microbatch."""
    return counts.positions * config.model.atto.width * size_of(config.parallel) / config.parallel.cp


def traffic(config: RunConfig, counts: Counts) -> Traffic:
    """Of the rank that sends most."""
    many, parallel = config.microbatches, config.parallel
    ranks = different_stages(config)
    layers = max(stage.layers for stage in ranks)
    data = max(_reduced_bytes(config, stage) for stage in ranks)
    sent = _boundary(config, counts) / (parallel.tp if parallel.sequence_parallel else 1)
    return Traffic(
        tensor=many * layers * _layer_bytes(config, counts),
        context=many * layers * _exchanged_bytes(config, counts),
        pipeline=many * sends(parallel.pp, virtual=parallel.virtual_stages) * sent,
        data=data,
    )


def _layer_bytes(config: RunConfig, counts: Counts) -> float:
    """A layer and microbatch."""
    tp = config.parallel.tp
    return _layer_calls(config.parallel) * (tp - 1) / tp * _boundary(config, counts)


def _layer_calls(parallel: ParallelConfig) -> int:
    """Scatters and gathers of the stream over TP, of a layer and microbatch: four sums (two a way), two calls each.

    Under sequence parallelism two more gathers, of the norms' answers on the way back. What is computed again is summed
    again: the feed-forward, or both.
    """
    calls = 10 if parallel.sequence_parallel else 8
    return calls + {"none": 0, "selective": 2, "full": 4}[parallel.recompute]


def _tensor_seconds(config: RunConfig, counts: Counts, stage: Stage, device: DeviceConfig) -> float:
    if config.parallel.tp == 1:
        return 0.0
    rate = _link(device, ranks=config.parallel.tp)
    calls = _layer_calls(config.parallel)
    return stage.layers * (_layer_bytes(config, counts) / rate + calls * device.latency_us * 1e-6)


def _exchanged_bytes(config: RunConfig, counts: Counts) -> float:
    """A layer and microbatch: queries, keys, values to those who attend, the answer back; and all of it backwards.

    Under recompute once more, since the exchanges belong to the core of attention.
    """
    parallel, atto = config.parallel, config.model.atto
    numbers = exchanged(atto, tp=parallel.tp, cp=parallel.cp) + atto.width
    sent = counts.positions / parallel.cp * numbers / parallel.tp * size_of(parallel)
    return _exchanges(parallel) / 2 * sent * (parallel.cp - 1) / parallel.cp


def _exchanges(parallel: ParallelConfig) -> int:
    """All-to-alls over CP of a layer and microbatch."""
    return 4 if parallel.recompute == "none" else 6


def _context_seconds(config: RunConfig, counts: Counts, stage: Stage, device: DeviceConfig) -> float:
    if config.parallel.cp == 1:
        return 0.0
    rate = _link(device, ranks=config.parallel.share_ranks)
    latency = _exchanges(config.parallel) * device.latency_us * 1e-6
    return stage.layers * (_exchanged_bytes(config, counts) / rate + latency)


def _pipeline_seconds(config: RunConfig, counts: Counts, device: DeviceConfig) -> float:
    """A microbatch's stream sent on by each of a rank's stages, and its gradient sent back."""
    parallel = config.parallel
    if parallel.pp == 1:
        return 0.0
    sent = _boundary(config, counts) / (parallel.tp if parallel.sequence_parallel else 1)
    rate = _link(device, ranks=parallel.ranks)
    return 2 * parallel.virtual_stages * (sent / rate + device.latency_us * 1e-6)


def _reduced_bytes(config: RunConfig, stage: Stage) -> float:
    """A rank's bytes over CP x DP in a step: gradients reduced in float32, weights gathered (ZeRO 2 and 3: in each
    microbatch).
    """
    parallel, many = config.parallel, config.microbatches
    number, size = parameters_of_stage(config.model, stage, tp=parallel.tp), size_of(parallel)
    part = (parallel.reduce_ranks - 1) / parallel.reduce_ranks * number
    if parallel.zero_stage == 1:  # BF16_Optimizer sums all of them, the other sends each to its owner
        return part * (2 if size < FLOAT32 else 1) * FLOAT32 + part * size
    if parallel.zero_stage == 2:
        return many * part * FLOAT32 + part * size
    return many * part * (FLOAT32 + 2 * size)


def _largest_ends(config: RunConfig, device: DeviceConfig) -> tuple[float, float]:
    """Seconds of reducing and of the update, of the stage that takes longest."""
    ranks = different_stages(config)
    found = [(_data_seconds(config, stage, device), _update_seconds(config, stage, device)) for stage in ranks]
    return max(found, key=sum)


def _data_seconds(config: RunConfig, stage: Stage, device: DeviceConfig) -> float:
    parallel = config.parallel
    if parallel.reduce_ranks == 1:
        return 0.0
    rate = _link(device, ranks=parallel.ranks)
    number = parameters_of_stage(config.model, stage, tp=parallel.tp)
    calls = 2 * ceil(number / LARGEST_BUCKET) * (1 if parallel.zero_stage == 1 else config.microbatches)
    if parallel.zero_stage == 3:  # every matrix of a layer by itself, both ways
        calls += config.microbatches * stage.layers * 2 * 6
    return _reduced_bytes(config, stage) / rate + calls * device.latency_us * 1e-6


def _update_seconds(config: RunConfig, stage: Stage, device: DeviceConfig) -> float:
    """Masters, moments and gradients on the device read and written once, the average and the weights too."""
    parallel = config.parallel
    number = parameters_of_stage(config.model, stage, tp=parallel.tp)
    own = number / parallel.reduce_ranks
    average = own if parallel.zero_stage == 3 else number
    updated = 0 if parallel.offload_optimizer else own
    return (28 * updated + 16 * average) / (device.memory_gb_s * 1e9)
