"""Keep-sets that weigh the scores of blocks against even spacing.

Blocks of one kind are often neighbours, so a score alone keeps a cluster and leaves a long part of the model without
any. The value of a keep-set b_1 < ... < b_k of L blocks is

    sum_i z(b_i) - weight * sum_i (gap_i / mean gap)^2

with z the scores, standardised over the present blocks, and gap_0 ... gap_k the distances between neighbours and to
both ends of the model. The sum over gaps is smallest for even spacing. The best set is a longest path, found exactly.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

WEIGHT = 1.0
"""Weight of the gaps, in standard deviations of the scores (docs/LOG.md, 2026-11-22: what predicts healing)."""


def keep_set_value(keep: Sequence[int], values: Mapping[int, float], weight: float = WEIGHT) -> float:
    """What a keep-set is worth, by the formula above.

    Args:
        keep: some of the blocks, sorted.
        values: score of each present block, by original index; high stays.
        weight: of the gaps.
    """
    ends = [min(values) - 1, *keep, max(values) + 1]
    mean_gap = (ends[-1] - ends[0]) / (len(keep) + 1)
    gaps = sum(((b - a) / mean_gap) ** 2 for a, b in pairwise(ends))
    z = standardised(values)
    return sum(z[b] for b in keep) - weight * gaps


def standardised(values: Mapping[int, float]) -> dict[int, float]:
    """Values less their mean, over their standard deviation; 0 where all are equal."""
    mean, spread = statistics.fmean(values.values()), statistics.pstdev(values.values())
    return {b: (v - mean) / spread if spread else 0.0 for b, v in values.items()}


def even_keep_set(
    values: Mapping[int, float], target_depth: int, weight: float = WEIGHT, must_stay: Collection[int] = ()
) -> tuple[int, ...]:
    """The keep-set of the largest value, sorted; of equal ones that with the lower indices. Pure.

    Args:
        values: score of each present block, by original index; high stays.
        target_depth: blocks that stay, from 1 to all.
        weight: of the gaps; 0 keeps the highest scores wherever they lie.
        must_stay: present blocks that every set has.

    Raises:
        ValueError: when so many blocks are not present, or more must stay.
    """
    blocks = sorted(values)
    if not max(1, len(must_stay)) <= target_depth <= len(blocks):
        raise ValueError(f"{target_depth} of {len(blocks)} blocks cannot stay where {len(must_stay)} must.")
    of_block = standardised(values)
    z = [of_block[b] for b in blocks]
    low, high = blocks[0] - 1, blocks[-1] + 1
    mean_gap = (high - low) / (target_depth + 1)

    def gap(a: int, b: int) -> float:
        passed = any(a < block < b for block in must_stay)
        return math.inf if passed else weight * ((b - a) / mean_gap) ** 2

    # paths[i]: value and places of the best set so far that ends with block i, which has one block more in every round
    paths: dict[int, tuple[float, tuple[int, ...]]] = {i: (z[i] - gap(low, b), (i,)) for i, b in enumerate(blocks)}
    for _ in range(target_depth - 1):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for i, b in enumerate(blocks):
            steps = [(value - gap(blocks[j], b), places) for j, (value, places) in paths.items() if j < i]
            if steps:
                value, places = max(steps, key=lambda step: step[0])
                longer[i] = (value + z[i], (*places, i))
        paths = longer
    ends = [(value - gap(blocks[i], high), places) for i, (value, places) in paths.items()]
    return tuple(blocks[i] for i in max(ends, key=lambda end: end[0])[1])
