"""How far criteria agree on the blocks: rank correlations between all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

FEWEST_BLOCKS = 3
"""Fewer blocks that both have scored say nothing."""

HIGHEST_GO_FIRST = ("gradient_flow",)
"""Criteria whose highest score goes first; their sign is turned, so that agreeing criteria have a positive rank."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Correlations:
    """Coefficients between criteria, row by column; NaN where two have too few blocks in common or one is constant."""

    names: tuple[str, ...]
    spearman: Matrix
    kendall: Matrix


def rank_correlations(scores: Mapping[str, Mapping[int, float]]) -> Correlations:
    """Spearman's rho and Kendall's tau (b: ties count half) between every two criteria, by what goes first. Pure.

    Args:
        scores: {criterion: {block: score}}; blocks whose score is not finite are left out of its pairs. Criteria with
            fewer than FEWEST_BLOCKS finite scores are left out altogether.
    """
    signs = {name: -1 if name in HIGHEST_GO_FIRST else 1 for name in scores}
    finite = {n: {b: signs[n] * v for b, v in found.items() if math.isfinite(v)} for n, found in scores.items()}
    names = tuple(name for name, found in finite.items() if len(found) >= FEWEST_BLOCKS)
    pairs = [[_pair(finite[a], finite[b]) for b in names] for a in names]
    spearman, kendall = (tuple(tuple(pair[k] for pair in row) for row in pairs) for k in (0, 1))
    return Correlations(names, spearman, kendall)


def _pair(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[float, float]:
    """(rho, tau) over the blocks that both have scored."""
    blocks = sorted(set(first) & set(second))
    a, b = [first[block] for block in blocks], [second[block] for block in blocks]
    if len(blocks) < FEWEST_BLOCKS or len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan, math.nan
    return float(stats.spearmanr(a, b)[0]), float(stats.kendalltau(a, b)[0])
