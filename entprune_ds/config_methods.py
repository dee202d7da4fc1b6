"""Settings of the methods beside the vote: recovery race, learned gates, soft pruning, distillation, comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """criterion=recovery_race: keep-sets recover for a few steps each, and the one that recovers best stays."""

    budget: float = 0.05
    """Share of the run's compute (train.num_steps x global batch x present blocks) that all its races may take."""
    candidates: int | None = None
    """Keep-sets at the start of a race; null takes what the budget allows, at most 32."""
    first_steps: int | None = None
    """Recovery steps of the first round, doubled in every later one; null takes what the budget allows."""
    batch_size: float = 1.0
    """Examples of a trial step as a share of train.global_batch_size."""
    validation_draws: int = 512
    """Fixed draws (example, t, noise) of the training shards that judge a candidate; its forward passes count too."""
    learning_rate: float | None = None
    """Learning rate of the trial steps; null takes the run's."""
    origins: tuple[str, ...] = ("spaced", "criteria", "random")
    """Where keep-sets come from: spaced (evenly), criteria (the order of every score of the sweep), random."""
    replicas: str = "auto"
    """Whether each rank trains candidates of its own: true, false (all ranks train one, sharded), auto (if it fits)."""
    local_search: int = 0
    """Keep-sets one swap away from the winner that race against it, with half of the budget; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    """criterion=learned."""


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Gradient-flow soft pruning."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`entprune-ds compare`."""
