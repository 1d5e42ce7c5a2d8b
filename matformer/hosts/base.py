"""What we ask of a host: build this rank's part of the Atto, run a step over microbatches, show and take weights."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matformer.config.schema import RunConfig
from matformer.errors import CheckpointError
from matformer.layers.attention import AttoView
from matformer.parallel.groups import Groups
from matformer.parcels import Batch, Exchange

Sums = dict[str, Tensor]
Placed = tuple[Tensor, Tensor]  # rows [R, H], and their places [R]
Objective = Callable[[Mapping[str, Tensor]], Tensor]
Reader = Callable[[Sequence[str]], Mapping[str, Tensor]]


class Trunk(nn.Module, ABC):
    """The layers of one pipeline stage of the Atto. is_first: the Preludi stand before it; is_last: the Code behind."""

    is_first: bool = True
    is_last: bool = True

    @abstractmethod
    def forward(self, hidden: Tensor | None, view: AttoView, exchange: Exchange | None = None) -> Tensor:
        """Latents of all positions in on the first stage (None elsewhere), and out on the last (else what is sent on).

        In and out are `[L, H]`, L = B * S in flat order. With an exchange only this rank's chunk of them enters, and
        positions that this rank does not read leave as zeros.
        """

    def bring(self, rows: Float[Tensor, "R H"], slots: Int[Tensor, " R"], exchange: Exchange | None) -> Placed:
        """Rows that Preludi made and their flat positions -> the rows that stand in what enters here, and where.

        Collective over TP where there is an exchange.
        """
        assert exchange is None, "one rank shares nothing out"
        return rows, slots

    @abstractmethod
    def receive(self, tensor: Tensor | None) -> None:
        """Take what the stage before sent."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step. sums: this rank's totals over its microbatches, by part ({} off the last stage)."""

    sums: Sums
    grad_norm: float
    skipped: bool


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """A parameter of one of the Atto's layers, counted from 0 over all stages. sharded: TP ranks hold parts of it."""

    layer: int
    parameter: nn.Parameter
    sharded: bool


@dataclass(frozen=True, slots=True)
class TrainingState:
    """All tensors of a checkpoint by global parameter name: float32, on the CPU, what this rank is to write."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    step: int


class Host(ABC):
    """One rank's engine: schedule, gradient reduction, optimizer and sharded state behind one face."""

    groups: Groups

    @abstractmethod
    def build_trunks(self) -> list[Trunk]:
        """This rank's layers, weights not yet drawn; several under an interleaved schedule, a trunk a stage."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Draw the weights by global name, build optimizer and sharded state around this rank's stage.

        model: what was built around the trunk, or an nn.ModuleList of what was built around each of several.
        """

    @abstractmethod
    def train_step(self, batches: Sequence[Batch], *, objective: Objective, lr: float) -> StepResult:
        """Forward and backward over the microbatches, reduce, clip, one optimizer step. Collective."""

    @abstractmethod
    def forward_only(self, batches: Sequence[Batch]) -> list[Sums]:
        """Per-document sums of each microbatch, on the last stage ([] elsewhere). Collective."""

    @abstractmethod
    def sums_with_graph(self, batch: Batch) -> Sums:
        """Per-document sums of a microbatch, for `torch.autograd.grad` on the Atto's weights, which are whole.

        What the optimizer reduces is not touched. Over TP each rank's sums are those of its share.

        For pp 1 and ZeRO 1 or 2: the stage runs alone, on whole weights. Collective over TP.
        """

    @abstractmethod
    def layer_weights(self) -> list[LayerWeight]:
        """The parameters of this rank's layers of the Atto, in the same order on every rank of a stage."""

    @abstractmethod
    def state(self) -> TrainingState:
        """Global tensors, gathered; each is held by one rank of the world, on the CPU. Collective."""

    @abstractmethod
    def load(self, read: Reader, *, step: int) -> None:
        """Take weights and moments; `read(keys)` gives global float32 tensors (`weights/NAME`, `exp_avg/NAME`...)."""

    @abstractmethod
    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's stored weights (shards under ZeRO 3), live: writing to them changes the model."""

    @abstractmethod
    def gather_stored(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Global tensors from ones stored like the weights (an average of them). Collective; held as in `state`."""

    @abstractmethod
    def scatter_stored(self, read: Reader, key: str) -> dict[str, Tensor]:
        """The inverse: what this rank stores of the global tensors `key/NAME`, by the names of `local_weights`."""


def layer_of(name: str) -> int | None:
    """Which of the Atto's layers a global name belongs to; None for every other parameter."""
    match = re.match(r"atto\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def read_shaped(read: Reader, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
    """Global tensors of these shapes. Raises CheckpointError naming the first that has another."""
    found = read(list(shapes))
    for key, shape in shapes.items():
        if tuple(found[key].shape) != shape:
            raise CheckpointError(
                f"{key} must have shape {list(shape)}, the checkpoint holds {list(found[key].shape)}: it belongs to "
                "another model; change model.* back or choose another name"
            )
    return found


def build_optimizer(parameters: list[dict[str, object]], config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer of the config over parameter groups that name their own weight decay."""
    train = config.train
    if train.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=train.lr)
    return torch.optim.AdamW(parameters, lr=train.lr, betas=train.betas, eps=train.epsilon, fused=True)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices decay; norms, biases and embeddings do not."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() >= 2 and "embedding" not in name else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@contextmanager
def swapped(host: Host, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the host's stored weights are `values` (by the names of `local_weights`); after, what they were."""
    kept = {name: weight.clone() for name, weight in host.local_weights()}
    try:
        for name, weight in host.local_weights():
            weight.copy_(values[name])
        yield
    finally:
        for name, weight in host.local_weights():
            weight.copy_(kept[name])
