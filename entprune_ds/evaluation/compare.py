"""Statistics of a comparison: means over seeds with standard errors, differences, rank correlations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error, which is NaN for a single value."""

    value: float
    standard_error: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of b minus mean of a, with two standard errors: as if independent, and over the pairs of equal seeds."""

    value: float
    standard_error: float
    paired_error: float

    @property
    def errors_apart(self) -> float:
        """The difference in standard errors."""
        return _ratio(self.value, self.standard_error)

    @property
    def paired_errors_apart(self) -> float:
        """The difference in standard errors of the paired differences."""
        return _ratio(self.value, self.paired_error)


def mean_of(values: Sequence[float]) -> Mean:
    """Mean, and sample standard deviation over the square root of the count.

    Raises:
        ValueError: for no values.
    """
    if not values:
        raise ValueError("a mean needs at least one value.")
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Mean(float(np.mean(values)), error, len(values))


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """How far b lies above a.

    Args:
        a, b: {seed: value}; the paired error is over the seeds that both have.
    """
    mean_a, mean_b = mean_of(list(a.values())), mean_of(list(b.values()))
    shared = sorted(set(a) & set(b))
    paired = mean_of([b[s] - a[s] for s in shared]).standard_error if shared else math.nan
    error = math.hypot(mean_a.standard_error, mean_b.standard_error)
    return Difference(mean_b.value - mean_a.value, error, paired)


def rank_correlations(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Spearman's rho and Kendall's tau-b; NaN with fewer than 3 pairs or where one side does not vary."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan, math.nan
    return float(stats.spearmanr(a, b)[0]), float(stats.kendalltau(a, b)[0])


def _ratio(value: float, error: float) -> float:
    return value / error if error > 0 else math.nan
