"""How far two clouds of points are apart, taken for Gaussians."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Gaussian(NamedTuple):
    """Mean and covariance."""

    mean: Float[np.ndarray, " F"]
    covariance: Float[np.ndarray, "F F"]


def fitted(points: Float[np.ndarray, "n F"], *, weights: Float[np.ndarray, " n"] | None = None) -> Gaussian:
    """Mean and covariance of the points, in float64; the covariance is that of the points themselves (over n)."""
    x = np.asarray(points, np.float64)
    share = np.full(len(x), 1 / len(x)) if weights is None else np.asarray(weights, np.float64) / np.sum(weights)
    mean = share @ x
    return Gaussian(mean, (x - mean).T @ (share[:, None] * (x - mean)))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Source: Dowson and Landau 1982; Heusel 2017 for images.

    The trace of the root is that of (R S2 R)^(1/2) with R the root of S1: symmetric, so no complex numbers come up.
    Singular covariances are legal.
    """
    variances, axes = np.linalg.eigh(one.covariance)
    root = (axes * np.sqrt(np.maximum(variances, 0))) @ axes.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other.covariance @ root), 0)).sum()
    apart = np.square(one.mean - other.mean).sum()
    return float(apart + np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared)
