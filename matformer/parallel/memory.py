"""Memory of one rank by what it is for, and its peak: arithmetic on the config, after how the hosts allocate.

State stands all the time. Over it lie three phases of a step, of which the largest is the peak: forward and backward
(activations, gradients, the bucket that reduces them), the update, and the average's step.
Sources of the hosts' shares: deepspeed 0.19, stage_1_and_2.py, bf16_optimizer.py, stage3.py; tests/ranks/test_memory.py
holds them to what ranks allocate.
"""

from __future__ import annotations

from dataclasses import dataclass

from matformer.config.schema import ModelConfig, ParallelConfig, RunConfig
from matformer.parallel import activations
from matformer.parallel.activations import FLOAT32, Core, Share
from matformer.parallel.counts import Counts
from matformer.parallel.parameters import kept
from matformer.parallel.parts import Table, atto_layer, parts

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default, which it takes anew every step whatever the model needs


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage: which parts it holds, of how many. layers: of the Atto."""

    number: int
    count: int
    layers: int

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def holds(self, part: str) -> bool:
        """Whether a part beside the Atto, by its name in `parts`, is here."""
        if part == "start" or part.startswith("preludio/"):
            return self.is_first
        return self.is_last and (part == "router" or part.startswith("coda/"))

    def in_flight(self, microbatches: int) -> int:
        """Microbatches whose activations wait here at once under 1F1B."""
        return min(self.count - self.number, microbatches)


def stages(config: RunConfig) -> list[Stage]:
    """One a pipeline rank, with the layers of all its stages."""
    pp, layers = config.parallel.pp, config.parallel.layers_of_stages(config.model.atto.layers)
    return [Stage(number, pp, sum(layers[number::pp])) for number in range(pp)]


def size_of(parallel: ParallelConfig) -> int:
    """Bytes of a number in the model's dtype."""
    return 2 if parallel.dtype == "bfloat16" else FLOAT32


def parameters_of_stage(model: ModelConfig, stage: Stage, *, tp: int) -> int:
    """Parameters that one rank of a stage computes with."""
    held = kept(list(atto_layer(model, Counts())), tp=tp) * stage.layers
    if stage.is_last:
        held += Table(model.atto.width).parameters  # the final norm
    return held + replicated_parameters(model, stage)


def replicated_parameters(model: ModelConfig, stage: Stage) -> int:
    """Of a stage's parts beside the Atto, which each rank of a tensor-parallel group holds whole."""
    return sum(kept(pieces, tp=1) for name, pieces in parts(model).items() if stage.holds(name))


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes. The first five stand all the time; the others in their phases."""

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
    one = _OneStage(config, number=number, own=number / parallel.dp, size=size_of(parallel))
    flying = stage.in_flight(config.microbatches)
    kept_once = activations_of(config, counts, stage, core=core)
    waiting = flying * kept_once
    passing = _passing(config.model, counts, stage, share=share_of(parallel, core=core))
    summed = _summed(config, stage)
    return RankMemory(
        weights=one.weights,
        masters=FLOAT32 * one.own,
        moments=moments * FLOAT32 * one.own,
        average=FLOAT32 * (one.own if parallel.zero_stage == 3 else number),
        buffers=one.buffers,
        gradients=one.gradients(accumulated=config.microbatches > flying),
        activations=waiting,
        passing=max(passing, summed - kept_once),
        update=one.update,
        averaging=FLOAT32 * number if one.size < FLOAT32 and parallel.zero_stage < 3 else 0.0,
    )


def worst_rank(config: RunConfig, counts: Counts, *, core: Core = "fused") -> RankMemory:
    """Of the stage with the largest peak."""
    return max((rank_memory(config, counts, stage, core=core) for stage in stages(config)), key=lambda one: one.peak)


def share_of(parallel: ParallelConfig, *, core: Core) -> Share:
    """What the activations of a rank of this plan are counted by."""
    return Share(parallel.tp, parallel.sequence_parallel, size_of(parallel), core)


def activations_of(config: RunConfig, counts: Counts, stage: Stage, *, core: Core) -> float:
    """Bytes that one microbatch keeps on a stage until its way back."""
    model, share = config.model, share_of(config.parallel, core=core)
    kept_here = stage.layers * activations.atto_layer(model, counts, share)
    kept_here += activations.view(model.atto, counts, share)
    by_part = activations.kept_by_part(model, counts, share)
    kept_here += sum(value for name, value in by_part.items() if stage.holds(name)) / share.tp
    return kept_here + share.size * counts.positions * model.atto.width / share.positions  # what leaves the layers


def _passing(model: ModelConfig, counts: Counts, stage: Stage, *, share: Share) -> float:
    """What the way back holds for a moment while hardly anything is freed yet.

    Under tensor parallelism the Code read a rank's share of the latents out of a buffer of all L x H.
    """
    if stage.is_last:
        exchanged = share.size * counts.positions * model.atto.width if share.tp > 1 else 0
        return 2 * activations.logits(model, counts.text) / share.tp + exchanged
    return 2 * share.size * counts.positions * model.atto.ffn_width / share.tp


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
        return FLOAT32 * self.own + self.size * self._bucket if self._zero == 3 else 0.0

    def gradients(self, *, accumulated: bool) -> float:
        """Beside activations at the largest. accumulated: of earlier microbatches, where there are any."""
        if self._keeps_float32_gradients:
            return 0.0
        if self._zero == 3:  # the graph keeps the weights that the forward gathered, the way back gathers them anew
            return 2 * self.size * self.number
        earlier = FLOAT32 * self.own if self._zero == 2 else self.size * self.number
        return self.size * self._bucket + (earlier if accumulated else 0.0)

    @property
    def update(self) -> float:
        if self._keeps_float32_gradients:  # flattened; sent as it is, in float32
            return FLOAT32 * self._bucket
        if self._zero == 3:
            return FLOAT32 * self.own
        return (self.size * (self.number + self._bucket)) if self._zero == 1 else 2 * FLOAT32 * self.own
