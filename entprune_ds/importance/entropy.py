"""Estimators of the output's Gaussian entropy from its moments over the draws, in nats of the whole output.

One interface: an estimator maps Moments of (V,C,H,W) to entropy terms (V,K) float64, whose sum over K is the
entropy of each of V variants, up to a constant that they share. A term without any spread is -inf.
EntPruner (arXiv 2511.21122, sec. 3.3): taking X as Gaussian reduces H(X) to sums of log sigma.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entprune_ds.importance.moments import Moments

Estimator = Callable[[Moments], Tensor]


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


ESTIMATORS: dict[str, Estimator] = {"per_element": per_element, "per_channel": per_channel, "scalar": scalar}


def term_differences(outputs: Moments, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """Entropy terms of each variant minus those of variant 0, over the terms that have a spread in both.

    Args:
        outputs: Moments of (1+L,C,H,W); variant 0 is the full model.

    Returns:
        differences (L,K) float64, 0 where a term is left out; number of terms left out per variant (L,) i64.
    """
    terms = estimator(outputs)
    usable = torch.isfinite(terms[1:]) & torch.isfinite(terms[:1])
    differences = torch.where(usable, terms[1:] - terms[:1], 0.0)
    return differences, (~usable).sum(1)
