"""What is known of latents before anything is learned: the variance of each channel, hence a linear denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matformer.layers.precision import at_least_float32


class Precondition(nn.Module):
    """Scales around a network f so that its input and its target have unit variance at every t and in every channel.

    For x of variance s per channel and x_t = (1 - t) x + t eps, the best linear predictor of v = eps - x is
    a x_t with a = (t - (1 - t) s) / m, m = (1 - t)^2 s + t^2, and leaves variance s / m. So
    v = a x_t + sqrt(s / m) f(x_t / sqrt(m)): f = 0 is already the Gaussian's answer.
    Source: EDM (Karras 2022), table 1, for the straight path and a variance a channel instead of one.
    """

    def __init__(self, variance: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("variance", torch.tensor(variance, dtype=torch.float32), persistent=False)
        self.variance: Tensor

    def network_input(self, x_QF: Float[Tensor, "Q F"], time_Q: Float[Tensor, " Q"]) -> Float[Tensor, "Q F"]:
        """x_t / sqrt(m); clean rows (t = 0) are divided by the channel's standard deviation."""
        _, of_mixture = self._variances(time_Q)
        return x_QF * of_mixture.rsqrt()

    def velocity(
        self, network_QF: Float[Tensor, "Q F"], x_QF: Float[Tensor, "Q F"], time_Q: Float[Tensor, " Q"]
    ) -> Float[Tensor, "Q F"]:
        """a x_t + sqrt(s / m) f, at least in float32."""
        variance, of_mixture = self._variances(time_Q)
        time = time_Q[:, None]
        linear = (time - (1 - time) * variance) / of_mixture
        return linear * x_QF + (variance / of_mixture).sqrt() * at_least_float32(network_QF)

    def _variances(self, time_Q: Float[Tensor, " Q"]) -> tuple[Float[Tensor, " F"], Float[Tensor, "Q F"]]:
        time = time_Q[:, None]
        variance = self.variance.to(time.dtype)
        return variance, (1 - time).square() * variance + time.square()
