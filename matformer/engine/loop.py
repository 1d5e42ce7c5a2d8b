"""The training loop: batches in, steps done, numbers shown, checkpoints kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from matformer.checkpoint.store import Checkpoint, newest_good, save
from matformer.config.schema import RunConfig
from matformer.data.loader import Loader, merge_states
from matformer.engine.average import Average
from matformer.engine.gradients import gradient_row
from matformer.engine.step import StepNumbers, metrics_row, optimizer_step
from matformer.errors import TrainingError
from matformer.hosts.base import Host
from matformer.hosts.plain import PlainHost, plain_trunk
from matformer.model import Matformer
from matformer.observe.meters import Throughput
from matformer.observe.sinks import Sink
from matformer.parallel.groups import Groups, everybody
from matformer.parcels import Batch

log = logging.getLogger(__name__)


def build_host(config: RunConfig) -> Host:
    """The host of the config; the real one is imported only where it is asked for."""
    if config.parallel.host == "plain":
        return PlainHost(config)
    from matformer.hosts.hosted import MegatronHost

    return MegatronHost(config)


def build_stages(host: Host, config: RunConfig) -> nn.Module:
    """This rank's stage, or an nn.ModuleList of its stages; weights not yet drawn."""
    stages = [Matformer(config.model, trunk=trunk) for trunk in host.build_trunks()]
    return stages[0] if len(stages) == 1 else nn.ModuleList(stages)


def build_model(host: Host, config: RunConfig) -> nn.Module:
    """The same with its weights drawn, inside its host."""
    model = build_stages(host, config)
    host.prepare(model)
    return model


def num_parameters(config: RunConfig) -> int:
    """Parameters of the whole model, whatever is sharded; counted without memory."""
    with torch.device("meta"):
        model = Matformer(config.model, trunk=plain_trunk(config.model))
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass
class Run:
    """All that moves during training, on one rank.

    owes_heldout: a stop left out the held-out numbers of this step. skipped: steps in a row that were, up to this one.
    """

    config: RunConfig
    host: Host
    loader: Loader
    average: Average
    checkpoints: Path
    sinks: Sequence[Sink] = ()
    throughput: Throughput = field(default_factory=Throughput)
    step: int = 0
    saved_step: int = -1
    owes_heldout: bool = False
    skipped: int = 0

    def resume(self) -> bool:
        """Take the newest good checkpoint, if there is one. Collective."""
        path = newest_good(self.checkpoints)
        if path is None:
            return False
        checkpoint = Checkpoint(path)
        state = checkpoint.state
        self.host.load(checkpoint.read, step=state["optimizer_step"])
        self.average.load(checkpoint.read)
        self.loader.load_state(state["loader"])
        self.throughput.load_state(state["throughput"])
        self.step = self.saved_step = state["step"]
        self.skipped = state.get("skipped", 0)  # older checkpoints have no such number
        return True

    def save(self) -> None:
        """Write a checkpoint of the steps done so far. Collective."""
        if self.saved_step == self.step:
            return
        training = self.host.state()
        tensors = {f"weights/{name}": value for name, value in training.weights.items()}
        tensors |= {f"{key}/{name}": value for key, part in training.moments.items() for name, value in part.items()}
        tensors |= {f"ema/{name}": value for name, value in self.average.state().items()}
        state = {
            "step": self.step,
            "optimizer_step": training.step,
            "loader": merge_states(everybody(self.loader.state())),
            "throughput": self.throughput.state(),
            "skipped": self.skipped,
        }
        save(self.checkpoints, self.step, tensors=tensors, state=state, keep=self.config.run.keep_checkpoints)
        self.saved_step = self.step

    def show(self, row: dict[str, float]) -> None:
        """Hand a row to whoever shows or keeps it."""
        for sink in self.sinks:
            sink.update(self.step, row)


