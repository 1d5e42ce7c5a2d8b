"""Media: squared error of the velocity."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from matformer.layers.flow import velocity_rows
from matformer.layers.precision import at_least_float32
from matformer.parcels import MediaUnits


def squared_error(velocity_QF: Float[Tensor, "Qn F"], units: MediaUnits) -> Float[Tensor, " Qn"]:
    """Sum over a patch's scalars of (v - (eps - x))^2, one number a noised patch, in float32."""
    return (at_least_float32(velocity_QF) - velocity_rows(units)).square().sum(-1)
