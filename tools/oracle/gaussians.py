"""A mixture of Gaussians, and what nobody can know better of a noised draw from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Mixture:
    """Weights [M], means [M, D] and covariances [M, D, D] of the components."""

    weight: Float[np.ndarray, " M"]
    mean: Float[np.ndarray, "M D"]
    covariance: Float[np.ndarray, "M D D"]

    def draw(self, number: int, dice: np.random.Generator) -> Float[np.ndarray, "n D"]:
        """So many draws."""
        which = dice.choice(len(self.weight), size=number, p=self.weight)
        roots = np.linalg.cholesky(self.covariance)
        white = dice.standard_normal((number, self.mean.shape[1]))
        return self.mean[which] + np.einsum("nij,nj->ni", roots[which], white)

    def moments(self) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
        """Mean and covariance of the whole."""
        mean = self.weight @ self.mean
        apart = self.mean - mean
        within = np.einsum("m,mij->ij", self.weight, self.covariance)
        return mean, within + np.einsum("m,mi,mj->ij", self.weight, apart, apart)

    def expected(
        self, seen: Float[np.ndarray, "n O"], alpha: Float[np.ndarray, " O"], sigma: Float[np.ndarray, " O"]
    ) -> Float[np.ndarray, "n O"]:
        """E[x | seen] of the first O scalars, where seen = alpha x + sigma eps; alpha 1 and sigma 0: x itself is seen.

        In each component x and what is seen are jointly Gaussian; components weigh by how likely they make it.
        """
        size = seen.shape[1]
        likely, found = [], []
        for weight, mean, covariance in zip(self.weight, self.mean[:, :size], self.covariance, strict=True):
            inner = covariance[:size, :size]
            spread = alpha[:, None] * inner * alpha + np.diag(sigma**2)
            surprise = seen - alpha * mean
            solved = np.linalg.solve(spread, surprise.T).T
            found.append(mean + solved @ (alpha[:, None] * inner))
            likely.append(np.log(weight) - 0.5 * (np.linalg.slogdet(spread)[1] + (surprise * solved).sum(1)))
        share = np.exp(np.array(likely) - np.max(likely, axis=0))
        share /= share.sum(0)
        return np.einsum("mn,mnd->nd", share, np.array(found))


def three(dims: int, *, seed: int = 0) -> Mixture:
    """Three components of unequal weight, apart and correlated, of mean 0 and mean variance 1 as a whole."""
    dice = np.random.default_rng(seed)
    weight = np.array([0.5, 0.3, 0.2])
    mean = dice.standard_normal((3, dims))
    mean -= weight @ mean
    factor = 0.15 * dice.standard_normal((3, dims, dims))
    covariance = factor @ factor.transpose(0, 2, 1) + 0.01 * np.eye(dims)
    raw = Mixture(weight, mean, covariance)
    scale = dims / np.trace(raw.moments()[1])
    return Mixture(weight, np.sqrt(scale) * mean, scale * covariance)
