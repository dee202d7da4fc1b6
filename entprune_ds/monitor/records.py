"""Checked views of what a run wrote, for tables and figures.

Run folders travel, get edited and get cut short, so nothing read from them is trusted: a record either has the
right shape or is refused with the reason, and the caller counts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_BLOCKS = 4096
"""Largest block index that is believed; a damaged record must not ask for a figure of a billion columns."""


@dataclass(frozen=True)
class Score:
    """Importance of one block under one criterion."""

    value: float
    standard_error: float
    """NaN where it was not measured."""
    same_as: tuple[int, ...] | None = None
    """Blocks that could not be told apart from this one; None where that was not looked at."""
    draws: int | None = None
    """Draws that the score is of, where the record says so."""


@dataclass(frozen=True)
class Candidate:
    """One depth that stood for election at a check."""

    depth: int
    kept_blocks: tuple[int, ...]
    ntk: float
    """NTK condition number, lower is better; NaN means invalid."""
    zico_mean: float
    """ZiCo, mean over linear layers, higher is better; NaN means invalid."""
    zico_sum: float
    ntk_rank: float
    zico_rank: float
    total: float
    """Weighted rank sum, lower wins."""
    step_seconds: float = math.nan
    """Time of an optimizer step, lower is better; NaN where it had no vote."""
    time_rank: float = math.nan


@dataclass(frozen=True)
class RaceRound:
    """Candidates of one round and their losses; NaN where a loss was not finite."""

    steps: int
    losses: dict[tuple[int, ...], float]
    """By keep-set."""


@dataclass(frozen=True)
class Race:
    """A recovery race."""

    winner: tuple[int, ...]
    rounds: tuple[RaceRound, ...]
    origins: dict[tuple[int, ...], str]
    """Where each keep-set comes from."""
    share_of_run: float


@dataclass(frozen=True)
class Decision:
    """One pruning check as recorded in decisions.jsonl."""

    check: int
    step: int
    criterion: str
    kept_before: tuple[int, ...]
    dropped: tuple[int, ...]
    kept_blocks: tuple[int, ...]
    order: tuple[int, ...]
    scores: dict[str, dict[int, Score]]
    candidates: tuple[Candidate, ...]
    chosen_depth: int
    forced: bool
    reason: str
    score_only: bool
    digest: str
    race: Race | None = None
    """criterion=recovery_race, where there was something to choose."""
    held: str = ""
    """Why the check had to wait; empty when it was free to choose."""

    @property
    def removed(self) -> tuple[int, ...]:
        """Blocks that really left the model: none when the check only scored."""
        return () if self.score_only else self.dropped

    @property
    def scored_by(self) -> str:
        """The criterion to draw: the one that decided, or the first that was scored where it has no scores (random)."""
        return self.criterion if self.criterion in self.scores or not self.scores else next(iter(self.scores))

    @property
    def depth(self) -> int:
        """Blocks of the model after the check."""
        return len(self.kept_before) - len(self.removed)


def decision_of(row: Mapping[str, Any]) -> Decision:
    """Check one decision in its JSON form.

    Raises:
        ValueError: a key is missing or has a wrong type, naming it.
    """
    scores = {
        str(criterion): {_block(block): _score(score) for block, score in _object(of_criterion).items()}
        for criterion, of_criterion in _object(row.get("scores", {})).items()
    }
    candidates = tuple(_candidate(_object(c)) for c in _list(row, "candidates", []))
    return Decision(
        check=_integer(row, "check"),
        step=_integer(row, "step"),
        criterion=str(row.get("criterion", "")),
        kept_before=_blocks(row, "kept_before"),
        dropped=_blocks(row, "dropped"),
        kept_blocks=_blocks(row, "kept_blocks"),
        order=_blocks(row, "order", []),
        scores=scores,
        candidates=candidates,
        chosen_depth=_integer(row, "chosen_depth"),
        forced=row.get("forced") is True,
        reason=str(row.get("reason", "")),
        score_only=row.get("score_only") is True,
        digest=str(row.get("digest", "")),
        race=_race(_object(row["race"])) if row.get("race") else None,
        held=str(row.get("held", "")),
    )


def decisions_of(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Decision], int]:
    """All well-formed decisions sorted by step, and the number of refused rows."""
    decisions, refused = [], 0
    for row in rows:
        try:
            decisions.append(decision_of(row))
        except ValueError:
            refused += 1
    return sorted(decisions, key=lambda d: (d.step, d.check)), refused


def series(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps (ascending) and values of one metric.

    A null (a value that was not finite) becomes NaN, so that a curve shows a gap. A step that occurs twice, as the
    validation before and after a removal does, keeps both values in file order.
    """
    found = [(step, number(row, name)) for row in rows if name in row and (step := step_of(row)) is not None]
    found.sort(key=lambda pair: pair[0])  # stable
    return [step for step, _ in found], [value for _, value in found]


