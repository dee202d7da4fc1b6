"""Which training steps count: none with a NaN or infinite loss or gradient, none whose loss leaps (train.bad_steps).

A pure function of what all ranks know, so that all decide alike; its state is a few numbers, kept in checkpoints. The
mean and the deviation of the loss run over the good steps, with a memory of WINDOW steps. They begin anew when the
model or what it minimises changes, for then the loss is another one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

WINDOW = 100
"""Good steps that the running mean remembers."""
SETTLING = 50
"""Good steps at the start, and after a change of the model, before a loss can count as a leap."""


@dataclass
class LossGuard:
    """Judges every step of a run."""

    deviations: float
    """train.spike_deviations; 0 looks for NaN and infinite values only."""
    mean: float = 0.0
    """Running mean of the loss over good steps."""
    variance: float = 0.0
    """Running variance of it."""
    count: int = 0
    """Good steps since the start or the last change of the model."""
    in_a_row: int = 0
    """Bad steps since the last good one."""
    skipped: int = 0
    """Bad steps of the run, those before a roll-back too."""
    rollbacks: int = 0
    """Roll-backs of the run."""
    reason: str = ""
    """Why the newest step is bad; empty for a good one."""

    def allows(self, loss: float, finite_gradient: bool) -> bool:
        """Whether a step counts.

        Args:
            loss: mean over the global batch.
            finite_gradient: whether the norm of the gradient is finite.
        """
        self.reason = self._reason(loss, finite_gradient)
        if self.reason:
            self.in_a_row, self.skipped = self.in_a_row + 1, self.skipped + 1
            return False
        share = max(1 / (self.count + 1), 1 / WINDOW)
        change = loss - self.mean
        self.mean += share * change
        self.variance = (1 - share) * (self.variance + share * change * change)
        self.count, self.in_a_row = self.count + 1, 0
        return True

    def _reason(self, loss: float, finite_gradient: bool) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not finite_gradient:
            return "the gradient is NaN or infinite"
        if not self.deviations or self.count < SETTLING:
            return ""
        limit = self.mean + self.deviations * math.sqrt(self.variance)
        return f"the loss is {loss:.5g}, above {limit:.5g} (train.spike_deviations)" if loss > limit else ""

    def settle_again(self) -> None:
        """Begin the mean anew: the model is another one."""
        self.mean, self.variance, self.count = 0.0, 0.0, 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {k: v for k, v in asdict(self).items() if k not in ("deviations", "reason")}

    @classmethod
    def from_json(cls, deviations: float, values: dict[str, Any] | None) -> LossGuard:
        """The guard of a checkpoint, or of a new run."""
        return cls(deviations, **(values or {}))
