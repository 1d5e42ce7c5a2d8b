"""Which layouts a cluster allows, and which of them is expected to be fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matformer.config.check import RULES, check_next_latent, warn_short_run
from matformer.config.device import DeviceConfig
from matformer.config.schema import ParallelConfig, RunConfig
from matformer.errors import ConfigError
from matformer.parallel.expected import Guess, expected_counts, heaviest_counts
from matformer.parallel.memory import RankMemory, worst_rank
from matformer.parallel.step_time import StepTime, Traffic, bubble_share, step_time, traffic

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
WARNING_RULES = (check_next_latent, warn_short_run)  # say the same of every layout


@dataclass(frozen=True, slots=True)
class Estimate:
    """One layout: the config with its plan and microbatch, and what is expected of it."""

    config: RunConfig
    memory: RankMemory
    time: StepTime
    traffic: Traffic
    bubble: float

    def fits(self, device: DeviceConfig) -> bool:
        return self.memory.peak <= device.usable_bytes


def estimate(config: RunConfig, guess: Guess, device: DeviceConfig) -> Estimate:
    """Memory of the worst rank under the worst source, time under the mixture."""
    memory = max((worst_rank(config, counts) for counts in heaviest_counts(config, guess)), key=lambda one: one.peak)
    counts = expected_counts(config, guess)
    return Estimate(config, memory, step_time(config, counts, device), traffic(config, counts), bubble_share(config))


def estimates(config: RunConfig, guess: Guess, device: DeviceConfig, *, gpus: int) -> list[Estimate]:
    """Of every layout of `gpus` ranks that breaks no rule, the fastest first."""
    found = [estimate(one, guess, device) for one in allowed(config, gpus=gpus, device=device)]
    return sorted(found, key=lambda one: one.time.total)


def allowed(config: RunConfig, *, gpus: int, device: DeviceConfig) -> Iterator[RunConfig]:
    """The config under every layout that its rules allow, tensor parallelism inside a node."""
    for parallel in _plans(config, gpus=gpus, device=device):
        share = config.train.global_batch // parallel.dp
        for micro_batch in MICRO_BATCHES:
            if micro_batch > share:
                break
            train = config.train.model_copy(update={"micro_batch": micro_batch})
            one = config.model_copy(update={"parallel": parallel, "train": train})
            if not broken(one):
                yield one


def no_layout(config: RunConfig, *, gpus: int) -> ConfigError:
    """Why no layout of `gpus` ranks is allowed: the rule that plain data parallelism breaks."""
    parallel = config.parallel.model_copy(update={"tp": 1, "pp": 1, "dp": gpus, "sequence_parallel": False})
    why = broken(config.model_copy(update={"parallel": parallel}))
    return ConfigError(f"some layout of {gpus} ranks must keep every rule, got none; of data parallelism alone: {why}")


def broken(config: RunConfig) -> str:
    """The first rule that a config breaks, as its sentence; empty if none."""
    for rule in RULES:
        try:
            if rule not in WARNING_RULES:
                rule(config)
        except ConfigError as error:
            return str(error)
    return ""


def _plans(config: RunConfig, *, gpus: int, device: DeviceConfig) -> Iterator[ParallelConfig]:
    layers = config.model.atto.layers
    for tp in _powers(min(gpus, device.devices_a_node)):
        for pp in (pp for pp in range(1, layers + 1) if layers % pp == 0 and gpus % (tp * pp) == 0):
            for zero_stage in (1, 2, 3) if pp == 1 else (1,):
                degrees = {"tp": tp, "pp": pp, "dp": gpus // (tp * pp), "zero_stage": zero_stage}
                rest = {"sequence_parallel": tp > 1, "host": "megatron"}
                yield config.parallel.model_copy(update=degrees | rest)


def _powers(largest: int) -> Iterator[int]:
    power = 1
    while power <= largest:
        yield power
        power *= 2
