"""Candidates of a recovery race: which blocks may stay, from every criterion at hand, evenly spaced, and at random."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch

from entprune_ds.importance.criteria import CRITERIA, RankingRequest
from entprune_ds.rng import generator_for


class Origin(NamedTuple):
    """A keep-set and where it comes from."""

    kept_blocks: tuple[int, ...]
    """Sorted original indices."""
    origin: str
    """E.g. "spaced 1", "ced", "random 3"."""


def candidates(
    request: RankingRequest, count: int, origins: Sequence[str], protected: Sequence[int] = ()
) -> list[Origin]:
    """Up to `count` different keep-sets of request.target_depth blocks; a pure function of its arguments.

    The first two origins take turns; random sets fill up. There are fewer where no more exist.

    Args:
        origins: some of spaced, criteria, random.
        protected: blocks that every keep-set holds, at most target_depth.
    """
    known = {"spaced": lambda: spaced(request, protected), "criteria": lambda: by_criterion(request, protected)}
    in_turn = [known[o]() for o in origins if o in known]
    listed = [c for turn in zip_longest(*in_turn) for c in turn if c is not None]
    found: dict[tuple[int, ...], str] = {}
    for kept, origin in listed:
        if len(found) < count:
            found.setdefault(kept, origin)
    if "random" in origins:
        free = len(request.kept_blocks) - len(protected)
        exist = math.comb(free, request.target_depth - len(protected))
        draw = at_random(request, protected)
        while len(found) < min(count, exist):
            kept, origin = next(draw)
            found.setdefault(kept, origin)
    return [Origin(*item) for item in found.items()]


def spaced(request: RankingRequest, protected: Sequence[int]) -> list[Origin]:
    """Even spacing: from the first to the last block, then with every offset."""
    free = [b for b in request.kept_blocks if b not in protected]
    target = request.target_depth - len(protected)
    if target < 1:
        return [Origin(tuple(sorted(protected)), "spaced 0")]
    step = len(free) / target
    grids = [[round(i * (len(free) - 1) / max(1, target - 1)) for i in range(target)]]
    grids += [[math.floor(i * step + offset) for i in range(target)] for offset in range(math.ceil(step))]
    inside = [grid for grid in grids if grid[-1] < len(free)]
    return [Origin(_with(protected, (free[p] for p in grid)), f"spaced {i}") for i, grid in enumerate(inside)]


def by_criterion(request: RankingRequest, protected: Sequence[int]) -> list[Origin]:
    """The last to go by every criterion whose order the scores at hand give."""
    found = []
    for name, criterion in CRITERIA.items():
        if criterion.races or (name not in request.scores and name != "every_other"):
            continue
        order = [b for b in criterion.order(request) if b not in protected]
        target = request.target_depth - len(protected)
        found.append(Origin(_with(protected, order[len(order) - target :]), name))
    return found


def at_random(request: RankingRequest, protected: Sequence[int]) -> Iterator[Origin]:
    """Endless random keep-sets, equal chances for all; a function of (seed, check)."""
    free, number = [b for b in request.kept_blocks if b not in protected], 0
    while True:
        generator = generator_for(request.seed, "race/random", request.check, number)
        chosen = torch.randperm(len(free), generator=generator)[: request.target_depth - len(protected)]
        yield Origin(_with(protected, (free[p] for p in chosen.tolist())), f"random {number}")
        number += 1


def _with(protected: Sequence[int], blocks: Iterator[int] | list[int]) -> tuple[int, ...]:
    return tuple(sorted({*protected, *blocks}))
