"""Settings of the methods beside the vote: recovery race, learned gates, soft pruning, distillation, comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "entpruner": {
        "prune": {"criterion": "ced", "num_checks": 4, "max_blocks_per_check": None, "vote_weights": [1.0, 1.0, 0.0]},
    },
    "gradient_flow": {"prune": {"criterion": "gradient_flow"}},
    "race": {"prune": {"criterion": "recovery_race", "num_checks": 1, "max_blocks_per_check": None}},
}
"""prune.method: what each sets, above the preset and below the words of the command line."""


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
