"""What the metrics of a row say: compute spent, the step of equal compute, damage, seconds of the checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

VALIDATION = "train/validation_loss"
Metrics = Sequence[dict[str, Any]]


def equal_step(metrics: Metrics, budget: int) -> int:
    """The step at which a row has spent a number of multiply-accumulates, to the nearest; not before its last check.

    Args:
        metrics: of the row up to the first step after its last check.
        budget: multiply-accumulates.
    """
    here, step_macs = max((line["step"], line["train/step_macs"]) for line in metrics if "train/step_macs" in line)
    return here + max(0, round((budget - sum(spent(metrics, here))) / step_macs))


def spent(metrics: Metrics, step: int) -> tuple[int, int]:
    """Multiply-accumulates of the training up to a step, and of all checks.

    A step is counted once per architecture; its cost holds until the next line.
    """
    costs = sorted({line["step"]: line["train/step_macs"] for line in metrics if "train/step_macs" in line}.items())
    ends = [first - 1 for first, _ in costs[1:]] + [step]
    training = sum(macs * (end - first + 1) for (first, macs), end in zip(costs, ends, strict=True))
    checks = {line["step"]: line["prune/score_macs"] for line in metrics if "prune/score_macs" in line}
    return training, sum(checks.values())


def validation_losses(metrics: Metrics, steps: Sequence[int]) -> dict[str, float]:
    """Validation loss of the raw weights after each of some steps, as far as it was measured."""
    by_step = {line["step"]: line[VALIDATION] for line in metrics if VALIDATION in line}
    return {str(step): by_step[step] for step in steps if step in by_step}


def check_seconds(metrics: Metrics) -> float:
    """Seconds of all checks: scores, vote, and a race where there was one; a check that was made again counts once."""
    names = [f"prune/{part}_seconds" for part in ("score", "vote", "race")]
    return sum({(line["step"], n): line[n] for line in metrics for n in names if n in line}.values())


def damage(removals: Sequence[int], metrics: Metrics) -> float:
    """Rise of the validation loss (raw weights) at the removals, summed; each step has one before and one after."""
    total = 0.0
    for step in removals:
        at = [line[VALIDATION] for line in metrics if line["step"] == step and VALIDATION in line]
        total += at[-1] - at[-2]
    return total
