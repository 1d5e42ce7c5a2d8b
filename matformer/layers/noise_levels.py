"""How much data and how much noise x_t = alpha x + sigma eps holds at t, and which mix of both an objective predicts.

t = 0 is clean, t = 1 is noise. `flow` goes straight: alpha = 1 - t, sigma = t. The DDPM objectives go along a circle,
alpha = cos(angle), sigma = sin(angle): at t = (k + 1/2) / 1000 the angle is that of index k of the squared-cosine
betas, between two indices it is linear in t. So there is a level at every t, clean at 0 and nothing but noise at 1.
Sources: DDPM (Ho 2020); Nichol and Dhariwal 2021, section 3.2, for the betas; v: Salimans and Ho 2022, section 4.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from matformer.config.schema import LossWeighting, MediaObjective

NUM_INDICES = 1000
_OFFSET, _LARGEST_BETA = 0.008, 0.999


class Levels(NamedTuple):
    """x_t = alpha x + sigma eps."""

    alpha: Tensor
    sigma: Tensor


class Target(NamedTuple):
    """y = of_value x + of_noise eps.

    With determinant d = alpha of_noise - sigma of_value, x = (of_noise x_t - sigma y) / d.
    """

    of_value: Tensor | float
    of_noise: Tensor | float
    determinant: Tensor | float


def levels(time: Float[Tensor, "*dims"], *, objective: MediaObjective) -> Levels:
    """Alpha and sigma at each t."""
    if objective == "flow":
        return Levels(1 - time, time)
    angle = _angle(time)
    return Levels(angle.cos().to(time.dtype), angle.sin().to(time.dtype))


def target(at: Levels, *, objective: MediaObjective) -> Target:
    """What the objective predicts: eps - x, eps, or alpha eps - sigma x."""
    if objective == "flow":
        return Target(-1.0, 1.0, 1.0)
    if objective == "ddpm_eps":
        return Target(0.0, 1.0, at.alpha)
    return Target(-at.sigma, at.alpha, 1.0)


def clean_scale(time: Float[Tensor, "*dims"], *, objective: MediaObjective) -> Float[Tensor, "*dims"]:
    """What an error of the prediction is multiplied with to be the error of the clean x that follows from it."""
    at = levels(time, objective=objective)
    return at.sigma / target(at, objective=objective).determinant


def on_index(time: float) -> float:
    """The t of the DDPM index that `time` lies in: (k + 1/2) / 1000 with k = floor(1000 t)."""
    return (min(int(NUM_INDICES * time), NUM_INDICES - 1) + 0.5) / NUM_INDICES


def time_of_log_snr(log_snr: float, *, objective: MediaObjective) -> float:
    """The t at which alpha^2 / sigma^2 = exp(log_snr)."""
    if objective == "flow":
        return 1 / (1 + math.exp(log_snr / 2))
    angles, places = _angles(torch.device("cpu")), _places(torch.device("cpu"))
    angle = torch.tensor(math.atan(math.exp(-log_snr / 2)), dtype=torch.float64)
    above = int(torch.searchsorted(angles, angle).clamp(1, NUM_INDICES + 1))
    share = (angle - angles[above - 1]) / (angles[above] - angles[above - 1])
    return float(torch.lerp(places[above - 1], places[above], share) - 0.5) / NUM_INDICES


def loss_weights(
    time_T: Float[Tensor, " T"], *, objective: MediaObjective, weighting: LossWeighting, gamma: float
) -> Float[Tensor, " T"]:
    """Weight of the squared errors at each t.

    min_snr: min(SNR, gamma) on the clean x, whatever is predicted (Hang 2023, section 3.4).
    cosmap: 2 / (pi (1 - 2 t + 2 t^2)) (SD3, section 3.1).
    """
    if weighting == "none":
        return torch.ones_like(time_T)
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * time_T + 2 * time_T.square()))
    at = levels(time_T.double(), objective=objective)
    determinant = target(at, objective=objective).determinant
    snr = (at.alpha / at.sigma).square()
    weight = torch.minimum(snr, torch.full_like(snr, gamma)) * (at.sigma / determinant).square()
    return weight.to(time_T.dtype)


def _angle(time: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """In float64: near t = 1 alpha is a small difference of angles."""
    angles, places = _angles(time.device), _places(time.device)
    place = NUM_INDICES * time.double() + 0.5
    below = place.floor().clamp(0, NUM_INDICES).long()
    share = (place - places[below]) / (places[below + 1] - places[below])
    return torch.lerp(angles[below], angles[below + 1], share)


@cache
def _places(device: torch.device) -> Float[Tensor, " knots"]:
    """1000 t + 1/2 of the knots: t = 0, every index, t = 1."""
    inner = torch.arange(1, NUM_INDICES + 1, dtype=torch.float64, device="cpu")
    return (
        torch.nn.functional.pad(inner, (1, 1), value=0.5)
        .index_fill(0, torch.tensor([NUM_INDICES + 1], device="cpu"), NUM_INDICES + 0.5)
        .to(device)
    )


@cache
def _angles(device: torch.device) -> Float[Tensor, " knots"]:
    """The knots' angles. Betas and their products are rounded to float32, as everybody's are: it shows at index 0."""
    signal = [math.cos((i / NUM_INDICES + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2 for i in range(NUM_INDICES + 1)]
    betas = [min(1 - after / before, _LARGEST_BETA) for before, after in zip(signal[:-1], signal[1:], strict=True)]
    kept = torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32, device="cpu"), dim=0).double()
    inner = torch.atan2((1 - kept).sqrt(), kept.sqrt())
    ends = torch.tensor([0.0, math.pi / 2], dtype=torch.float64, device="cpu")
    return torch.cat((ends[:1], inner, ends[1:])).to(device)
