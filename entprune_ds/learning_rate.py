"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from entprune_ds.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up, then constant or cosine down to min_learning_rate; a pure function of the step."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.lr_schedule == "constant":
        return train.learning_rate
    share = (step - train.warmup_steps) / max(1, train.num_steps - train.warmup_steps)
    half = 0.5 * (1 + math.cos(math.pi * share))
    return train.min_learning_rate + (train.learning_rate - train.min_learning_rate) * half
