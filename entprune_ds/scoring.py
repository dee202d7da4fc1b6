"""All criteria on one model, without training: what `entprune-ds score` measures."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from entprune_ds import comm
from entprune_ds.importance.criteria import find_criterion
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.scores import Scores
from entprune_ds.pruning.policy import state_of
from entprune_ds.ranking import order_of

RACES = "it trains candidates, so only a training run can tell"


@dataclass(frozen=True)
class Measured:
    """What a criterion says about the blocks."""

    order: list[int] | None
    """First to go first; None where it cannot say."""
    seconds: float | None
    """What its scores took on this rank, also where other criteria share them; None where it measures nothing."""
    note: str = ""
    """Why it cannot say."""


@dataclass(frozen=True)
class Scored:
    """All criteria on one model."""

    scores: Scores
    criteria: dict[str, Measured]


def score_model(m: Measuring, names: tuple[str, ...]) -> Scored:
    """Scores and orders of removal by several criteria. Collective: all ranks call.

    The sweep runs once for all that need it, and so does a measure that several criteria share. A criterion that
    cannot score this model (an entropy of outputs without spread, a race) says why and leaves the others alone.

    Args:
        m: the model and its draws; prune.target_depth is what `every_other` aims at.
        names: criteria.
    """
    scores: Scores = {}
    spent: dict[object, float] = {}
    problems: dict[object, str] = {}
    for measure in dict.fromkeys(measure for name in names for measure in _measures(name)):
        start = time.perf_counter()
        try:
            scores |= measure(m)
        except (ValueError, comm.DistributedError) as problem:  # the same on all ranks
            problems[measure] = str(problem)
        spent[measure] = time.perf_counter() - start
    found = {}
    for name in names:
        measures = _measures(name)
        seconds = sum(spent[measure] for measure in measures) if measures else None
        note = _untold(m, name) or " ".join(problems[f] for f in measures if f in problems)
        order = None
        if not note:
            try:
                order = _order(m, name, scores)
            except ValueError as problem:
                note = str(problem)
        found[name] = Measured(order, seconds, note)
    return Scored(scores, found)


def _untold(m: Measuring, name: str) -> str:
    """Why a criterion has nothing to say about any model at rest; empty where it has."""
    if name == "explicit" and not m.config.prune.explicit_order:
        return "`prune.explicit_order` is not given"
    return RACES if find_criterion(name).races else ""


def _measures(name: str) -> list:
    """The measures behind a criterion; none of one that races, or looks at nothing."""
    criterion = find_criterion(name)
    if criterion.races:
        return []
    return [f for f in (measure_sweep if criterion.needs_sweep else None, criterion.measure) if f is not None]


def _order(m: Measuring, name: str, scores: Scores) -> list[int]:
    config = replace(m.config, prune=replace(m.config.prune, criterion=name))
    state = state_of(config, m.check, 0, m.kept_blocks, len(m.kept_blocks))
    return order_of(state, scores)
