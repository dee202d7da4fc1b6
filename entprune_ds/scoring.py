"""All criteria on one model, without training: what `entprune-ds score` measures."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.criterion_choice import chosen_criterion
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.measuring import Measuring
from entprune_ds.importance.scores import Scores
from entprune_ds.pruning.policy import state_of
from entprune_ds.ranking import needed_criteria, order_of

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
    measures_of = {name: _measures(m, name) for name in names}
    for measure in dict.fromkeys(measure for measures in measures_of.values() for measure in measures):
        start = time.perf_counter()
        try:
            scores |= measure(m)
        except (ValueError, comm.DistributedError) as problem:  # the same on all ranks
            problems[measure] = str(problem)
        spent[measure] = time.perf_counter() - start
    found = {}
    for name in names:
        measures = measures_of[name]
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
    needed = {"explicit": "explicit_order", "combined": "combined"}.get(name)
    if needed is not None and not getattr(m.config.prune, needed):
        return f"`prune.{needed}` is not given"
    return RACES if chosen_criterion(_choosing(m, name).prune).races else ""


def _measures(m: Measuring, name: str) -> list:
    """The measures behind a criterion; none of one that says nothing here, or looks at nothing."""
    if _untold(m, name):
        return []
    needed = needed_criteria(_choosing(m, name))
    sweep = [measure_sweep] if any(c.needs_sweep for c in needed) else []
    return sweep + list(dict.fromkeys(c.measure for c in needed if c.measure is not None))


def _order(m: Measuring, name: str, scores: Scores) -> list[int]:
    state = state_of(_choosing(m, name), m.check, 0, m.kept_blocks, len(m.kept_blocks))
    return order_of(state, scores)


def _choosing(m: Measuring, name: str) -> Config:
    return replace(m.config, prune=replace(m.config.prune, criterion=name))
