"""Checks of planted outputs through the real path of scoring, with as many draws as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from entprune_ds.config import Config, PruneConfig, ScoreConfig
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.parts import ModuleParts, Parts
from entprune_ds.importance.scores import scores_as_json
from entprune_ds.rng import generator_for
from tests.reference.toys import ToyModel, mean_squared, random_dit

Function = Callable[[Tensor], Tensor]
Source = Callable[[Tensor, Tensor, Tensor], Tensor]
"""source(normal (N,C,H,W), t (N,), labels (N,)) -> z_t (N,C,H,W)."""


def check(
    parts: Parts, kept: list[int], shape: tuple[int, ...], source: Source = lambda z, t, y: z, criterion: str = "ced",
    removable: int = 1, seed: int = 0, **score: object,
) -> Measuring:  # fmt: skip
    """A check whose draws are a function of (seed, purpose, place); three classes, t uniform in [0, 1)."""
    config = Config(prune=PruneConfig(criterion=criterion), score=ScoreConfig(**({"draws": 1024} | score)))  # type: ignore[arg-type]
    tiny = dict(hidden_size=16, num_heads=2, input_size=4, num_classes=3)
    config = replace(config, model=replace(config.model, **tiny))  # type: ignore[arg-type]
    taken: dict[str, int] = {}

    def draw(purpose: str, count: int) -> Batch:
        taken[purpose] = taken.get(purpose, -1) + 1
        generator = generator_for(seed, purpose, taken[purpose])
        normal, target = (torch.randn(count, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
        t = torch.rand(count, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, (count,), generator=generator)
        return Batch(source(normal, t, labels), t, labels, target)

    return Measuring(
        parts=parts, kept_blocks=tuple(kept), config=config, check=0, draw=draw, loss_fn=mean_squared,
        removable=removable,
    )  # fmt: skip


def toy_check(*functions: Function, shape: tuple[int, ...] = (4, 2, 2), **more: object) -> Measuring:
    """A check of a toy whose blocks are these functions of the stream, channels last."""
    return check(ModuleParts(ToyModel(*functions)), list(range(len(functions))), shape, **more)  # type: ignore[arg-type]


ESTIMATORS = {
    "per_element": dict(timestep_buckets=2),
    "low_rank": dict(rank=6, timestep_buckets=2),
    "knn": dict(knn_dim=3, within_class=(0, 2)),
    "resolved": dict(estimator="low_rank", rank=4, until="resolved", max_draws=200, basis="random"),
}


def score_with_every_estimator() -> dict:
    """Scores of a small model, equal on all ranks and with any number of them: 7 draws do not split evenly."""
    torch.set_num_threads(1)
    found = {}
    for name, settings in ESTIMATORS.items():
        score = {"estimator": name, "draws": 140, "batch_size": 7, "dtype": "float64"} | settings
        m = check(ModuleParts(random_dit()), list(range(5)), (1, 4, 4), removable=2, **score)  # type: ignore[arg-type]
        found[name] = scores_as_json(measure_sweep(m, entropy_needed=True))
    return found
