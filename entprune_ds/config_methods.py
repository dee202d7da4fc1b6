"""Settings of the methods beside the vote: recovery race, learned gates, soft pruning, distillation, comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """criterion=recovery_race."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    """criterion=learned."""


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Gradient-flow soft pruning."""

    every: int = 0
    """Steps between updates of the mask; 0 switches soft pruning off. It takes the place of the pruning checks."""
    units: tuple[str, ...] = ("block",)
    """What is gated and removed: some of block, head and channel (of the MLP)."""
    target_macs: float | None = None
    """Share of the blocks' multiply-accumulates that remains at the end; null takes prune.target_depth / depth."""
    schedule: str = "cubic"
    """How the budget shrinks from 1 to the target: linear, or cubic (fast first, slow at the end)."""
    start_step: int = 0
    """Step from which the budget shrinks."""
    end_step: int | None = None
    """Step of the last update, which reaches the target; null means three quarters of train.num_steps."""
    removals: int = 4
    """Updates, evenly over all, at which units under the threshold are removed for good; the last is one of them."""
    eta: float = 0.05
    """Step size of an update: a unit whose score is one standard deviation above the mean loses that much."""
    budget_weight: float = 8.0
    """Lambda: weight of the squared distance of the multiply-accumulates from their budget."""
    threshold: float = 0.1
    """A unit whose mask is below it at a removal goes."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`entprune-ds compare`."""
