"""The straight path between data and noise: x_t = (1 - t) x + t eps, its velocity eps - x. t = 1 is noise."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from matformer.parcels import MediaUnits


def noised_rows(units: MediaUnits) -> tuple[Float[Tensor, "Qn F"], Float[Tensor, " Qn"]]:
    """x_t of every noised position, and its t. Source: BAGEL, `modeling/bagel/bagel.py` (the same convention)."""
    row = units.noised_row_Q
    time = units.time_J[units.span_N[row]]
    level = time[:, None]
    return (1 - level) * units.value_NF[row] + level * units.noise_NF[row], time


def velocity_rows(units: MediaUnits) -> Float[Tensor, "Qn F"]:
    """The target eps - x of every noised position."""
    return units.noise_NF[units.noised_row_Q] - units.value_NF[units.noised_row_Q]
