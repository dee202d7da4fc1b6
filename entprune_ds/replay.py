"""Every recorded decision made once more from what is recorded with it: scores, proxies and state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from entprune_ds.importance.scores import Score, Scores
from entprune_ds.plain_json import parse_json
from entprune_ds.pruning.decision import LATER, PruneDecision
from entprune_ds.pruning.policy import candidates_from, propose, state_from
from entprune_ds.ranking import order_of

BESIDE = tuple(name for name in LATER if name not in ("held", "state"))
"""Fields that do not follow from scores and proxies: a pipeline's cut rests on measured times, widths on gates."""

FIELDS = tuple(field.name for field in fields(PruneDecision))


@dataclass(frozen=True)
class Replayed:
    """One decision, made again."""

    decision: PruneDecision
    differences: tuple[str, ...]
    """What does not follow from the record; empty when all does."""
    known: bool = True
    """Whether the record holds the state that the decision was made from (older ones do not)."""


def replay(decisions: Sequence[PruneDecision]) -> list[Replayed]:
    """Make every decision of a run again, in order, and compare; a pure function of the records."""
    return [_once_more(decision, decisions[:place]) for place, decision in enumerate(decisions)]


def _once_more(decision: PruneDecision, earlier: Sequence[PruneDecision]) -> Replayed:
    found = _broken_chain(decision, earlier)
    state = state_from(decision)
    if state is None:
        return Replayed(decision, tuple(found), known=False)
    removals = [d.step for d in earlier if d.removes and not d.score_only]
    if state.last_removal != max(removals, default=None):
        found.append(f"last_removal is {state.last_removal}, the decisions before say {max(removals, default=None)}")
    try:
        order = order_of(state, scores_from(decision)) if decision.order else []
        again = propose(state, order, candidates_from(decision), decision.scores)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        return Replayed(decision, (*found, f"it cannot be made again: {problem}"))
    again = replace(again, **{name: getattr(decision, name) for name in BESIDE})
    recorded, made = decision.to_json(), again.to_json()
    found += [f"{key} is {recorded[key]}, made again {made[key]}" for key in FIELDS if recorded[key] != made[key]]
    return Replayed(decision, tuple(found))


def _broken_chain(decision: PruneDecision, earlier: Sequence[PruneDecision]) -> list[str]:
    """Whether the blocks before a decision are those that the one before has left."""
    if not earlier:
        return []
    last = earlier[-1]
    left = last.kept_before if last.score_only else last.kept_blocks
    if decision.kept_before == left:
        return []
    return [f"kept_before is {list(decision.kept_before)}, the decision before left {list(left)}"]


def scores_from(decision: PruneDecision) -> Scores:
    """The recorded scores; null stands for a number that was not finite."""

    def number(value: Any) -> float:
        return math.nan if value is None else float(value)

    return {
        name: {int(b): Score(number(s["value"]), number(s["standard_error"])) for b, s in by_block.items()}
        for name, by_block in decision.scores.items()
    }


def read_decisions(folder: Path) -> list[PruneDecision]:
    """The decisions of a run folder.

    Raises:
        ValueError: when the file is missing or a line is damaged or was changed, naming it.
    """
    path = folder / "decisions.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is not the folder of a run that has pruned.")
    decisions = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            decisions.append(PruneDecision.from_json(parse_json(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            message = f"{path}, line {number} is damaged ({problem}). The run itself writes the file anew when it "
            raise ValueError(message + "goes on from a checkpoint.") from problem
    return decisions
