"""Candidates of a recovery race: which blocks may stay, from every criterion at hand, evenly spaced, and at random."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch

from entprune_ds.importance.criteria import CRITERIA, RankingRequest
from entprune_ds.importance.evenness import even_keep_set
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

    The origins take turns; random sets fill up. There are fewer where no more exist.

    Args:
        origins: some of spaced, criteria (all whose scores are at hand), names of criteria, random.
        protected: blocks that every keep-set holds, at most target_depth.
    """
    in_turn = [
        spaced(request, protected) if origin == "spaced" else by_criterion(request, protected, origin)
        for origin in origins
        if origin != "random"
    ]
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


def by_criterion(request: RankingRequest, protected: Sequence[int], origin: str) -> list[Origin]:
    """The last to go by a criterion, and the keep-set that weighs its order against even spacing, one of each.

    Args:
        origin: name of the criterion; "criteria" for every one whose order the scores at hand give.
    """
    together, spread = list[Origin](), list[Origin]()
    target = request.target_depth - len(protected)
    for name, criterion in CRITERIA.items():
        at_hand = not criterion.races and (name in request.scores or name == "every_other")
        if not at_hand or origin not in (name, "criteria"):
            continue
        order = list(criterion.order(request))
        places = {b: float(place) for place, b in enumerate(order)}
        order = [b for b in order if b not in protected]
        together.append(Origin(_with(protected, order[len(order) - target :]), name))
        if name in request.scores:
            even = even_keep_set(places, request.target_depth, must_stay=protected)
            spread.append(Origin(even, f"{name}, spread"))
    return together + spread


def at_random(request: RankingRequest, protected: Sequence[int]) -> Iterator[Origin]:
    """Endless random keep-sets, equal chances for all; a function of (seed, check)."""
    free, number = [b for b in request.kept_blocks if b not in protected], 0
    while True:
        generator = generator_for(request.seed, "race/random", request.check, number)
        chosen = torch.randperm(len(free), generator=generator)[: request.target_depth - len(protected)]
        yield Origin(_with(protected, (free[p] for p in chosen.tolist())), f"random {number}")
        number += 1


def _with(protected: Sequence[int], blocks: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({*protected, *blocks}))
