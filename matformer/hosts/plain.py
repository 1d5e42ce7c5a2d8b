"""The same model in plain PyTorch on one rank: the reference in parity tests, the engine of sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matformer.config.schema import AttoConfig, ModelConfig, RunConfig
from matformer.config.time_conditioning import modulated_media
from matformer.hosts.base import (
    Host,
    LayerWeight,
    Objective,
    Reader,
    StepResult,
    Sums,
    TrainingState,
    Trunk,
    build_optimizer,
    layer_of,
    parameter_groups,
    read_shaped,
)
from matformer.layers.attention import AttoView, atto_attention
from matformer.layers.feed_forward import SwiGLU
from matformer.layers.initialise import initial_value
from matformer.layers.modulation import TimeModulation, modulate, rows_of_positions
from matformer.layers.norm import RMSNorm
from matformer.parallel.groups import Groups
from matformer.parcels import Batch, Exchange
from matformer.shapes import ATTO_PARTS

MOMENTS = ("exp_avg", "exp_avg_sq")


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys. Sources: GQA (Ainslie 2023); QK-norm (Henry 2020)."""

    def __init__(self, config: AttoConfig) -> None:
        super().__init__()
        self.head_size = config.width // config.heads
        self.query = nn.Linear(config.width, config.heads * self.head_size, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * self.head_size, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * self.head_size, bias=False)
        norm = (lambda: RMSNorm(self.head_size, config.norm_epsilon)) if config.qk_norm else nn.Identity
        self.query_norm, self.key_norm = norm(), norm()
        self.output = nn.Linear(config.heads * self.head_size, config.width, bias=False)

    def forward(self, x_BSH: Float[Tensor, "B S H"], view: AttoView) -> Float[Tensor, "B S H"]:
        heads = (*x_BSH.shape[:2], -1, self.head_size)
        query, key = self.query_norm(self.query(x_BSH).view(heads)), self.key_norm(self.key(x_BSH).view(heads))
        return self.output(atto_attention(query, key, self.value(x_BSH).view(heads), view=view).flatten(2))


class Layer(nn.Module):
    """One pre-norm layer of the Atto; `modulated`: told the times of media positions (AdaLN), others are as without.

    The gate is 1 + g with g = 0 at first, where DiT's is 0: a media position begins as in a layer without modulation.
    """

    def __init__(self, config: AttoConfig, *, modulated: bool = False) -> None:
        super().__init__()
        self.modulation = TimeModulation(config.width, parts=ATTO_PARTS) if modulated else None
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_epsilon)
        self.feed_forward = SwiGLU(config.width, config.ffn_width)

    def forward(self, x_BSH: Float[Tensor, "B S H"], view: AttoView) -> Float[Tensor, "B S H"]:
        if self.modulation is not None:
            return self._modulated(x_BSH, view)
        x_BSH = x_BSH + self.attention(self.attention_norm(x_BSH), view)
        return x_BSH + self.feed_forward(self.feed_forward_norm(x_BSH))

    def _modulated(self, x_BSH: Float[Tensor, "B S H"], view: AttoView) -> Float[Tensor, "B S H"]:
        assert self.modulation is not None and view.times is not None
        first, second = rows_of_positions(self.modulation(view.times.time_T), view.times.index_BS)
        shift, scale, gate = first
        normed = modulate(self.attention_norm(x_BSH), shift=shift, scale=scale)
        x_BSH = x_BSH + (1 + gate) * self.attention(normed, view)
        shift, scale, gate = second
        normed = modulate(self.feed_forward_norm(x_BSH), shift=shift, scale=scale)
        return x_BSH + (1 + gate) * self.feed_forward(normed)


