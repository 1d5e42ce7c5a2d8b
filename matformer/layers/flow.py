"""Noised patches and what is to be predicted of them; levels and objectives: `noise_levels.py`. t = 1 is noise."""

from __future__ import annotations

from dataclasses import replace

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
    time = units.time_T[units.time_of_Q]
    alpha, sigma = levels(time[:, None], objective=objective)
    return alpha * units.value_NF[row] + sigma * units.noise_QF, time


def clean_alone(units: MediaUnits) -> MediaUnits:
    """The same spans without their noised patches."""
    return replace(
        units,
        noised_row_Q=units.noised_row_Q[:0],
        noised_slot_Q=units.noised_slot_Q[:0],
        noised_level_Q=units.noised_level_Q[:0],
        noise_QF=units.noise_QF[:0],
        time_of_Q=units.time_of_Q[:0],
        patches_of_levels=None,
    )


def target_rows(units: MediaUnits, *, objective: MediaObjective = "flow") -> Float[Tensor, "Qn F"]:
    """What the Coda is to predict at every noised position; eps - x under `flow`."""
    value, noise = units.value_NF[units.noised_row_Q], units.noise_QF
    if objective == "flow":
        return noise - value
    at = levels(units.time_T[units.time_of_Q][:, None], objective=objective)
    wanted = target(at, objective=objective)
    return wanted.of_value * value + wanted.of_noise * noise
