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


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`entprune-ds compare`."""
