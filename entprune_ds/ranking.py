"""Which blocks go first: what the criterion measures at a check, and the order of removal that follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, PruneConfig
from entprune_ds.criterion_choice import chosen_criterion
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.importance.criteria import CRITERIA, Criterion, find_criterion, removal_order
from entprune_ds.importance.greedy import greedy_order, greedy_scores
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.measuring import Batch, Measuring
from entprune_ds.importance.parts import Parts
from entprune_ds.importance.scores import Scores, scores_as_json
from entprune_ds.pruning.policy import CheckState, protected_last

Examples = Callable[[str, int], tuple[Tensor, Tensor]]
"""examples(purpose, count) -> the next latents (count,C,H,W) and labels (count,) of a purpose, equal on all ranks."""
HoldRace = Callable[[Measuring, Scores], tuple[Scores, dict[str, Any], Parts]]
"""hold_race(check, scores of the sweep) -> scores of the race, its record, and the model as it is read from now on."""


@dataclass(frozen=True)
class Ranking:
    """What a check has measured, and what follows from it."""

    scores: Scores
    order: list[int]
    """Present blocks, first to go first; empty where nothing was ranked."""
    parts: Parts
    """The model as it is read from now on: a race may have built the engine anew."""
    race: dict[str, Any] = field(default_factory=dict)
    """Record of the race; empty where nothing raced."""
    race_seconds: float = 0.0


def rank_blocks(m: Measuring, state: CheckState, hold_race: HoldRace | None = None) -> Ranking:
    """Measure what the criterion needs and rank the present blocks, by score.mode. Collective.

    Args:
        m: the check.
        state: the same check as the policy sees it.
        hold_race: for a criterion that races; collective.

    Raises:
        ValueError: when the criterion races and nothing is there to train.
        DistributedError: on all ranks, when scores are not finite, or a criterion's order is none.
    """

    def agreed(m: Measuring) -> Scores:
        scores = measure(m)
        comm.assert_same_on_all_ranks(scores_as_json(scores), "the block scores")
        return scores

    greedy = m.config.score.mode == "greedy"
    scores = greedy_scores(m, agreed, order_in(state), m.removable) if greedy else agreed(m)
    parts, record, start = m.parts, dict[str, Any](), time.perf_counter()
    if chosen_criterion(m.config.prune).races:
        if hold_race is None:
            message = f"`prune.criterion` {m.config.prune.criterion} trains candidates, which needs a training run. "
            raise ValueError(message + "Choose another.")
        raced, record, parts = hold_race(m, scores)
        scores |= raced
        comm.assert_same_on_all_ranks(scores_as_json(raced), "the scores of the race")
    seconds = time.perf_counter() - start
    order, problem = _order_or_problem(state, scores)
    comm.raise_together(problem)
    comm.assert_same_on_all_ranks(order, "the order of removal")  # a user's criterion may be random
    return Ranking(scores, order, parts, record, seconds)


def _order_or_problem(state: CheckState, scores: Scores) -> tuple[list[int], str | None]:
    try:
        return order_of(state, scores), None
    except ValueError as problem:
        return [], str(problem)


def order_of(state: CheckState, scores: Scores) -> list[int]:
    """The order of removal that the scores of a check give, greedy rounds included, protected blocks last. Pure."""
    return greedy_order(scores, state.criterion, state.kept_blocks, order_in(state))


def order_in(state: CheckState) -> Callable[[Scores, tuple[int, ...]], list[int]]:
    """(scores, blocks) -> the blocks in the order of the check's criterion, the protected ones last. Pure."""
    prune = PruneConfig(criterion=state.criterion, combined=state.combined)

    def order(scores: Scores, kept_blocks: tuple[int, ...]) -> list[int]:
        found = removal_order(
            chosen_criterion(prune), scores, kept_blocks, target_depth=state.target_depth, seed=state.seed,
            check=state.check, explicit_order=state.explicit_order, combined=prune.combined_weights,
            protected=state.protected,
        )  # fmt: skip
        return protected_last(found, state.protected)

    return order


def measure(m: Measuring, for_the_record: bool = False) -> Scores:
    """What the criterion needs, and the sweep for the record unless score.sweep=needed. Collective.

    Args:
        m: the check.
        for_the_record: nothing will be ranked, so that nothing is needed.
    """
    needed = [] if for_the_record else needed_criteria(m.config)
    scores: Scores = {}
    if m.config.score.sweep == "always" or any(c.needs_sweep for c in needed):
        scores |= measure_sweep(m, entropy_needed=any(c.needs_entropy for c in needed))
    for measure_own in dict.fromkeys(c.measure for c in needed if c.measure is not None):
        scores |= measure_own(m)
    return scores


def needed_criteria(config: Config) -> list[Criterion]:
    """Criteria whose scores a check needs: the chosen one, members of a combination, or what a race starts from.

    Raises:
        ValueError: when the criterion is not known, or its file does not define one.
    """
    criterion = chosen_criterion(config.prune)
    if config.prune.criterion == "combined":
        return [find_criterion(name) for name in config.prune.combined_weights]
    if not criterion.races:
        return [criterion]
    named = [CRITERIA[origin] for origin in config.race.origins if origin in CRITERIA]
    return [*named, *([criterion] if "criteria" in config.race.origins else [])]  # it stands for the sweep


def measuring(
    parts: Parts, kept_blocks: tuple[int, ...], config: Config, check: int, examples: Examples, removable: int = 1
) -> Measuring:
    """A check as criteria see it: draws of this check's own random streams."""
    objective = build_objective(config.model, config.diffusion)
    taken: dict[str, int] = {}

    def draw(purpose: str, count: int, t: Tensor | None = None) -> Batch:
        first = taken.get(purpose, 0)
        taken[purpose] = first + count
        latents, labels = examples(purpose, count)
        slots = range(first, first + count)
        draws = objective.make_draws(latents, labels, slots, seed=config.run.seed, purpose=purpose, step=check, t=t)
        return Batch(draws.z_t, draws.t, draws.labels, draws.target)

    return Measuring(
        parts=parts, kept_blocks=kept_blocks, config=config, check=check, draw=draw, loss_fn=objective.scoring_loss,
        removable=removable,
    )  # fmt: skip
