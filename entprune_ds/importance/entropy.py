"""Estimators of the output's entropy, in nats, as differences from the full model; here those from its moments.

EntPruner (arXiv 2511.21122, sec. 3.3): taking X as Gaussian reduces H(X) to sums of log sigma. The estimators that
keep the draws themselves are in entropy_draws.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.importance import moments
from entprune_ds.importance.moments import Moments

Kept = Any
"""What an estimator keeps of some draws: Moments, or the projected draws."""


class Estimator(Protocol):
    """One interface: what is kept of the draws, how it comes together, and the entropies that follow from it."""

    def keep(self, outputs: Tensor) -> Kept:
        """(1+L,N,C,H,W) -> what is needed of these draws; N may be 0. Variant 0 is the full model."""

    def merge(self, a: Kept, b: Kept) -> Kept:
        """Of the draws of a and b together."""

    def gather(self, kept: Kept) -> Kept:
        """Of the draws of all ranks, in rank order, bit-identical on all. Collective: all ranks call."""

    def count(self, kept: Kept) -> int:
        """Number of draws."""

    def differences(self, kept: Kept) -> Tensor:
        """Entropy terms of each variant minus those of variant 0, (L,K) float64, to be summed over K.

        A term that has no spread in either is not finite.
        """


Form = Callable[[Moments], Tensor]
"""form(Moments of (V,C,H,W)) -> terms (V,K) float64 whose sum is an entropy, up to a constant that V shares.

A term without any spread is -inf.
"""


def per_element(outputs: Moments) -> Tensor:
    """log sigma_j of every output element j: independent Gaussians. (V,C,H,W) -> (V, C*H*W)."""
    return outputs.variance().log().flatten(1) / 2


def per_channel(outputs: Moments) -> Tensor:
    """One sigma per channel over draws and positions, counted H*W times. (V,C,H,W) -> (V, C)."""
    return _pooled(outputs.mean.flatten(2), outputs.variance().flatten(2))


def scalar(outputs: Moments) -> Tensor:
    """One sigma over draws and all elements, counted C*H*W times. (V,C,H,W) -> (V, 1)."""
    return _pooled(outputs.mean.flatten(1).unsqueeze(1), outputs.variance().flatten(1).unsqueeze(1))


def _pooled(mean: Tensor, variance: Tensor) -> Tensor:
    """Entropy of K * E elements when the E of a pool share one sigma. (V,K,E), (V,K,E) -> (V,K).

    The variance of a pool is the mean variance within its elements plus the variance of their means.
    """
    total = variance.mean(2) + mean.var(2, correction=0)
    return total.log() * (mean.shape[2] / 2)


FORMS: dict[str, Form] = {"per_element": per_element, "per_channel": per_channel, "scalar": scalar}


@dataclass(frozen=True)
class MomentEstimator:
    """An Estimator that keeps the Moments of (1+L,C,H,W)."""

    form: Form

    def keep(self, outputs: Tensor) -> Moments:
        """See Estimator."""
        shape = outputs.shape[2:]
        if outputs.shape[1] == 0:
            return moments.zero_moments((len(outputs), *shape), outputs.device)
        each = [moments.moments_of(output) for output in outputs]  # one variant at a time: memory
        return Moments(outputs.shape[1], torch.stack([m.mean for m in each]), torch.stack([m.m2 for m in each]))

    def merge(self, a: Moments, b: Moments) -> Moments:
        """See Estimator."""
        return moments.merge(a, b)

    def gather(self, kept: Moments) -> Moments:
        """See Estimator."""
        packed = torch.cat([kept.mean.new_tensor([kept.count]), kept.mean.reshape(-1), kept.m2.reshape(-1)])
        total = moments.zero_moments(tuple(kept.mean.shape), kept.mean.device)
        for row in comm.all_gather(packed):
            mean, m2 = row[1:].view(2, *kept.mean.shape)
            total = moments.merge(total, Moments(int(row[0].item()), mean, m2))
        return total

    def count(self, kept: Moments) -> int:
        """See Estimator."""
        return kept.count

    def differences(self, kept: Moments) -> Tensor:
        """See Estimator."""
        terms = self.form(kept)
        return torch.where(torch.isfinite(terms[:1]), terms[1:] - terms[:1], torch.nan)
