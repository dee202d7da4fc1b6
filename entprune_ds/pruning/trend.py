"""Whether a model has recovered from its last removal: its validation loss against the trend of the one before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

Validation = tuple[int, int, float]
"""Optimizer steps done, parameters of the model, validation loss of its training weights."""

FEWEST_POINTS = 3
"""Fewer losses before a removal give a level, no slope."""


def trend(validations: Sequence[Validation], step: int) -> float | None:
    """The validation loss that the model before the last removal would have at `step`; None before any removal.

    A power law of the steps, as loss curves follow: the last loss before the removal, carried on with the slope of
    log loss over log step in the later half of the losses since the removal before that one. A slope that rises
    counts as flat, and so do fewer than FEWEST_POINTS losses: the trend is then the level before the removal.

    Args:
        validations: of the whole run, in order; a removal shows as a change of the number of parameters.
        step: where the trend is asked for.
    """
    stretches = [list(group) for _, group in groupby(validations, key=lambda v: v[1])]
    if len(stretches) < 2:
        return None
    before = stretches[-2]
    last_step, _, level = before[-1]
    points = before[-max(FEWEST_POINTS, len(before) // 2) :]
    slope = _slope(points) if len(points) >= FEWEST_POINTS and min(v[2] for v in points) > 0 else 0.0
    return level * ((step + 1) / (last_step + 1)) ** min(slope, 0.0)


def validations_from(rows: Sequence[Sequence[Any]]) -> list[Validation]:
    """What JSON has kept, with null for a loss that was not finite."""
    return [(step, size, math.nan if loss is None else loss) for step, size, loss in rows]


def _slope(points: Sequence[Validation]) -> float:
    """Least-squares slope of log loss over log(step + 1)."""
    x = [math.log(step + 1) for step, _, _ in points]
    y = [math.log(loss) for _, _, loss in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0


def not_recovered(validations: Sequence[Validation], step: int, tolerance: float) -> str:
    """Why the next removal has to wait, as a clause; empty when the newest loss is within `tolerance` of the trend."""
    expected = trend(validations, step)
    if expected is None:
        return ""
    loss = validations[-1][2]
    if math.isfinite(loss) and loss <= expected * (1 + tolerance):
        return ""
    above = f"{100 * (loss / expected - 1):.1f} % above its trend {expected:.4g}"
    return f"the validation loss {loss:.4g} is {above}, more than {100 * tolerance:g} %"
