"""What ranks are asked to do in parity tests. Everything crosses the pipe as numbers and arrays."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state

    from matformer.hosts import deepspeed as zero
    from matformer.hosts.hosted import MegatronHost
    from matformer.hosts.layout import to_global, to_local
    from matformer.hosts.megatron import run_schedule
    from matformer.hosts.megatron_groups import build_groups
    from matformer.hosts.megatron_layer import AttoNorm, HeadNorm, ModulatedLayer
    from matformer.hosts.replicated import ReplicatedWeights, SummedOverGroup

import matformer.engine.step as step_room
from matformer.checkpoint import manifest
from matformer.checkpoint.store import Checkpoint, newest_good, save
from matformer.config.schema import RunConfig
from matformer.data.loader import Loader
from matformer.engine.average import Average
from matformer.engine.gradients import gradient_row
from matformer.engine.loop import Run, build_model, build_stages, train
from matformer.engine.step import metrics_row, optimizer_step
from matformer.errors import TrainingError
from matformer.hosts.base import Host
from matformer.layers.precision import at_least_float32
from matformer.losses.total import total_loss
from matformer.parallel.groups import Groups
from matformer.parcels import Batch
from tests.made import SameBatches, plain_host

GlobalBatch = Sequence[Batch]  # the microbatches of one step, over all data-parallel ranks
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a few steps gave on one rank; gradients (of the first step) and weights: what this rank owns of them."""

    losses: list[float]
    norms: list[float]
    gradients: Arrays
    weights: Arrays


def train_plain(config: RunConfig, steps: Sequence[GlobalBatch]) -> Trained:
    """The reference: one rank, plain PyTorch, all microbatches."""
    torch.set_num_threads(1)
    return _train(plain_host(config), config, steps)


def train_ranks(config: RunConfig, steps: Sequence[GlobalBatch], fault: str = "") -> Trained:
    """The same under a layout; `fault` plants an error that the comparison must see."""
    with hosted(config) as host, FAULTS[fault](host):
        return _train(host, config, steps)


def evaluate_ranks(config: RunConfig, batches: Sequence[Batch]) -> list[Arrays]:
    """Each batch's sums by document, on the ranks that speak ([] elsewhere)."""
    with hosted(config) as host:
        sums = host.forward_only(batches)
        return [_arrays(one) for one in sums] if host.groups.speaks else []


def look_ranks(config: RunConfig, steps: Sequence[GlobalBatch]) -> tuple[dict[str, float], Trained]:
    """What the losses' gradients say in the first step, and then that step and the others."""
    with hosted(config) as host:
        row = gradient_row(host, share(steps[0], host.groups), config=config)
        return row, _train(host, config, steps)


def meet_nan(config: RunConfig, poisoned: GlobalBatch, sound: GlobalBatch) -> tuple[list[bool], bool, bool]:
    """A poisoned step, then a sound one: which were skipped, and whether each changed this rank's weights."""
    with hosted(config) as host:
        start = _arrays(host.state().weights)
        first = optimizer_step(host, share(poisoned, host.groups), config=config, step=0)
        between = _arrays(host.state().weights)
        second = optimizer_step(host, share(sound, host.groups), config=config, step=0)
        end = _arrays(host.state().weights)
        assert host.state().step == 1
        changed = [any(not np.array_equal(a[k], b[k]) for k in a) for a, b in ((start, between), (between, end))]
        return [first.skipped, second.skipped], changed[0], changed[1]


def meet_nan_for_ever(config: RunConfig, batches: GlobalBatch, folder: Path) -> str:
    """What a run says whose every step has these batches."""
    with hosted(config) as host:
        loader = cast(Loader, SameBatches([share(batches, host.groups)]))
        run = Run(config, host, loader, Average(host, decay=0.9), folder)
        with pytest.raises(TrainingError) as error:
            train(run, stopping=lambda: False, evaluate=lambda host: {})
        return str(error.value)


def share(batches: GlobalBatch, groups: Groups) -> GlobalBatch:
    """A rank's microbatches of a global batch."""
    return batches[groups.dp_rank :: groups.dp_size]


