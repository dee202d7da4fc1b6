"""Estimators of the output's entropy from the draws themselves, projected on a few directions that all variants share.

low_rank takes the projections as Gaussian with any covariance; knn assumes nothing about their shape. The directions
are those of `basis.fit_basis`. Both give the entropy of the projection, in nats of its d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds import comm

Form = Callable[[Tensor], Tensor]
"""form(draws (1+L,n,d)) -> entropy terms of each variant minus those of variant 0, (L,K); not finite without spread."""
LEAST_SPREAD = 1e-12
"""Share of the full model's variance below which a direction has no spread: rounding makes more."""
ROWS = 1024
"""Draws whose distances to all others are held at once."""


def low_rank(draws: Tensor, shrinkage: float = 0.0) -> Tensor:
    """Half the logarithms of the eigenvalues of S_0^-1 S_v, S the covariances over the draws. (1+L,n,d) -> (L,d).

    Their sum is half of log det S_v - log det S_0. The plug-in log det is too low, by about d (d + 1) / (2 n); for
    Gaussians that does not depend on the covariance (a sum of log chi-squares), so it cancels in the difference.

    Args:
        shrinkage: a of (1 - a) S + a tr(S) / d I; 0 leaves the covariances as they are.
    """
    centred = draws - draws.mean(1, keepdim=True)
    covariance = centred.mT @ centred / draws.shape[1]
    size = covariance.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
    identity = torch.eye(draws.shape[2], dtype=draws.dtype, device=draws.device)
    covariance = (1 - shrinkage) * covariance + shrinkage * size * identity
    factor, failed = torch.linalg.cholesky_ex(covariance[0])
    if failed or not torch.isfinite(covariance).all():
        return torch.full_like(covariance[1:, 0], torch.nan)
    half = torch.linalg.solve_triangular(factor, covariance[1:], upper=False)
    ratios = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    return torch.where(ratios > LEAST_SPREAD, ratios, 0.0).log() / 2


def knn(draws: Tensor, k: int = 3) -> Tensor:
    """d times the mean of log distance to the k-th nearest other draw. (1+L,n,d) -> (L,1).

    Kozachenko & Leonenko (1987): H = digamma(n) - digamma(k) + log volume of the unit ball + d mean log distance;
    all but the last term is the same for all variants. Its bias grows with the spread of scales among the
    directions and exponentially with d, hence the whitened basis of few directions. The balls of draws near a hard
    edge of the density reach over it, so such a shape is taken for softer than it is.
    """
    logs = torch.stack([_nearest(points, k).log().mean() for points in draws])
    return (draws.shape[2] * (logs[1:] - logs[0])).unsqueeze(1)


def _nearest(points: Tensor, k: int) -> Tensor:
    """Distance of every point to its k-th nearest other, (n,d) -> (n,); NaN for too few points."""
    if len(points) <= k:
        return torch.full_like(points[:, 0], torch.nan)
    found = []
    for rows in points.split(ROWS):
        distances = torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist")
        found.append(distances.kthvalue(k + 1, dim=1).values)  # the nearest is the point itself
    return torch.cat(found)


@dataclass(frozen=True)
class DrawEstimator:
    """An entropy.Estimator that keeps the projected draws, (n,1+L,d) float64."""

    form: Form
    basis: Tensor
    """(C*H*W,d) float64."""

    def keep(self, outputs: Tensor) -> Tensor:
        """See entropy.Estimator."""
        projected = [output.double().flatten(1) @ self.basis for output in outputs]  # one variant at a time: memory
        return torch.stack(projected, dim=1)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """See entropy.Estimator."""
        return torch.cat([a, b])

    def gather(self, kept: Tensor) -> Tensor:
        """See entropy.Estimator."""
        return gather_rows(kept)

    def count(self, kept: Tensor) -> int:
        """See entropy.Estimator."""
        return len(kept)

    def differences(self, kept: Tensor) -> Tensor:
        """See entropy.Estimator."""
        return self.form(kept.transpose(0, 1))


def gather_rows(mine: Tensor) -> Tensor:
    """The rows of all ranks in rank order, (n_r, ...) -> (sum of n_r, ...). Collective: all ranks call.

    `my_share` cuts a batch in rank order, so the rows come back in the order of the batch, whatever the ranks.
    """
    counts = [int(c.item()) for c in comm.all_gather(torch.tensor([len(mine)], device=mine.device))]
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    return torch.cat([rows[:count] for rows, count in zip(comm.all_gather(padded), counts, strict=True)])