def step_of(row: Any) -> int | None:
    """The optimizer step of a line; None when it has none that can be believed."""
    step = row.get("step") if isinstance(row, Mapping) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and abs(step) < 2**53 else None


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number of a size that can be drawn (booleans are not numbers)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def number(values: Any, *keys: str) -> float:
    """The finite number at a path of keys, else NaN."""
    for key in keys:
        if not isinstance(values, Mapping):
            return math.nan
        values = values.get(key)
    return float(values) if is_number(values) else math.nan


def _score(row: Any) -> Score:
    same_as = _blocks(row, "same_as") if "same_as" in _object(row) else None
    draws = _integer(row, "draws") if "draws" in row else None
    return Score(_number(row, "value"), _number(row, "standard_error"), same_as, draws)


def _candidate(row: Mapping[str, Any]) -> Candidate:
    names = ("ntk", "zico_mean", "zico_sum", "ntk_rank", "zico_rank", "total", "step_seconds", "time_rank")
    values = {name: _number(row, name) for name in names}
    return Candidate(depth=_integer(row, "depth"), kept_blocks=_blocks(row, "kept_blocks", []), **values)


def _race(row: Mapping[str, Any]) -> Race:
    rounds = []
    for of_round in map(_object, _list(row, "rounds")):
        losses = map(_object, _list(of_round, "losses"))
        rounds.append(
            RaceRound(_integer(of_round, "steps"), {_blocks(c, "kept_blocks"): _number(c, "loss") for c in losses})
        )
    entered = map(_object, _list(row, "candidates"))
    origins = {_blocks(c, "kept_blocks"): str(c.get("origin", "")) for c in entered}
    return Race(_blocks(row, "winner"), tuple(rounds), origins, number(row, "share_of_run"))


def _number(row: Any, key: str) -> float:
    value = _object(row).get(key)
    if value is None or isinstance(value, float):  # JSON as Python writes it may hold NaN and Infinity
        return number(row, key)
    if not is_number(value):
        raise ValueError(f"`{key}` must be a number, got {value!r}.")
    return float(value)


def _integer(row: Mapping[str, Any], key: str) -> int:
    value = step_of({"step": row.get(key)})
    if value is None:
        raise ValueError(f"`{key}` must be an integer, got {value!r}.")
    return value


def _list(row: Mapping[str, Any], key: str, default: list | None = None) -> list:
    value = row.get(key, default)
    if not isinstance(value, list):
        raise ValueError(f"`{key}` must be a list, got {value!r}.")
    return value


def _blocks(row: Mapping[str, Any], key: str, default: list | None = None) -> tuple[int, ...]:
    return tuple(_block(value) for value in _list(row, key, default))


def _block(value: Any) -> int:
    text = str(value)
    if isinstance(value, (int, str)) and text.isascii() and text.isdigit() and len(text) < 6 and int(text) < MAX_BLOCKS:
        return int(text)
    raise ValueError(f"{value!r} is not a block index.")


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, got {value!r}.")
    return value
