"""Memory of one rank by what it is for, and its peak: arithmetic on the config, after how the hosts allocate.

State stands all the time. Over it lie three phases of a step, of which the largest is the peak: forward and backward
(activations, gradients, the bucket that reduces them), the update, and the average's step. Saving is none: it gathers
one tensor at a time on the device. What stands in the host's memory is counted apart.
Sources of the hosts' shares: deepspeed 0.19, stage_1_and_2.py, bf16_optimizer.py, stage3.py; tests/ranks/test_memory.py
holds them to what ranks allocate.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from operator import mul

from matformer.config.schema import ModelConfig, ParallelConfig, RunConfig
from matformer.parallel import activations
from matformer.parallel.activations import FLOAT32, Core, Share
from matformer.parallel.counts import Counts
from matformer.parallel.parameters import kept, parameters_by_part
from matformer.parallel.parts import Table, atto_layer
from matformer.parallel.pipeline import waiting

_parameters_by_part = lru_cache(maxsize=8)(parameters_by_part)  # a search asks the same of many layouts
_kept_by_part = lru_cache(maxsize=64)(activations.kept_by_part)

MOST_WRITERS = 8  # of a stage's part of a checkpoint: as many files, as a rule from one node
LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default, which it takes anew every step whatever the model needs


@dataclass(frozen=True, slots=True)
class Stage:
    """What one of `count` pipeline ranks holds. chunks: layers of each of its stages, in running order."""

    number: int
    count: int
    chunks: tuple[int, ...]

    @property
    def layers(self) -> int:
        """Of the Atto, all together."""
        return sum(self.chunks)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def holds(self, part: str) -> bool:
        """Whether a part beside the Atto, by its name in `parts`, is here: in the first stage or the last of all."""
        if _enters(part):
            return self.is_first
        return self.is_last and (part == "router" or part.startswith("coda/"))


def _enters(part: str) -> bool:
    return part == "start" or part.startswith("preludio/")


def stages(config: RunConfig) -> list[Stage]:
    """One a pipeline rank."""
    return _stages(config.parallel.pp, config.parallel.layers_of_stages(config.model.atto.layers))


def _stages(pp: int, layers: tuple[int, ...]) -> list[Stage]:
    return [Stage(number, pp, layers[number::pp]) for number in range(pp)]


def different_stages(config: RunConfig) -> Counter[Stage]:
    """How many ranks hold the same as these: of each kind the first, where most microbatches wait."""
    parallel = config.parallel
    return _different_stages(parallel.pp, parallel.layers_of_stages(config.model.atto.layers), config.microbatches)


@lru_cache(maxsize=8)  # asked several times of each layout
def _different_stages(pp: int, layers: tuple[int, ...], microbatches: int) -> Counter[Stage]:
    found: dict[tuple[object, ...], list[Stage]] = {}
    for stage in _stages(pp, layers):
        accumulates = _accumulates(stage, virtual=len(layers) // pp, microbatches=microbatches)
        found.setdefault((stage.is_first, stage.is_last, stage.chunks, accumulates), []).append(stage)
    return Counter({alike[0]: len(alike) for alike in found.values()})


def _accumulates(stage: Stage, *, virtual: int, microbatches: int) -> bool:
    """Whether gradients of earlier microbatches are there while most activations wait."""
    flights = waiting(stage.count, stage.number, virtual=virtual, microbatches=microbatches)
    return any(sum(flight) < microbatches * virtual for flight in flights)


def size_of(parallel: ParallelConfig) -> int:
    """Bytes of a number in the model's dtype."""
    return 2 if parallel.dtype == "bfloat16" else FLOAT32


def parameters_of_stage(model: ModelConfig, stage: Stage, *, tp: int) -> int:
    """Parameters that one rank of a stage computes with."""
    held = _layer_parameters(model, tp) * stage.layers
    if stage.is_last:
        held += Table(model.atto.width).parameters  # the final norm
    return held + replicated_parameters(model, stage)


