"""What a training step costs: floating-point operations, parameters, CPU seconds, and the bytes it sees.

Counted are the products of torch's FlopCounterMode, forward and backward: every matrix of the local models, the Atto,
the heads, the router, and attention as computed (by tiles or whole). torch's fused attention on CPU is unknown to the
counter, so it runs as plain products while counting. Pooling and the Coda's reading of its latents are written without
matrix products; their two products are added in closed form. The entropy patchers' own model is counted forward.
Lookups and sums of embeddings, norms, rotary turns, softmax and the optimizer are not counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from matformer.coda.text import LatentReader
from matformer.config.schema import RunConfig
from matformer.data.entropy import entropies, load_entropy_model
from matformer.data.loader import Loader
from matformer.engine.loop import build_host, build_model, num_parameters
from matformer.engine.step import optimizer_step
from matformer.files import write_whole
from matformer.hosts.base import Host
from matformer.parallel.process import settle
from matformer.parcels import Batch
from matformer.preludio.text import Pool

Kind = TypeVar("Kind")

WARM_UP, TIMED, COUNTED, LOADED = 1, 5, 5, 100
"""Steps: not timed, timed, counted, and all that are loaded for the mean number of bytes."""


@dataclass(frozen=True)
class Cost:
    """Of one arm. flops_a_byte holds the patcher and the closed forms; *_share are parts of it."""

    parameters: int
    bytes_a_step: float
    bytes_a_sequence: float
    flops_a_step: float
    flops_a_byte: float
    atto_share: float
    unseen_share: float
    cpu_seconds_a_mb: float


@dataclass(frozen=True)
class MediaCost:
    """Of one arm that learns media: of a training step of the mixture."""

    parameters: int
    flops_a_step: float
    cpu_seconds_a_step: float


@dataclass(frozen=True)
class StepFlops:
    """Of one training step: what torch counts inside the Atto and outside, and what is added in closed form."""

    atto: int
    rest: int
    unseen: int


def cost_of(config: RunConfig, sample: Sequence[bytes]) -> Cost:
    """Measured in a process of its own, with one thread. sample: texts that the patcher is counted on."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_cost_of, (config, list(sample)))


def media_cost_of(config: RunConfig) -> MediaCost:
    """Measured in a process of its own, with one thread."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_media_cost_of, (config,))


def kept_cost(config: RunConfig, folder: Path, *, kind: type[Kind], measure: Callable[[], Kind]) -> Kind:
    """Measured once for a config: whatever changes the numbers names the file, the counting itself included."""
    tree = config.model_dump(mode="json", exclude={"name": True, "run": True, "eval": True})
    parts = [tree, torch.__version__, Path(__file__).read_text(encoding="utf-8")]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    file = folder / f"{config.name}-{name}.json"
    if not file.is_file():
        write_whole(file, json.dumps(vars(measure()), indent=1).encode())
    return kind(**json.loads(file.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Measured:
    """Of the first training steps: products of those that were counted, seconds of those that were timed, all bytes."""

    counted: list[StepFlops]
    seconds: list[float]
    num_bytes: list[int]


def _measured(config: RunConfig, *, loaded: int = 0) -> Measured:
    """Warm-up, timed steps, counted steps; then batches are loaded until there are `loaded`."""
    settle(1)
    host = build_host(config)
    model = build_model(host, config)
    loader = Loader(config, prefetch=False)
    num_bytes: list[int] = []

    def load() -> list[Batch]:
        batches = loader.next_global_batch(len(num_bytes))
        num_bytes.append(sum(batch.num_bytes for batch in batches))
        return batches

    seconds = []
    for step in range(WARM_UP + TIMED):
        began = time.process_time()
        optimizer_step(host, load(), config=config, step=step)
        seconds.append(time.process_time() - began)
    counted = [step_flops(host, model, load(), config=config, step=len(seconds)) for _ in range(COUNTED)]
    while len(num_bytes) < loaded:
        load()
    return Measured(counted, seconds, num_bytes)


def _media_cost_of(config: RunConfig) -> MediaCost:
    measured = _measured(config)
    flops = [one.atto + one.rest + one.unseen for one in measured.counted]
    return MediaCost(
        parameters=num_parameters(config),
        flops_a_step=statistics.fmean(flops),
        cpu_seconds_a_step=statistics.median(measured.seconds[WARM_UP:]),
    )


def _cost_of(config: RunConfig, sample: Sequence[bytes]) -> Cost:
    measured = _measured(config, loaded=LOADED)
    num_bytes, done = measured.num_bytes, WARM_UP + TIMED
    a_byte = [seconds / size for seconds, size in zip(measured.seconds, num_bytes, strict=False)]
    return _summed(
        measured.counted,
        bytes_a_step=statistics.fmean(num_bytes),
        counted_bytes=sum(num_bytes[done : done + COUNTED]),
        patcher=patcher_flops(config, sample),
        config=config,
        cpu_seconds_a_mb=1e6 * statistics.median(a_byte[WARM_UP:]),
    )


def _summed(
    counted: Sequence[StepFlops],
    *,
    bytes_a_step: float,
    counted_bytes: int,
    patcher: float,
    config: RunConfig,
    cpu_seconds_a_mb: float,
) -> Cost:
    """The Atto costs the same every step; all else goes with the bytes, of which a counted step has more or fewer."""
    atto = sum(one.atto for one in counted) / len(counted) / bytes_a_step
    unseen = sum(one.unseen for one in counted) / counted_bytes
    a_byte = atto + sum(one.rest for one in counted) / counted_bytes + unseen + patcher
    return Cost(
        parameters=num_parameters(config),
        bytes_a_step=bytes_a_step,
        bytes_a_sequence=bytes_a_step / config.train.global_batch,
        flops_a_step=a_byte * bytes_a_step,
        flops_a_byte=a_byte,
        atto_share=atto / a_byte,
        unseen_share=unseen / a_byte,
        cpu_seconds_a_mb=cpu_seconds_a_mb,
    )


def step_flops(host: Host, model: nn.Module, batches: Sequence[Batch], *, config: RunConfig, step: int) -> StepFlops:
    """Of one training step, which is done."""
    counter = FlopCounterMode(display=False)
    with _by_hand(model) as unseen, sdpa_kernel(SDPBackend.MATH), counter:
        optimizer_step(host, batches, config=config, step=step)
    atto = sum(counter.get_flop_counts()[f"{type(model).__name__}.atto"].values())
    return StepFlops(atto, counter.get_total_flops() - atto, sum(unseen))


@contextlib.contextmanager
def _by_hand(model: nn.Module) -> Iterator[list[int]]:
    """Collects the products of pooling and reading: scores and weighted sums, each 2 U H, and twice that backward."""
    found: list[int] = []

    def pooled(module: Any, inputs: tuple[Any, ...]) -> None:  # noqa: ANN401 - torch's contract
        found.append(12 * inputs[0].numel() * module.slots)

    def read(module: Any, inputs: tuple[Any, ...]) -> None:  # noqa: ANN401
        found.append(12 * inputs[0].numel() * inputs[1].shape[1])

    handles = [
        module.register_forward_pre_hook(pooled if isinstance(module, Pool) else read)
        for module in model.modules()
        if isinstance(module, Pool | LatentReader)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def patcher_flops(config: RunConfig, sample: Sequence[bytes]) -> float:
    """Of the model that says where patches begin, a byte; the other patchers have none."""
    if not config.data.patcher.kind.startswith("entropy"):
        return 0.0
    model = load_entropy_model(Path(config.data.patcher.entropy_model or ""))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        entropies(model, sample)
    return counter.get_total_flops() / sum(map(len, sample))
