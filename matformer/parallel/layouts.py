"""Which layouts a cluster allows, and which of them is expected to be fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matformer.config.check import RULES, check_next_latent, warn_short_run
from matformer.config.device import DeviceConfig
from matformer.config.schema import ParallelConfig, Recompute, RunConfig
from matformer.errors import ConfigError
from matformer.parallel.counts import Counts
from matformer.parallel.expected import Guess, expected_counts, heaviest_counts
from matformer.parallel.memory import RankMemory, worst_rank
from matformer.parallel.pipeline import bubble_share
from matformer.parallel.step_time import StepTime, Traffic, step_time, traffic

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
"""Each costs more time than the one before it, and saves more memory."""
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


@dataclass(frozen=True, slots=True)
class Load:
    """What microbatches of one size hold: of the mixture, and of each source alone."""

    mixed: Counts
    alone: list[Counts]


def load_of(config: RunConfig, guess: Guess) -> Load:
    """What only the microbatch decides."""
    return Load(expected_counts(config, guess), heaviest_counts(config, guess))


def estimate(config: RunConfig, load: Load, device: DeviceConfig) -> Estimate:
    """Memory of the worst rank under the worst source, time under the mixture."""
    memory = max((worst_rank(config, counts) for counts in load.alone), key=lambda one: one.peak)
    counts, parallel = load.mixed, config.parallel
    bubble = bubble_share(parallel.pp, virtual=parallel.virtual_stages, microbatches=config.microbatches)
    return Estimate(config, memory, step_time(config, counts, device), traffic(config, counts), bubble)


def estimates(config: RunConfig, guess: Guess, device: DeviceConfig, *, gpus: int) -> list[Estimate]:
    """Of every layout of `gpus` ranks that breaks no rule, the fastest first."""
    loads: dict[int, Load] = {}
    found: list[Estimate] = []
    for layout in allowed(config, gpus=gpus, device=device):
        size = layout.train.micro_batch
        if size not in loads:
            loads[size] = load_of(layout, guess)
        found += _recomputing(layout, loads[size], device)
    return sorted(found, key=lambda one: one.time.total)


def _recomputing(config: RunConfig, load: Load, device: DeviceConfig) -> Iterator[Estimate]:
    """A layout as it is, and computing again as much as it must so that it fits: more would only take longer."""
    for recompute in RECOMPUTES:
        one = _with_parallel(config, recompute=recompute)
        if broken(one):
            return
        found = estimate(one, load, device)
        yield found
        if found.fits(device):
            return


def _with_parallel(config: RunConfig, **keys: object) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=keys)})


def allowed(config: RunConfig, *, gpus: int, device: DeviceConfig) -> Iterator[RunConfig]:
    """The config under every layout that its rules allow, tensor parallelism inside a node, nothing computed again."""
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
    why = broken(_with_parallel(config, tp=1, pp=1, dp=gpus, virtual_stages=1, sequence_parallel=False))
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
            for virtual, zero_stage in _variants(pp, layers=layers):
                degrees = {"tp": tp, "pp": pp, "dp": gpus // (tp * pp)}
                how = {"virtual_stages": virtual, "zero_stage": zero_stage, "recompute": "none"}
                rest = {"sequence_parallel": tp > 1, "host": "megatron"}
                yield config.parallel.model_copy(update=degrees | how | rest)


def _variants(pp: int, *, layers: int) -> list[tuple[int, int]]:
    """(virtual stages, ZeRO stage): interleaved schedules for pipelines, more than ZeRO 1 for the others."""
    if pp == 1:
        return [(1, zero_stage) for zero_stage in (1, 2, 3)]
    return [(virtual, 1) for virtual in range(1, layers // pp + 1) if layers // pp % virtual == 0]


def _powers(largest: int) -> Iterator[int]:
    power = 1
    while power <= largest:
        yield power
        power *= 2
