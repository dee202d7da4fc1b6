"""Settings of the methods beside the vote: recovery race, learned gates, soft pruning, distillation, comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """criterion=recovery_race."""


@dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    steps: int = 200
    """Steps in which the gates are learned, at every check."""
    batch_size: int = 64
    """Draws of a step over all ranks."""
    group_size: int = 4
    """Most blocks that choose their mask together; more of them see more combinations and take longer to learn."""
    learning_rate: float = 1e-3
    """Learning rate of the logits (Adam)."""
    tau: tuple[float, float] = (4.0, 0.1)
    """Temperature of the Gumbel-softmax at the first and at the last step, linear between them."""
    scale: float = 100.0
    """Factor of the logits."""
    lora_rank: int = 8
    """Rank of the LoRA of every linear layer of the blocks, which simulates recovery; 0 switches it off."""
    lora_learning_rate: float = 1e-4
    """Learning rate of the LoRA (Adam)."""


@dataclass(frozen=True, kw_only=True)
class SoftConfig:
    """Gradient-flow soft pruning."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`entprune-ds compare`."""