def _train(host: Host, config: RunConfig, steps: Sequence[GlobalBatch]) -> Trained:
    losses, norms, gradients = [], [], {}
    for number, batches in enumerate(steps):
        numbers = optimizer_step(host, share(batches, host.groups), config=config, step=number)
        assert not numbers.skipped
        losses.append(metrics_row(numbers, config)["loss"])
        norms.append(numbers.grad_norm)
        if number == 0 and config.train.optimizer == "adamw":
            first = host.state().moments["exp_avg"]
            gradients = _arrays({name: value / (1 - config.train.betas[0]) for name, value in first.items()})
    return Trained(losses, norms, gradients, _arrays(host.state().weights))


def accumulate(config: RunConfig, batches: GlobalBatch, planted: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """The gradient of a global batch as the optimizer gets it; and the same gradients of microbatches, in float32.

    planted: keys of DeepSpeed that are set otherwise than we do.
    """
    keys = zero.engine_config

    def planted_keys(config: RunConfig, *, parameters: int) -> dict[str, Any]:
        return {**keys(config, parameters=parameters), **planted}

    zero.engine_config = planted_keys
    try:
        with hosted(config) as host:
            expected = _added_by_hand(host, batches, config)
            optimizer_step(host, batches, config=config, step=0)
            first = host.state().moments["exp_avg"]
            return _arrays({name: value / (1 - config.train.betas[0]) for name, value in first.items()}), expected
    finally:
        zero.engine_config = keys


def _added_by_hand(host: MegatronHost, batches: GlobalBatch, config: RunConfig) -> Arrays:
    """Sum in float32 of each microbatch's gradients in bfloat16; the model alone, no engine."""
    objective, names = _objective(batches, config, groups=host.groups), dict(host.model.named_parameters())
    totals = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in names.items()}
    for batch in batches:
        loss = objective(host.model(batch))
        gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient
    pieces = (to_global(total, host.layouts[name], groups=host.groups) for name, total in totals.items())
    return _arrays({piece: tensor for each in pieces for piece, tensor in each})


def double_plain(config: RunConfig, batches: GlobalBatch) -> Arrays:
    """Every gradient of one global batch in float64, plain PyTorch."""
    torch.set_num_threads(1)
    host = plain_host(config)
    model = host.model.double()
    objective = _objective(batches, config, groups=host.groups)
    for batch in batches:
        objective(model(batch)).backward()
    return _arrays({name: parameter.grad for name, parameter in model.named_parameters()})


def double_gradients(config: RunConfig, batches: GlobalBatch) -> Arrays:
    """The same under a layout, through megatron's schedule and without DeepSpeed: what this rank owns."""
    torch.set_num_threads(1)
    host = MegatronHost(config)
    try:
        model = build_stages(host, config)
        host.lay_out(model)
        reference = plain_host(config).state().weights
        for name, parameter in model.named_parameters():
            layout = host.layouts[name]
            pieces = {piece.name: reference[piece.name] for piece in layout.pieces}
            parameter.data = to_local(pieces, layout, groups=host.groups).double()
        for trunk in host.trunks:
            trunk.config.pipeline_dtype = torch.float64
        mine = share(batches, host.groups)
        objective = _objective(mine, config, groups=host.groups)
        run_schedule(host.stages, mine, trunks=host.trunks, ready=host.share, objective=objective, around=host.around)
        return _owned_gradients(host, model)
    finally:
        parallel_state.destroy_model_parallel()


def _objective(batches: GlobalBatch, config: RunConfig, *, groups: Groups) -> Callable[..., torch.Tensor]:
    counts, weights = step_room.global_counts(batches, groups), step_room.loss_weights(config)
    return lambda sums: total_loss(sums, counts=counts, weights=weights)


def _owned_gradients(host: MegatronHost, model: torch.nn.Module) -> Arrays:
    owner, found = host.groups.reduce_rank == 0 and host.groups.tp_rank == 0, {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if host.groups.reduce_size > 1:
            torch.distributed.all_reduce(gradient, group=host.groups.reduce)
        for piece, tensor in to_global(gradient, host.layouts[name], groups=host.groups):
            if owner:
                found[piece] = tensor
    return _arrays(found)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: at_least_float32(tensor.detach()).numpy().copy() for name, tensor in tensors.items()}


@contextmanager
def hosted(config: RunConfig) -> Iterator[MegatronHost]:
    """A host with stirred weights; afterwards the groups are taken down, so that the next layout can begin."""
    torch.set_num_threads(1)
    host = MegatronHost(config)
    build_model(host, config)
    reference = dict(plain_host(config).state().weights)

    def read(keys: Sequence[str]) -> dict[str, torch.Tensor]:
        found = {}
        for key in keys:
            kind, name = key.split("/", 1)
            found[key] = reference[name] if kind == "weights" else torch.zeros_like(reference[name])
        return found

    host.load(read, step=0)
    try:
        yield host
    finally:
        host.engine.destroy()
        parallel_state.destroy_model_parallel()


