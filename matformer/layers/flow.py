"""Noised patches and what is to be predicted of them; levels and objectives: `noise_levels.py`. t = 1 is noise."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from matformer.config.schema import MediaObjective
from matformer.layers.noise_levels import levels, target
from matformer.parcels import MediaUnits


def noised_rows(
    units: MediaUnits, *, objective: MediaObjective = "flow"
) -> tuple[Float[Tensor, "Qn F"], Float[Tensor, " Qn"]]:
    """x_t of every noised position, and its t. Source of the straight path: BAGEL, `modeling/bagel/bagel.py`."""
    row = units.noised_row_Q
    time = units.time_J[units.span_N[row]]
    alpha, sigma = levels(time[:, None], objective=objective)
    return alpha * units.value_NF[row] + sigma * units.noise_NF[row], time


def target_rows(units: MediaUnits, *, objective: MediaObjective = "flow") -> Float[Tensor, "Qn F"]:
    """What the Coda is to predict at every noised position; eps - x under `flow`."""
    row = units.noised_row_Q
    value, noise = units.value_NF[row], units.noise_NF[row]
    if objective == "flow":
        return noise - value
    at = levels(units.time_J[units.span_N[row]][:, None], objective=objective)
    wanted = target(at, objective=objective)
    return wanted.of_value * value + wanted.of_noise * noise
