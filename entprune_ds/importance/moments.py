"""Count, mean and sum of squared deviations in float64, merged without loss over batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments over `count` draws; mean and m2 are float64 of the shape of one draw."""

    count: int
    mean: Tensor
    m2: Tensor
    """Sum over the draws of the squared deviation from the mean."""

    def variance(self) -> Tensor:
        """Variance m2 / count (ddof 0); count must be above 0."""
        return self.m2 / self.count


def zero_moments(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Moments:
    """Moments of no draw at all: the neutral element of `merge`."""
    zeros = torch.zeros(shape, dtype=torch.float64, device=device)
    return Moments(0, zeros, zeros.clone())


def moments_of(x: Tensor) -> Moments:
    """Moments of x (N, ...) over dim 0, N >= 1.

    Deviations are taken from the first draw, so a constant has a spread of exactly 0 and a large offset
    costs no digits.
    """
    x = x.double()
    deviation = x - x[0]
    shift = deviation.mean(0)
    return Moments(x.shape[0], x[0] + shift, (deviation - shift).square().sum(0))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the draws of a and b together (Chan, Golub & LeVeque 1983, pairwise update of the variance)."""
    if a.count == 0 or b.count == 0:
        return a if b.count == 0 else b
    n = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / n)
    return Moments(n, mean, a.m2 + b.m2 + delta.square() * (a.count * b.count / n))
