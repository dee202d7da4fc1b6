"""The Frechet distance of two Gaussians, by eigenvalues."""

from __future__ import annotations

import numpy as np

from entprune_ds.evaluation.statistics import Moments


def square_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric positive semidefinite matrix (D,D), real whatever rounding did to it.

    Eigenvalues below what rounding leaves of zero (D times the machine precision times the largest) count as zero.
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    floor = len(values) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    roots = np.sqrt(np.where(values > floor, values, 0.0))
    return (vectors * roots) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu1 - mu2|^2 + Tr(S1) + Tr(S2) - 2 Tr (S1^(1/2) S2 S1^(1/2))^(1/2) (Heusel et al. 2017, eq. 6; never below 0).

    The last trace is the sum of the singular values of S1^(1/2) S2^(1/2). A Schur root of S1 S2, which is not
    symmetric, becomes complex or infinite where a covariance is singular; singular values are real, and exact to
    rounding there too.

    Raises:
        ValueError: moments of different widths, or that are not finite.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
        raise ValueError(f"features must have one width, got {len(a.mean)} and {len(b.mean)}.")
    if not all(np.isfinite(part).all() for m in (a, b) for part in (m.mean, m.covariance)):
        raise ValueError("features contain NaN or infinite values.")
    cross = np.linalg.svd(square_root(a.covariance) @ square_root(b.covariance), compute_uv=False).sum()
    difference = a.mean - b.mean
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(float(distance), 0.0)
