"""Media: squared error of what the objective predicts."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from matformer.config.schema import MediaObjective
from matformer.layers.flow import target_rows
from matformer.layers.precision import at_least_float32
from matformer.parcels import MediaUnits


def squared_error(
    predicted_QF: Float[Tensor, "Qn F"], units: MediaUnits, *, objective: MediaObjective = "flow"
) -> Float[Tensor, " Qn"]:
    """Sum over a patch's scalars of (predicted - target)^2, one number a noised patch, in float32."""
    return (at_least_float32(predicted_QF) - target_rows(units, objective=objective)).square().sum(-1)