def agreed(value: Any, groups: Groups) -> Any:  # noqa: ANN401 - any picklable value
    """Rank 0's value on every rank. Collective."""
    if groups.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def train(run: Run, *, stopping: Callable[[], bool], evaluate: Callable[[Host], dict[str, float]]) -> bool:
    """Steps until the last one or until some rank is asked to stop; saves at the end. True if all steps are done and
    nobody asked. Collective.

    Raises TrainingError, on all ranks, after run.max_skipped_steps skipped in a row, or if every step was skipped.
    """
    config = run.config
    stopped = False
    if run.owes_heldout:
        run.show(held_out(run, evaluate))
    while run.step < config.train.steps and not stopped:
        began = time.monotonic()
        batches = run.loader.next_global_batch(run.step)
        gradients, aside = look_at_gradients(run, batches)
        numbers = optimizer_step(run.host, batches, config=config, step=run.step, stop=stopping())
        follow(run, numbers)
        run.step += 1
        row = step_row(run, numbers, seconds=time.monotonic() - began - aside) | gradients
        stopped, last = numbers.stop, run.step == config.train.steps
        learns = run.skipped < min(config.run.max_skipped_steps, config.train.steps)
        if stopped and learns:
            run.save()  # before all else: who asks may not wait long
        if last or due(run.step, config.run.log_every_steps) or gradients:
            run.show(row)
        if not learns:
            raise _learns_nothing(run)
        if last or (due(run.step, config.eval.every_steps) and not stopped):
            run.show(held_out(run, evaluate))
        if due(run.step, config.run.save_every_steps):
            run.save()
    run.save()
    return run.step >= config.train.steps and not stopped


def held_out(run: Run, evaluate: Callable[[Host], dict[str, float]]) -> dict[str, float]:
    """Held-out numbers of the weights (`heldout/...`) and of their average (`heldout_ema/...`). Collective."""
    row = evaluate(run.host)
    with run.average.swapped_in():
        averaged = evaluate(run.host)
    return row | {name.replace("heldout/", "heldout_ema/", 1): value for name, value in averaged.items()}


def look_at_gradients(run: Run, batches: Sequence[Batch]) -> tuple[dict[str, float], float]:
    """What the losses' gradients say to each other in the coming step, if it is due, and the seconds it took."""
    if not due(run.step + 1, run.config.run.gradients_every_steps):
        return {}, 0.0
    began = time.monotonic()
    return gradient_row(run.host, batches, config=run.config), time.monotonic() - began


def follow(run: Run, numbers: StepNumbers) -> None:
    """What follows an optimizer step: the average, unless the step was skipped by all ranks together."""
    if numbers.skipped:
        run.skipped += 1
        log.warning("step %d was skipped: its gradient norm is not finite", run.step)
    else:
        run.skipped = 0
        run.average.update(run.step + 1)


def _learns_nothing(run: Run) -> TrainingError:
    saved = "no checkpoint was written" if run.saved_step < 0 else f"the checkpoint of step {run.saved_step} stays"
    return TrainingError(
        f"the gradient norm must be finite at least once in {run.skipped} steps, got none in steps "
        f"{run.step - run.skipped + 1} to {run.step}; {saved}; change train.lr, train.warmup_steps or parallel.dtype "
        "and set run.resume=branch, or raise run.max_skipped_steps"
    )


def step_row(run: Run, numbers: StepNumbers, *, seconds: float) -> dict[str, float]:
    """The numbers of a step; what it saw is added to the run's totals."""
    return metrics_row(numbers, run.config) | run.throughput.step(seconds, **amounts(numbers, run.config))


def amounts(numbers: StepNumbers, config: RunConfig) -> dict[str, float]:
    """What a step saw: raw bytes, positions of the Atto, and noised patches of each modality."""
    counts, media = numbers.counts, config.model.media
    patches = {f"{name}/patches": counts[name] / one.patch_scalars for name, one in media.items()}
    return {"bytes": counts["bytes"], "latents": counts["latents"], **patches}


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0 is never."""
    return every > 0 and step % every == 0