@contextmanager
def no_fault(host: MegatronHost) -> Iterator[None]:
    """As it is."""
    yield


@contextmanager
def head_norms_apart(host: MegatronHost) -> Iterator[None]:
    """Query and key norms keep the gradient of their own heads: no sum over TP."""
    for module in host.model.modules():
        if isinstance(module, HeadNorm):
            module.shared = False
    yield


@contextmanager
def stream_norms_apart(host: MegatronHost) -> Iterator[None]:
    """Under sequence parallelism the residual stream's norms keep the gradient of their own positions."""
    for module in host.model.modules():
        if isinstance(module, AttoNorm) and not isinstance(module, HeadNorm):
            module.shared = False
    yield


@contextmanager
def modulations_apart(host: MegatronHost) -> Iterator[None]:
    """Under sequence parallelism modulations by time keep the gradient of their own positions."""
    for module in host.model.modules():
        if isinstance(module, ModulatedLayer):
            module.shared = False
    yield


@contextmanager
def means_of_ranks(host: MegatronHost) -> Iterator[None]:
    """Each rank divides by its own counts; then ranks are averaged: wrong wherever counts differ."""
    counted = step_room.global_counts

    def local_counts(batches: Sequence[Batch], groups: Groups) -> dict[str, float]:
        return {name: value * groups.dp_size for name, value in counted(batches, Groups()).items()}

    step_room.global_counts = local_counts
    try:
        yield
    finally:
        step_room.global_counts = counted


@contextmanager
def encoders_apart(host: MegatronHost) -> Iterator[None]:
    """Preludi and Code keep the gradient of their own share of the units: no sum over TP."""
    host.replicated = None
    yield


@contextmanager
def encoders_averaged(host: MegatronHost) -> Iterator[None]:
    """Their gradient is the mean over TP."""
    summed = SummedOverGroup.backward

    def averaged(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *(None if x is None else x / host.groups.tp_size for x in summed(ctx, *gradients)[1:]))

    SummedOverGroup.backward = staticmethod(averaged)
    try:
        yield
    finally:
        SummedOverGroup.backward = staticmethod(summed)


@contextmanager
def coda_without_gradient(host: MegatronHost) -> Iterator[None]:
    """On rank 1 the pictures' Coda says the same, but outside the graph: its weights get no gradient there."""
    if host.groups.rank == 1:
        coda = host.model.get_submodule("code.image")
        coda.forward = torch.no_grad()(coda.forward)
    yield


FAULTS: dict[str, Callable[[MegatronHost], contextmanager]] = {  # pyright: ignore
    "": no_fault,
    "head norms apart": head_norms_apart,
    "stream norms apart": stream_norms_apart,
    "modulations apart": modulations_apart,
    "means of ranks": means_of_ranks,
    "encoders apart": encoders_apart,
    "encoders averaged": encoders_averaged,
    "coda without gradient": coda_without_gradient,
}


def train_and_save(config: RunConfig, steps: Sequence[GlobalBatch], folder: Path) -> float:
    """Train under a layout with an average beside, save; the loss of the step that would come next."""
    with hosted(config) as host:
        average = Average(host, decay=0.9)
        for number, batches in enumerate(steps[:-1]):
            optimizer_step(host, share(batches, host.groups), config=config, step=number)
            average.update(number + 1)
        state = host.state()
        tensors = {f"weights/{name}": value for name, value in state.weights.items()}
        for moment, values in state.moments.items():
            tensors |= {f"{moment}/{name}": value for name, value in values.items()}
        tensors |= {f"ema/{name}": value for name, value in average.state().items()}
        save(folder, state.step, tensors=tensors, state={"step": state.step}, keep=2)
        numbers = optimizer_step(host, share(steps[-1], host.groups), config=config, step=len(steps) - 1)
        return metrics_row(numbers, config)["loss"]


def sizes_of_state(config: RunConfig) -> list[int]:
    """Numbers in each tensor that this rank is to write: weights, moments and average."""
    with hosted(config) as host:
        state, average = host.state(), Average(host, decay=0.9).state()
        parts = [state.weights, *state.moments.values(), average]
        return [value.numel() for part in parts for value in part.values()]