@lru_cache(maxsize=64)
def _layer_parameters(model: ModelConfig, tp: int) -> int:
    return kept(list(atto_layer(model, Counts())), tp=tp)


@lru_cache(maxsize=256)
def replicated_parameters(model: ModelConfig, stage: Stage) -> int:
    """Of a stage's parts beside the Atto, which each rank of a tensor-parallel group holds whole."""
    return sum(number for name, number in _parameters_by_part(model).items() if stage.holds(name))


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes. The first five stand all the time; the others in their phases.

    In the host's memory, not on the device: `host` all the time, `saving` while a checkpoint is written, by each rank
    that writes.
    """

    weights: float
    masters: float
    moments: float
    average: float
    buffers: float
    gradients: float
    activations: float
    passing: float
    update: float
    averaging: float
    host: float = 0.0
    saving: float = 0.0

    @property
    def state(self) -> float:
        return self.weights + self.masters + self.moments + self.average + self.buffers

    @property
    def phases(self) -> dict[str, float]:
        """Bytes held at most in each phase of a step."""
        return {
            "forward and backward": self.state + self.gradients + self.activations + self.passing,
            "update": self.state + self.update,
            "average": self.state + self.averaging,
        }

    @property
    def peak(self) -> float:
        return max(self.phases.values())


def rank_memory(config: RunConfig, counts: Counts, stage: Stage, *, core: Core = "fused") -> RankMemory:
    """Of a rank of this stage whose microbatches hold `counts`, with the optimizer of the config."""
    parallel = config.parallel
    number = parameters_of_stage(config.model, stage, tp=parallel.tp)
    moments = 2 if config.train.optimizer == "adamw" else 0
    one = _OneStage(config, number=number, own=number / parallel.reduce_ranks, size=size_of(parallel))
    kept_once = activations_of(config, counts, stage, core=core)
    schedule = {"virtual": parallel.virtual_stages, "microbatches": config.microbatches}
    passing = _passing(config.model, counts, stage, share=share_of(parallel, core=core))
    freed = kept_once[0 if stage.is_first else -1]  # of the stage that has replicated weights, where there are any
    on_device = 0 if parallel.offload_optimizer else FLOAT32 * one.own
    return RankMemory(
        weights=one.weights,
        masters=on_device,
        moments=moments * on_device,
        average=FLOAT32 * (one.own if parallel.zero_stage == 3 else number),
        buffers=one.buffers,
        gradients=one.gradients(accumulated=_accumulates(stage, **schedule)),
        activations=max(sum(map(mul, flight, kept_once)) for flight in waiting(stage.count, stage.number, **schedule)),
        passing=max(passing, _summed(config, stage) - freed),
        update=one.update,
        averaging=FLOAT32 * number if one.size < FLOAT32 and parallel.zero_stage < 3 else 0.0,
        host=one.host(moments=moments),
        saving=FLOAT32 * (2 + moments) * parameters_of_stage(config.model, stage, tp=1) / writers(parallel),
    )


def writers(parallel: ParallelConfig) -> int:
    """Ranks that write a stage's part of a checkpoint, of those that hold it."""
    return min(MOST_WRITERS, parallel.tp * parallel.reduce_ranks)


def worst_rank(config: RunConfig, counts: Counts, *, core: Core = "fused") -> RankMemory:
    """Of the stage with the largest peak."""
    ranks = (rank_memory(config, counts, stage, core=core) for stage in different_stages(config))
    return max(ranks, key=lambda one: one.peak)


def share_of(parallel: ParallelConfig, *, core: Core) -> Share:
    """What the activations of a rank of this plan are counted by."""
    return Share(parallel.tp, parallel.cp, parallel.sequence_parallel, size_of(parallel), core, parallel.recompute)


def activations_of(config: RunConfig, counts: Counts, stage: Stage, *, core: Core) -> list[float]:
    """Bytes that one microbatch keeps on each of a rank's stages until its way back."""
    model, share = config.model, share_of(config.parallel, core=core)
    layer = activations.atto_layer(model, counts, share)
    beside = activations.view(model.atto, counts, share)
    beside += share.size * counts.positions * model.atto.width / share.positions  # what leaves the layers
    kept_here = [layers * layer + beside for layers in stage.chunks]
    for name, value in _kept_by_part(model, counts, share).items():
        if stage.holds(name):
            kept_here[0 if _enters(name) else -1] += value / share.ranks
    return kept_here


