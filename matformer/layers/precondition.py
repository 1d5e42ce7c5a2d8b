"""What is known of latents before anything is learned: the variance of each channel, hence a linear denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matformer.config.schema import MediaObjective
from matformer.layers.noise_levels import Levels, levels, target
from matformer.layers.precision import at_least_float32


class Precondition(nn.Module):
    """Scales around a network f so that its input and its target have unit variance at every t and in every channel.

    For x of variance s per channel, x_t = alpha x + sigma eps and a target y = a x + b eps, the best linear predictor
    of y is g x_t with g = (a alpha s + b sigma) / m, m = alpha^2 s + sigma^2, and leaves variance d^2 s / m with
    d = alpha b - sigma a. So y = g x_t + d sqrt(s / m) f(x_t / sqrt(m)): f = 0 is already the Gaussian's answer. The
    clean x that follows from y is the same function of f for every target: (alpha s / m) x_t - sigma sqrt(s / m) f.
    `scaled` false leaves x_t and y to the network as they are.
    Source: EDM (Karras 2022), table 1, for any path and target and a variance a channel instead of one.
    """

    def __init__(self, variance: Sequence[float], *, objective: MediaObjective = "flow", scaled: bool = True) -> None:
        super().__init__()
        self.objective: MediaObjective = objective
        self.scaled = scaled
        self.register_buffer("variance", torch.tensor(variance, dtype=torch.float32), persistent=False)
        self.variance: Tensor

    def network_input(self, x_QF: Float[Tensor, "Q F"], time_Q: Float[Tensor, " Q"]) -> Float[Tensor, "Q F"]:
        """x_t / sqrt(m); clean rows (t = 0) are divided by the channel's standard deviation."""
        if not self.scaled:
            return x_QF
        _, _, of_mixture = self._variances(time_Q)
        return x_QF * of_mixture.rsqrt()

    def prediction(
        self, network_QF: Float[Tensor, "Q F"], x_QF: Float[Tensor, "Q F"], time_Q: Float[Tensor, " Q"]
    ) -> Float[Tensor, "Q F"]:
        """g x_t + d sqrt(s / m) f, at least in float32."""
        if not self.scaled:
            return at_least_float32(network_QF)
        at, variance, of_mixture = self._variances(time_Q)
        wanted = target(at, objective=self.objective)
        linear = (wanted.of_noise * at.sigma + wanted.of_value * at.alpha * variance) / of_mixture
        left = wanted.determinant * (variance / of_mixture).sqrt()
        return linear * x_QF + left * at_least_float32(network_QF)

    def _variances(self, time_Q: Float[Tensor, " Q"]) -> tuple[Levels, Float[Tensor, " F"], Float[Tensor, "Q F"]]:
        """Levels `[Q, 1]`, s and m."""
        at = levels(time_Q[:, None], objective=self.objective)
        variance = self.variance.to(time_Q.dtype)
        return at, variance, at.alpha.square() * variance + at.sigma.square()
