"""The zero-shot vote: training-free proxies, and the step time if asked, rank the candidate depths (EntPruner)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

ROUNDING = 1e-12
"""Relative difference below which two totals are the same number."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One depth and its proxies; a proxy is None when it is invalid."""

    depth: int
    kept_blocks: tuple[int, ...]
    ntk: float | None
    """Condition number of the NTK; lower is better."""
    zico_mean: float | None
    """ZiCo, mean over layers; higher is better. This one votes."""
    zico_sum: float | None
    """ZiCo, sum over layers; for the record."""
    step_seconds: float | None = None
    """Time of an optimizer step, lower is better; None unless it votes."""


@dataclass(frozen=True, kw_only=True)
class RankedCandidate(Candidate):
    """A candidate with its ranks (1 is best) and their weighted sum (lowest wins)."""

    ntk_rank: int
    zico_rank: int
    time_rank: int | None
    """None where the step time does not vote."""
    total: float


@dataclass(frozen=True)
class Vote:
    """Outcome of a vote."""

    chosen: RankedCandidate
    candidates: tuple[RankedCandidate, ...]
    """All candidates, deepest first."""

    @property
    def tied_depths(self) -> list[int]:
        """Depths of the candidates whose total is the lowest one, the chosen first."""
        return [c.depth for c in self.candidates if math.isclose(c.total, self.chosen.total, rel_tol=ROUNDING)]

    def as_json(self) -> list[dict]:
        """Candidates as plain values, for PruneDecision.candidates."""
        return [asdict(candidate) | {"kept_blocks": list(candidate.kept_blocks)} for candidate in self.candidates]


def vote(candidates: Sequence[Candidate], weights: Sequence[float], tolerance: float) -> Vote:
    """Choose the candidate of the lowest weighted rank sum; a tie goes to the deeper candidate.

    Args:
        candidates: one or more, of different depths.
        weights: of the NTK rank, of the ZiCo rank and of the rank of the step time.
        tolerance: relative difference from the best member of a group below which a voter ties with it.

    Raises:
        ValueError: when there is no candidate or two have the same depth.
    """
    of_ntk, of_zico, of_time = weights
    by_depth = sorted(candidates, key=lambda c: -c.depth)
    if not by_depth or len({c.depth for c in by_depth}) < len(by_depth):
        raise ValueError(f"a vote needs candidates of different depths, got {[c.depth for c in candidates]}.")
    ntk_ranks = competition_ranks([_negative(c.ntk) for c in by_depth], tolerance)
    zico_ranks = competition_ranks([c.zico_mean for c in by_depth], tolerance)
    time_ranks = competition_ranks([_negative(c.step_seconds) for c in by_depth], tolerance)
    ranked = tuple(
        RankedCandidate(
            **vars(c), ntk_rank=n, zico_rank=z, time_rank=t if of_time else None,
            total=of_ntk * n + of_zico * z + of_time * t,
        )
        for c, n, z, t in zip(by_depth, ntk_ranks, zico_ranks, time_ranks, strict=True)
    )  # fmt: skip
    lowest = min(c.total for c in ranked)
    chosen = next(c for c in ranked if math.isclose(c.total, lowest, rel_tol=ROUNDING))
    return Vote(chosen, ranked)


def _negative(value: float | None) -> float | None:
    """For voters of which lower is better."""
    return None if value is None else -value


def competition_ranks(values: Sequence[float | None], tolerance: float) -> list[int]:
    """Ranks 1, 1, 3, ... of values of which higher is better.

    A group of ties is anchored at its best member: it holds all within `tolerance` (relative) of that one, so
    that a chain of small differences does not tie its ends. Invalid values (None, NaN, infinite) share the last
    rank, behind all valid ones.
    """
    valid = sorted({v for v in values if v is not None and math.isfinite(v)}, reverse=True)
    group_best: dict[float, float] = {}
    anchor = valid[0] if valid else math.nan
    for value in valid:
        if anchor - value > tolerance * abs(anchor):
            anchor = value
        group_best[value] = anchor
    anchors = [group_best[v] if v is not None and math.isfinite(v) else -math.inf for v in values]
    return [1 + sum(other > mine for other in anchors) for mine in anchors]
