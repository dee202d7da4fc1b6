"""A check of a toy model, as criteria see it: draws that are pure functions of their number, no files, no ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from entprune_ds.config import Config, PruneConfig, ScoreConfig
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.parts import ModuleParts, Parts
from entprune_ds.importance.sweep_statistics import LossFn
from tests.reference.toys import mean_squared

DrawToy = Callable[[int, int, Tensor | None], tuple[Tensor, Tensor, Tensor, Tensor]]
"""(number of the batch, draws, chosen t or None) -> z_t, t, labels, target."""


def toy_check(
    model: nn.Module, draw: DrawToy, target_depth: int = 1, parts: Parts | None = None, loss_fn: LossFn = mean_squared,
    seed: int = 0, **sections: object,
) -> Measuring:  # fmt: skip
    """Measuring of a toy, in float64 and one process.

    Args:
        model: with blocks by original index.
        draw: the data.
        target_depth: blocks that shall stay.
        parts: another view of the model.
        loss_fn: loss per example.
        seed: of the run.
        sections: sections of the config in place of the small default ones.
    """
    taken: dict[str, int] = {}

    def numbered(purpose: str, count: int, t: Tensor | None = None) -> Batch:
        taken[purpose] = taken.get(purpose, -1) + 1
        return Batch(*draw(taken[purpose], count, t))

    score = ScoreConfig(draws=64, batch_size=32, gradient_batches=3, gradient_batch_size=8)
    config = replace(Config(), **({"score": score, "prune": PruneConfig(target_depth=target_depth)} | sections))
    config = replace(config, run=replace(config.run, seed=seed))
    parts, kept = parts or ModuleParts(model, torch.float64), tuple(int(b) for b in model.blocks)
    return Measuring(parts=parts, kept_blocks=kept, config=config, check=0, draw=numbered, loss_fn=loss_fn)