def _passing(model: ModelConfig, counts: Counts, stage: Stage, *, share: Share) -> float:
    """What the way back holds for a moment while hardly anything is freed yet: in the last layer, or before, in Code.

    Where ranks share out a microbatch, the Code read a rank's share of the latents out of a buffer of all L x H.
    """
    layer = 2 * share.size * counts.positions * model.atto.ffn_width / share.ranks
    layer += activations.made_again(model, counts, share)
    if not stage.is_last:
        return layer
    exchanged = share.size * counts.positions * model.atto.width if share.ranks > 1 else 0
    by_part = _kept_by_part(model, counts, share)
    code = sum(value for name, value in by_part.items() if not _enters(name)) / share.ranks
    return max(2 * activations.logits(model, counts.text) / share.ranks + exchanged, layer - code)


def _summed(config: RunConfig, stage: Stage) -> float:
    """At the end of the way back: gradients of the replicated weights, and the float32 bucket that sums them over TP.

    Source: hosts/replicated.py; under ZeRO 3 they are summed one by one.
    """
    parallel = config.parallel
    if parallel.tp == 1 or parallel.zero_stage == 3:
        return 0.0
    return (size_of(parallel) + FLOAT32) * replicated_parameters(config.model, stage)


@dataclass(frozen=True, slots=True)
class _OneStage:
    """The hosts' rules. number: parameters of the stage; own: those whose masters are here; size: of a weight."""

    config: RunConfig
    number: int
    own: float
    size: int

    @property
    def _zero(self) -> int:
        return self.config.parallel.zero_stage

    @property
    def _offloads(self) -> bool:
        return self.config.parallel.offload_optimizer

    @property
    def _keeps_float32_gradients(self) -> bool:
        """DeepSpeed's BF16_Optimizer: one flat float32 gradient for the stage, there all the time."""
        return self.size < FLOAT32 and self._zero == 1

    @property
    def _bucket(self) -> int:
        """Elements of the bucket that reduces gradients."""
        return min(self.number, LARGEST_BUCKET)

    @property
    def weights(self) -> float:
        return self.size * (self.own if self._zero == 3 else self.number)

    @property
    def buffers(self) -> float:
        """float32 gradients of BF16_Optimizer; ZeRO 3's flat gradients of its shards, and its bucket."""
        if self._keeps_float32_gradients:
            return FLOAT32 * self.number
        if self._zero != 3:
            return 0.0
        return self.size * self._bucket + (0.0 if self._offloads else FLOAT32 * self.own)

    def gradients(self, *, accumulated: bool) -> float:
        """Beside activations at the largest. accumulated: of earlier microbatches, where there are any."""
        if self._keeps_float32_gradients:
            return 0.0
        if self._zero == 3:  # the graph keeps the weights that the forward gathered, the way back gathers them anew
            return 2 * self.size * self.number
        earlier = FLOAT32 * self.own if self._zero == 2 else self.size * self.number
        return self.size * self._bucket + (earlier if accumulated and not self._offloads else 0.0)

    @property
    def update(self) -> float:
        if self._keeps_float32_gradients:  # flattened; sent as it is, in float32
            return FLOAT32 * self._bucket
        if self._offloads:
            return 0.0
        if self._zero == 3:
            return FLOAT32 * self.own
        return (self.size * (self.number + self._bucket)) if self._zero == 1 else 2 * FLOAT32 * self.own

    def host(self, *, moments: int) -> float:
        """Masters, moments, their gradients; ZeRO 2: sums of microbatches and the weights sent back; ZeRO 3: sums."""
        if not self._offloads:
            return 0.0
        return self.own * ((2 + moments) * FLOAT32 + (2 * self.size if self._zero == 2 else FLOAT32))