@final
class PlainTrunk(Trunk):
    """All layers and the final norm; its parameter names are the global ones."""

    def __init__(self, config: AttoConfig, *, modulated: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, modulated=modulated) for _ in range(config.layers))
        self.final_norm = RMSNorm(config.width, config.norm_epsilon)

    def forward(
        self, hidden: Float[Tensor, "L H"] | None, view: AttoView, exchange: Exchange | None = None
    ) -> Float[Tensor, "L H"]:
        assert hidden is not None and exchange is None, "one stage on one rank: the Preludi are here, whole"
        x_BSH = hidden.view(*view.rows, -1)
        for layer in self.layers:
            x_BSH = layer(x_BSH, view)
        return self.final_norm(x_BSH).flatten(0, 1)

    def receive(self, tensor: Tensor | None) -> None:
        assert tensor is None, "one stage receives nothing"


def plain_trunk(model: ModelConfig) -> PlainTrunk:
    """The whole Atto of a model."""
    return PlainTrunk(model.atto, modulated=bool(modulated_media(model)))


@final
class PlainHost(Host):
    """One rank, torch's own optimizer."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.groups = Groups()
        self.steps = 0

    def build_trunks(self) -> list[Trunk]:
        return [self.build_trunk()]

    def build_trunk(self) -> Trunk:
        """All layers."""
        return plain_trunk(self.config.model)

    def prepare(self, model: nn.Module) -> None:
        draw_weights(model, self.config)
        self.model = model
        groups = parameter_groups(model, weight_decay=self.config.train.weight_decay)
        self.optimizer = build_optimizer(groups, self.config)

    def train_step(self, batches: Sequence[Batch], *, objective: Objective, lr: float) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        parts = []
        for batch in batches:
            sums = self.model(batch)
            objective(sums).backward()
            parts.append({name: value.detach().sum() for name, value in sums.items()})
        limit = self.config.train.clip or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        skipped = norm != norm or norm == float("inf")
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.steps += 1
        return StepResult(added(parts), norm, skipped)

    @torch.no_grad()
    def forward_only(self, batches: Sequence[Batch]) -> list[Sums]:
        return [self.model(batch) for batch in batches]

    def sums_with_graph(self, batch: Batch) -> Sums:
        return self.model(batch)

    def layer_weights(self) -> list[LayerWeight]:
        named = [(layer_of(name), parameter) for name, parameter in self.model.named_parameters()]
        return [LayerWeight(layer, parameter, sharded=False) for layer, parameter in named if layer is not None]

    def state(self) -> TrainingState:
        weights = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        moments = {
            key: {name: self.optimizer.state[p][key] for name, p in self.model.named_parameters()}
            for key in MOMENTS
            if self.optimizer.state
        }
        return TrainingState(weights, moments, self.steps)

    @torch.no_grad()
    def load(self, read: Reader, *, step: int) -> None:
        self.steps = step
        for name, parameter in self.model.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(read_shaped(read, {f"weights/{name}": shape})[f"weights/{name}"])
            if step and self.config.train.optimizer == "adamw":
                keys = [f"{moment}/{name}" for moment in MOMENTS]
                values = read_shaped(read, dict.fromkeys(keys, shape))
                state = {moment: values[key].clone() for moment, key in zip(MOMENTS, keys, strict=True)}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.data

    def gather_stored(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(stored)

    def scatter_stored(self, read: Reader, key: str) -> dict[str, Tensor]:
        shapes = {f"{key}/{name}": tuple(weight.shape) for name, weight in self.local_weights()}
        found = read_shaped(read, shapes)
        return {name: found[f"{key}/{name}"].clone() for name, _ in self.local_weights()}


@torch.no_grad()
def draw_weights(model: nn.Module, config: RunConfig) -> None:
    """Every parameter from the generator of its own (global) name."""
    depth = config.model.atto.layers
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), seed=config.seed, depth=depth))


def added(parts: Sequence[Mapping[str, Tensor]]) -> Sums:
    """Sum dictionaries of scalars key by key."""
    return {name: torch.stack([part[name] for part in parts]).sum() for name in (parts[0] if parts else {})}
