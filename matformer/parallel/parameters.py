"""Parameters by part, of the whole model and of one rank."""

from __future__ import annotations

from matformer.config.schema import ModelConfig
from matformer.parallel.parts import Piece, parts


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Every part's parameters, by the names of `parts`."""
    return {name: sum(piece.parameters for piece in pieces) for name, pieces in parts(model).items()}


def kept(pieces: list[Piece], *, tp: int) -> int:
    """Parameters of a part that a rank of a tensor-parallel group holds: its share of sharded maps, the rest whole."""
    return sum(_kept(piece, tp=tp) for piece in pieces)


def _kept(piece: Piece, *, tp: int) -> int:
    return piece.parameters // tp if piece.sharded else piece.parameters
