"""Checks of toys and small models through the real path of scoring, on any number of ranks."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from entprune_ds.config import Config, PruneConfig, ScoreConfig
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.scores import Scores, scores_as_json
from entprune_ds.pruning.policy import state_of
from entprune_ds.ranking import rank_blocks
from tests.reference.toys import draws, mean_squared, random_dit


def check(
    parts: ModuleParts, kept: list[int], columns: tuple[Tensor, ...], criterion: str, batch_size: int, **score: object
) -> Measuring:
    """A check of given draws: z_t, t, labels, target."""
    config = Config(
        prune=PruneConfig(criterion=criterion, target_depth=1),
        score=ScoreConfig(draws=len(columns[0]), batch_size=batch_size, dtype="float64", **score),  # type: ignore[arg-type]
    )
    tiny = dict(depth=max(kept) + 1, hidden_size=16, num_heads=2, input_size=4, in_channels=1)
    config = replace(config, model=replace(config.model, **tiny))  # type: ignore[arg-type]
    taken = iter(zip(*(c.split(batch_size) for c in columns), strict=True))
    return Measuring(
        parts=parts, kept_blocks=tuple(kept), config=config, check=0,
        draw=lambda purpose, count, t=None: Batch(*next(taken)), loss_fn=mean_squared,
    )  # fmt: skip


def ranked(m: Measuring, removals: int) -> tuple[Scores, list[int]]:
    """Scores and order of a check that may remove so many blocks."""
    state = state_of(m.config, m.check, 0, m.kept_blocks, len(m.kept_blocks))
    ranking = rank_blocks(replace(m, removable=removals), state)
    return ranking.scores, ranking.order


def greedy_with_branches() -> dict:
    """Scores and order of a small model; equal on all ranks, and with any number of them."""
    model = random_dit()
    m = check(ModuleParts(model), list(range(5)), draws(model, 24), "mse", 6, mode="greedy", unit="attention")
    scores, order = ranked(m, 3)
    return {"scores": scores_as_json(scores), "order": order}


def everything(words: list[str]) -> dict:
    """The same, and the figures of tools/bench_sweep.py, in one launch."""
    from tools.bench_sweep import measure, parser

    return {"ranking": greedy_with_branches(), "bench": measure(parser().parse_args(words))}
