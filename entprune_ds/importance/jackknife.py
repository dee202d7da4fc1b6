"""Standard errors by leaving out one group of draws at a time, and which scores they can tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

G = TypeVar("G")
ROUNDING = 1e-12
"""Difference, relative to the largest score, that is no difference: both orders of summation are right."""


def leave_one_out(groups: Sequence[G], merge: Callable[[G, G], G]) -> Iterator[G]:
    """For each of two or more groups the merge of all others, in O(G) merges through prefixes and suffixes."""
    suffixes = [groups[-1]]
    for group in reversed(groups[1:-1]):
        suffixes.append(merge(group, suffixes[-1]))
    yield suffixes.pop()
    prefix = groups[0]
    for group in groups[1:-1]:
        yield merge(prefix, suffixes.pop())
        prefix = merge(prefix, group)
    yield prefix


def standard_error(replicates: Tensor) -> Tensor:
    """Standard error from statistics (G,...) that each leave one of G groups out -> (...) (Efron & Stein 1981)."""
    groups = replicates.shape[0]
    return (replicates.var(0, correction=0) * (groups - 1)).sqrt()


@dataclass(frozen=True)
class Resampled:
    """A score of L blocks, and its values without each of G groups of the draws that the blocks share."""

    values: Tensor
    """(L,) float64."""
    replicates: Tensor
    """(G,L) float64."""

    @property
    def errors(self) -> Tensor:
        """Standard error of each value, (L,)."""
        return standard_error(self.replicates)

    def told_apart(self, confidence: float) -> Tensor:
        """Which pairs of blocks differ at this confidence (two-sided), (L,L) bool.

        The error of a difference is the jackknife of the difference: the blocks are scored on the same draws, so it
        is not the sum of their errors.
        """
        pairs = self.replicates.unsqueeze(2) - self.replicates.unsqueeze(1)  # (G,L,L)
        threshold = student_quantile(confidence, len(self.replicates) - 1) * standard_error(pairs)
        tiny = ROUNDING * self.values.abs().max()
        return (self.values.unsqueeze(1) - self.values.unsqueeze(0)).abs() > torch.maximum(threshold, tiny)


def indistinguishable(score: Resampled, blocks: Sequence[int], confidence: float) -> dict[int, tuple[int, ...]]:
    """The other blocks that each block cannot be told apart from. A score that is not finite differs from none."""
    apart = score.told_apart(confidence).tolist()
    return {
        a: tuple(b for b, differs in zip(blocks, row, strict=True) if b != a and not differs)
        for a, row in zip(blocks, apart, strict=True)
    }


def separated(score: Resampled, blocks: Sequence[int], first: int, confidence: float) -> bool:
    """Whether each of the `first` blocks of lowest score (ties: higher index) differs from each of the others.

    The order among the first ones, and among the others, is left open.
    """
    values = score.values.tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i], -blocks[i]))
    return bool(score.told_apart(confidence)[order[:first]][:, order[first:]].all())


def looks(fewest: int, most: int) -> list[int]:
    """Numbers of groups after which a stopping rule looks: `fewest`, then half as many more each time, last `most`."""
    found = [fewest]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, found[-1] * 3 // 2)))
    return found


def student_quantile(confidence: float, degrees: int) -> float:
    """q with P(|T| <= q) = confidence for Student's t of an integer number of degrees of freedom, by bisection.

    P is a finite sum in theta = atan(q / sqrt(degrees)) (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, degrees) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _student_share(theta: float, degrees: int) -> float:
    odd, cosine = degrees % 2, math.cos(theta)
    term = cosine if odd else 1.0
    total = term if degrees > 1 or not odd else 0.0
    for i in range(2 + odd, degrees, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    return (theta + math.sin(theta) * total) * 2 / math.pi if odd else math.sin(theta) * total
