"""Inception score, and precision and recall of features."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from entprune_ds import comm

SPLIT = 5000  # examples of a split of the Inception score, as in ADM's evaluator
CHUNK = 1024  # rows of a block of distances: 400 MB of float64 against 50,000 columns


def inception_score(logits: np.ndarray) -> float:
    """exp E KL(p(y|x) || p(y)), mean over splits of 5,000 (Salimans et al. 2016; splits as in ADM's evaluator).

    Args:
        logits: (N,K) class logits.
    """
    scores = []
    for start in range(0, len(logits), SPLIT):
        log_p = log_softmax(logits[start : start + SPLIT].astype(np.float64), axis=1)  # (n,K)
        p = np.exp(log_p)
        marginal = p.mean(axis=0, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.where(p > 0, p * (log_p - np.log(marginal)), 0.0).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(reference: np.ndarray, samples: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2), in float64.

    Precision: share of the samples that lie in the ball around a reference example which reaches to its k-th nearest
    neighbour; recall: the same with the sets exchanged.

    Args:
        reference: (M,D) features of real images.
        samples: (N,D) features of samples.
        neighbours: k.

    Raises:
        ValueError: fewer than k + 1 examples in a set, or other widths.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features must be (M,D) and (N,D), got {reference.shape} and {samples.shape}.")
    if min(len(reference), len(samples)) <= neighbours:
        got = f"{len(reference)} and {len(samples)}"
        raise ValueError(f"precision and recall need {neighbours + 1} images or more on both sides, got {got}.")
    real, drawn = (torch.from_numpy(f).to(comm.device(), torch.float64) for f in (reference, samples))
    return _share_inside(drawn, real, _radii(real, neighbours)), _share_inside(real, drawn, _radii(drawn, neighbours))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance of every row to its k-th nearest other row, (N,)."""
    found = []
    for part in features.split(CHUNK):
        found.append(
            torch.cdist(part, features).kthvalue(neighbours + 1, dim=1).values
        )  # the nearest is the row itself
        comm.mark_progress()
    return torch.cat(found)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of the points that lie in a ball around any of the centres."""
    inside = 0
    for part in points.split(CHUNK):
        inside += int((torch.cdist(part, centres) <= radii).any(dim=1).sum())
        comm.mark_progress()
    return inside / len(points)
