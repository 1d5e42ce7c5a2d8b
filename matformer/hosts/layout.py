"""How this rank's tensors stand to the global ones: names, shards over TP, and megatron's fused matrices.

A layout cuts one local tensor into pieces, each a shard of one global tensor along `dim` (None: whole on every rank).
The same cut holds for a weight, its moments, its average and its gradient.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matformer.config.schema import AttoConfig
from matformer.layers.initialise import initial_value
from matformer.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a local tensor: its global name, its shape here, and the dim that is sharded over TP."""

    name: str
    shape: tuple[int, ...]
    dim: int | None

    def global_shape(self, tp_size: int) -> tuple[int, ...]:
        return tuple(size * tp_size if i == self.dim else size for i, size in enumerate(self.shape))


class Layout(ABC):
    """One local parameter."""

    pieces: tuple[Piece, ...]

    @abstractmethod
    def split(self, local: Tensor) -> tuple[Tensor, ...]:
        """The local pieces, in the order of `pieces`."""

    @abstractmethod
    def join(self, pieces: tuple[Tensor, ...]) -> Tensor:
        """The inverse of `split`."""


@final
class Whole(Layout):
    """One local tensor, one global tensor."""

    def __init__(self, name: str, shape: tuple[int, ...], *, dim: int | None = None) -> None:
        self.pieces = (Piece(name, shape, dim),)

    def split(self, local: Tensor) -> tuple[Tensor, ...]:
        return (local,)

    def join(self, pieces: tuple[Tensor, ...]) -> Tensor:
        return pieces[0]


@final
class GateUp(Layout):
    """megatron's linear_fc1 on a rank is [gate_r; up_r], not a chunk of [gate; up]."""

    def __init__(self, prefix: str, shape: tuple[int, ...]) -> None:
        half = (shape[0] // 2, shape[1])
        self.pieces = (Piece(f"{prefix}.gate.weight", half, 0), Piece(f"{prefix}.up.weight", half, 0))

    def split(self, local: Tensor) -> tuple[Tensor, ...]:
        return local.chunk(2)

    def join(self, pieces: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(pieces)


@final
class QueryKeyValue(Layout):
    """megatron's linear_qkv holds, group by group, the group's queries, its key and its value."""

    def __init__(self, prefix: str, shape: tuple[int, ...], *, atto: AttoConfig) -> None:
        self.head_size = atto.width // atto.heads
        self.queries = atto.heads // atto.kv_heads
        self.groups = shape[0] // ((self.queries + 2) * self.head_size)
        rows = self.groups * self.head_size
        self.pieces = (
            Piece(f"{prefix}.query.weight", (rows * self.queries, shape[1]), 0),
            Piece(f"{prefix}.key.weight", (rows, shape[1]), 0),
            Piece(f"{prefix}.value.weight", (rows, shape[1]), 0),
        )

    def split(self, local: Tensor) -> tuple[Tensor, ...]:
        grouped = local.view(self.groups, self.queries + 2, self.head_size, -1)
        parts = grouped.split((self.queries, 1, 1), dim=1)
        return tuple(part.reshape(-1, local.shape[1]) for part in parts)

    def join(self, pieces: tuple[Tensor, ...]) -> Tensor:
        grouped = [piece.view(self.groups, -1, self.head_size, piece.shape[1]) for piece in pieces]
        return torch.cat(grouped, dim=1).flatten(0, 2)


_MODULATION = ("first.weight", "first.bias", "film.weight", "film.bias")
_RENAMED = {
    "input_layernorm.weight": ("attention_norm.weight", None),
    "pre_mlp_layernorm.weight": ("feed_forward_norm.weight", None),
    "self_attention.q_layernorm.weight": ("attention.query_norm.weight", None),
    "self_attention.k_layernorm.weight": ("attention.key_norm.weight", None),
    "self_attention.linear_proj.weight": ("attention.output.weight", 1),
    "mlp.linear_fc2.weight": ("feed_forward.down.weight", 1),
    **{f"modulation.{part}": (f"modulation.{part}", None) for part in _MODULATION},
}


def layouts(model: nn.Module, *, atto: AttoConfig, first_layers: Sequence[int]) -> dict[str, Layout]:
    """The layout of every parameter of a rank by its local name.

    first_layers: the offset in the Atto of each stage that the rank holds; several are an nn.ModuleList of stages.
    """
    found: dict[str, Layout] = {}
    for name, parameter in model.named_parameters():
        stage, rest = name.split(".", 1) if len(first_layers) > 1 else ("0", name)
        found[name] = _layout(rest, shape_of(parameter), atto=atto, first_layer=first_layers[int(stage)])
    return found


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape, also where ZeRO 3 has taken the data away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _layout(name: str, shape: tuple[int, ...], *, atto: AttoConfig, first_layer: int) -> Layout:
    if name == "atto.block.final_layernorm.weight":
        return Whole("atto.final_norm.weight", shape)
    match = re.fullmatch(r"atto\.block\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return Whole(name, shape)
    prefix, rest = f"atto.layers.{int(match[1]) + first_layer}", match[2]
    if rest == "self_attention.linear_qkv.weight":
        return QueryKeyValue(f"{prefix}.attention", shape, atto=atto)
    if rest == "mlp.linear_fc1.weight":
        return GateUp(f"{prefix}.feed_forward", shape)
    renamed, dim = _RENAMED[rest]
    return Whole(f"{prefix}.{renamed}", shape, dim=dim)


def to_global(local: Tensor, layout: Layout, *, groups: Groups) -> Iterator[tuple[str, Tensor]]:
    """(global name, global tensor) of each piece. Collective over TP."""
    for piece, part in zip(layout.pieces, layout.split(local), strict=True):
        if piece.dim is None or groups.tp_size == 1:
            yield piece.name, part
            continue
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(groups.tp_size)]
        dist.all_gather(parts, part.contiguous(), group=groups.tp)
        yield piece.name, torch.cat(parts, dim=piece.dim)


def to_local(tensors: Mapping[str, Tensor], layout: Layout, *, groups: Groups) -> Tensor:
    """This rank's tensor from the global ones."""
    parts = []
    for piece in layout.pieces:
        tensor = tensors[piece.name]
        if piece.dim is not None:
            tensor = tensor.chunk(groups.tp_size, dim=piece.dim)[groups.tp_rank]
        parts.append(tensor)
    return layout.join(tuple(parts))


def drawn(layout: Layout, *, groups: Groups, seed: int, depth: int) -> Tensor:
    """This rank's tensor as a run draws it, each piece by its global name. depth: layers of the Atto."""
    pieces = {
        piece.name: initial_value(piece.name, piece.global_shape(groups.tp_size), seed=seed, depth=depth)
        for piece in layout.pieces
    }
    return to_local(pieces, layout, groups=groups)