def save_and_read_again(config: RunConfig, folder: Path) -> tuple[list[str], list[str], Path | None, Path | None]:
    """What this rank digested of a checkpoint's files, writing and then seeking it, and what was found.

    Last, what is found of two checkpoints once a file of the newer is damaged.
    """
    seen: list[str] = []
    taken = manifest.digest

    def digest_seen(path: Path) -> str:
        seen.append(path.name)
        return taken(path)

    with hosted(config) as host:
        tensors = {f"weights/{name}": value for name, value in host.state().weights.items()}
        save(folder, 1, tensors=tensors, state={}, keep=2)
        manifest.digest = digest_seen
        try:
            newest = save(folder, 2, tensors=tensors, state={}, keep=2)
            written = list(seen)
            seen.clear()
            found = newest_good(folder)
            read = list(seen)
        finally:
            manifest.digest = taken
        torch.distributed.barrier()
        if host.groups.rank == 0:
            last = max(newest.glob("*.safetensors"))
            last.write_bytes(last.read_bytes()[:-1])
        torch.distributed.barrier()
        return written, read, found, newest_good(folder)


def load_and_show(config: RunConfig, path: Path, batches: GlobalBatch, step: int) -> tuple[dict[str, Arrays], float]:
    """Load a checkpoint under a layout: what this rank owns of it, and the loss of the next step."""
    with hosted(config) as host:
        return show_loaded(host, config, path, batches, step)


def show_loaded(
    host: Host, config: RunConfig, path: Path, batches: GlobalBatch, step: int
) -> tuple[dict[str, Arrays], float]:
    """The same for a host that is there."""
    average = Average(host, decay=0.9)
    checkpoint = Checkpoint(path)
    host.load(checkpoint.read, step=checkpoint.state["step"])
    average.load(checkpoint.read)
    state = host.state()
    held = {"weights": _arrays(state.weights), "ema": _arrays(average.state())}
    held |= {moment: _arrays(values) for moment, values in state.moments.items()}
    numbers = optimizer_step(host, share(batches, host.groups), config=config, step=step)
    return held, metrics_row(numbers, config)["loss"]


def order_of_work(config: RunConfig, batches: GlobalBatch) -> list[str]:
    """What a rank does in a step: "share" of a microbatch taken, "forward" of its first stage begun."""
    with hosted(config) as host:
        done: list[str] = []
        take = host.share

        def share_seen(batch: Batch) -> Batch:
            done.append("share")
            return take(batch)

        host.share = share_seen
        host.stages[0].register_forward_pre_hook(lambda *_: done.append("forward"))
        optimizer_step(host, share(batches, host.groups), config=config, step=0)
        return done


def patience_of_groups(config: RunConfig) -> dict[str, float]:
    """Seconds after which a collective gives up, of every group that this process is in once the engine stands."""
    with hosted(config):
        groups = torch.distributed.distributed_c10d._world.pg_map  # pyright: ignore - no public list
        backends = {group.group_desc or group.group_name: group._get_backend(torch.device("cpu")) for group in groups}
        return {name: one.options._timeout.total_seconds() for name, one in backends.items()}


def sleep_on_rank_one(seconds: float) -> int:
    """For the launcher's own test."""
    if os.environ["RANK"] == "1":
        time.sleep(seconds)
    return int(os.environ["RANK"])


def raise_on_rank_one() -> None:
    """For the launcher's own test."""
    if os.environ["RANK"] == "1":
        raise ValueError("planted")


def sum_of_two_orders(config: RunConfig) -> bool:
    """Whether the hooks' sum of a gradient is right on this rank, where one rank's lies in memory channels last."""
    groups = build_groups(config.parallel)
    try:
        module = torch.nn.Conv2d(3, 2, 2, bias=False)
        assert groups.tp is not None
        ReplicatedWeights([module], group=groups.tp).sum_by_hooks()
        gradient = torch.arange(24.0).view(2, 3, 2, 2)
        mine = gradient.to(memory_format=torch.channels_last) if groups.tp_rank else torch.zeros(2, 3, 2, 2)
        module.weight.backward(mine)
        return module.weight.grad is not None and torch.equal(module.weight.grad, gradient)
    finally:
        parallel_state.destroy_model_parallel()
