"""Magnitude of a block's weights: the oldest baseline, which looks at no data."""

from __future__ import annotations

import math

from entprune_ds import comm
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.scores import Score, Scores


def measure_magnitude(m: Measuring) -> Scores:
    """L1 and L2 norm of all weights and biases of each block. Collective: all ranks call.

    magnitude_l1 = sum |w| (Li et al., arXiv 1608.08710; for whole blocks Kim et al., arXiv 2402.02834), magnitude_l2 =
    sqrt(sum w^2), both in float64. Nothing is drawn, so the standard errors are 0. Of blocks of unequal width the
    narrow ones have the smaller norm, which is meant: they hold less.

    Raises:
        DistributedError: on all ranks, when a weight is not finite, naming the block.
    """
    scores: Scores = {"magnitude_l1": {}, "magnitude_l2": {}}
    for index in m.kept_blocks:
        weights = [p.detach().double() for p in m.parts.block(index).parameters()]
        l1 = math.fsum(w.abs().sum().item() for w in weights)
        l2 = math.sqrt(math.fsum(w.square().sum().item() for w in weights))
        if not math.isfinite(l2):
            text = f"check {m.check}: weights of block {index} are NaN or infinite, or too large to be squared."
            raise comm.DistributedError(f"{text} Nothing was removed.")  # the same on all ranks: the weights are
        scores["magnitude_l1"][index], scores["magnitude_l2"][index] = Score(l1, 0.0), Score(l2, 0.0)
    return scores
