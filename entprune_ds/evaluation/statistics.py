"""Mean and covariance of features that many ranks see a part of: counts, sums and outer products, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entprune_ds import comm


@dataclass(frozen=True)
class Moments:
    """What the Frechet distance needs of a set of features."""

    count: int
    mean: np.ndarray
    """(D,) f64."""
    covariance: np.ndarray
    """(D,D) f64, with count - 1 below (as numpy.cov)."""


class RunningMoments:
    """Sums over batches of features; memory does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None  # (D,)
        self.products: Tensor | None = None  # (D,D)

    def add(self, features: np.ndarray) -> None:
        """Take in features (n,D)."""
        rows = torch.from_numpy(np.ascontiguousarray(features)).to(comm.device(), torch.float64)
        if self.sum is None or self.products is None:
            self.sum, self.products = rows.new_zeros(rows.shape[1]), rows.new_zeros(rows.shape[1], rows.shape[1])
        self.sum += rows.sum(dim=0)
        self.products.addmm_(rows.T, rows)
        self.count += len(rows)

    def reduce(self) -> Moments:
        """Of all ranks together, also those that have seen nothing. Collective.

        Raises:
            ValueError: fewer than 2 examples in all.
        """
        width = max(comm.all_gather_json(0 if self.sum is None else len(self.sum)))
        if self.sum is None or self.products is None:
            self.sum = torch.zeros(width, dtype=torch.float64, device=comm.device())
            self.products = self.sum.new_zeros(width, width)
        count = sum(comm.all_gather_json(self.count))
        total = comm.all_reduce_sum(self.sum.clone())
        products = comm.all_reduce_sum(self.products.clone())
        if count < 2:
            raise ValueError(f"a covariance needs 2 images or more, got {count}.")
        mean = total / count
        covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
        return Moments(count, mean.cpu().numpy(), ((covariance + covariance.T) / 2).cpu().numpy())


def moments_of(features: np.ndarray) -> Moments:
    """Of features (N,D) that one process holds."""
    rows = np.asarray(features, dtype=np.float64)
    return Moments(len(rows), rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))
