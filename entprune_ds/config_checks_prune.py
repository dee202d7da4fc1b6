"""Impossible settings of the pruning and of its methods."""

from __future__ import annotations

import re
from pathlib import Path

from entprune_ds.config_checks_score import estimator_problems
from entprune_ds.config_schema import Config
from entprune_ds.race_plan import race_problems

CRITERIA = (
    "ced", "ced_abs", "loss", "random", "every_other", "explicit",
    "mse", "ld_pruner", "flux_lite", "shortgpt",
    "magnitude_l1", "magnitude_l2", "taylor", "diff_pruning", "learned", "combined", "recovery_race",
)  # fmt: skip
SWEEP_CRITERIA = ("ced", "ced_abs", "loss", "mse", "ld_pruner", "flux_lite", "shortgpt")
"""Those whose order depends on the scores of a sweep."""
NOT_COMBINED = ("combined", "recovery_race")
"""Criteria that `prune.combined` cannot hold."""
MAX_GROUP = 16
"""Most blocks that `learned.group_size` may put into a group."""


def pruning_problems(config: Config) -> list[str]:
    """Impossible values of `prune.*`, `score.*` and the methods; the rest of the settings is sound."""
    prune, score, depth = config.prune, config.score, len(config.model.blocks)
    found: list[str] = []
    found += _criterion_problems(config)
    minima = dict(num_checks=1, ntk_samples=2, ntk_repeats=1, zico_batches=2, zico_batch_size=1, max_blocks_per_check=1)
    if prune.rollback and not re.fullmatch(r"step_\d+", prune.rollback):
        found.append(f"`prune.rollback` must name a checkpoint, such as step_400, got {prune.rollback}.")
    if prune.regrow_micro_batch and config.train.micro_batch_size is None:
        message = "`prune.regrow_micro_batch` needs `train.micro_batch_size`: without it a whole batch is one "
        found.append(message + "micro-batch already. Set it, or switch regrowing off.")
    if prune.regrow_micro_batch and config.parallel.pipe_stages > 1:
        message = "`prune.regrow_micro_batch` needs parallel.pipe_stages=1: a pipeline idles longer with fewer "
        found.append(message + "micro-batches. Switch it off, or train without a pipeline.")
    for key, least in minima.items():
        got = getattr(prune, key)
        if got is not None and got < least:
            found.append(f"`prune.{key}` must be at least {least}, got {got}.")
    if min(prune.vote_weights) < 0 or sum(prune.vote_weights) <= 0:
        found.append(f"`prune.vote_weights` must be at least 0 and not both 0, got {list(prune.vote_weights)}.")
    if prune.vote_tolerance < 0:
        found.append(f"`prune.vote_tolerance` must be at least 0, got {prune.vote_tolerance}.")
    found += _score_problems(config) or estimator_problems(config, SWEEP_CRITERIA)
    found += _gradient_problems(config)
    found += _learned_problems(config)
    found += _distill_problems(config)
    if prune.target_depth is None or found:
        return found
    if not 1 <= prune.target_depth < depth:
        if prune.target_depth < 1:
            found.append(f"`prune.target_depth` must be at least 1, got {prune.target_depth}. Raise it.")
            return found
        message = f"`prune.target_depth` must be below the {depth} blocks of the model, got {prune.target_depth}. "
        found.append(message + "Lower it.")
        return found
    if score.draws % score.batch_size or score.draws < 2 * score.batch_size:
        message = "`score.batch_size` must divide `score.draws` into at least 2 groups "
        found.append(message + f"({score.draws}), got {score.batch_size}.")
    end = config.train.num_steps if prune.end_step is None else prune.end_step
    if not 0 <= prune.start_step < end <= config.train.num_steps:
        message = "`prune.start_step` < `prune.end_step` <= `train.num_steps` must hold, got "
        found.append(message + f"{prune.start_step}, {end}, {config.train.num_steps}.")
    elif end - prune.start_step < prune.num_checks:
        message = f"`prune.num_checks` ({prune.num_checks}) needs as many steps of pruning phase, "
        found.append(message + f"got {end - prune.start_step}.")
    cap, to_remove = prune.max_blocks_per_check, depth - prune.target_depth
    if cap is not None and cap * prune.num_checks < to_remove:
        message = f"`prune.max_blocks_per_check` x `prune.num_checks` must reach {to_remove} blocks, "
        found.append(message + f"got {cap} x {prune.num_checks}. Raise one of them.")
    if prune.criterion == "explicit":
        order = prune.explicit_order
        if len(set(order)) != len(order) or not set(order) <= set(config.model.blocks) or len(order) < to_remove:
            message = f"`prune.explicit_order` must list at least {to_remove} different present blocks, "
            found.append(message + f"got {list(order)}.")
    if prune.criterion == "recovery_race" and not found:
        found += race_problems(config)
    return found


def _score_problems(config: Config) -> list[str]:
    """Values of `score.*`."""
    score, found = config.score, []
    for key, least in dict(draws=2, batch_size=1, stack_memory=1).items():
        if getattr(score, key) < least:
            found.append(f"`score.{key}` must be at least {least}, got {getattr(score, key)}.")
    choices: dict[str, tuple[str, ...]] = dict(dtype=("float32", "float64"), sweep=("always", "needed"))
    choices |= dict(unit=("block", "attention", "mlp"), mode=("once", "greedy"))
    for key, known in choices.items():
        if getattr(score, key) not in known:
            found.append(f"`score.{key}` must be one of {', '.join(known)}, got {getattr(score, key)}.")
    if score.mode == "greedy" and config.prune.criterion not in SWEEP_CRITERIA:
        message = f"`score.mode=greedy` scores again by the sweep, on which `prune.criterion` {config.prune.criterion} "
        found.append(message + f"does not depend. Set score.mode=once, or choose one of {', '.join(SWEEP_CRITERIA)}.")
    return found


def _criterion_problems(config: Config) -> list[str]:
    """The name, file or combination of `prune.criterion`."""
    criterion = config.prune.criterion
    if criterion.endswith(".py"):
        if Path(criterion).is_file():
            return []
        return [
            f"`prune.criterion` is {criterion}, which is not a file. Correct the path: docs/CRITERIA.md has an example."
        ]
    if criterion not in CRITERIA:
        return [f"`prune.criterion` must be one of {', '.join(CRITERIA)}, or a path that ends in .py, got {criterion}."]
    try:
        weights = config.prune.combined_weights
    except ValueError as problem:
        return [str(problem)]
    unknown = [name for name in weights if name not in CRITERIA or name in NOT_COMBINED]
    if unknown:
        members = ", ".join(name for name in CRITERIA if name not in NOT_COMBINED)
        return [f"`prune.combined` may hold {members}, got {', '.join(unknown)}."]
    if criterion == "combined" and not weights:
        return ["`prune.criterion=combined` needs `prune.combined`, such as prune.combined=[ced:1,loss:0.5]. Set it."]
    return []


def _gradient_problems(config: Config) -> list[str]:
    """Settings of taylor and diff_pruning."""
    score, found = config.score, []
    for key, least in dict(gradient_batches=2, gradient_batch_size=1).items():
        if getattr(score, key) < least:
            found.append(f"`score.{key}` must be at least {least}, got {getattr(score, key)}.")
    if not all(0 <= t < 1 for t in score.taylor_t):
        found.append(f"`score.taylor_t` must lie in [0, 1), got {list(score.taylor_t)}.")
    if score.taylor_t and score.gradient_batch_size % len(score.taylor_t):
        message = f"`score.gradient_batch_size` ({score.gradient_batch_size}) must be a multiple of the "
        found.append(message + f"{len(score.taylor_t)} times of `score.taylor_t`. Change one of them.")
    if not 0 <= score.diff_pruning_threshold < 1:
        found.append(f"`score.diff_pruning_threshold` must lie in [0, 1), got {score.diff_pruning_threshold}.")
    return found


def _learned_problems(config: Config) -> list[str]:
    """Settings of `learned.*`."""
    learned, found = config.learned, []
    for key, least in dict(steps=1, batch_size=1, lora_rank=0).items():
        if getattr(learned, key) < least:
            found.append(f"`learned.{key}` must be at least {least}, got {getattr(learned, key)}.")
    if not 2 <= learned.group_size <= MAX_GROUP:  # at most C(16, 8) = 12,870 masks
        found.append(f"`learned.group_size` must lie in [2, {MAX_GROUP}], got {learned.group_size}.")
    for key in ("learning_rate", "scale", "lora_learning_rate"):
        if getattr(learned, key) <= 0:
            found.append(f"`learned.{key}` must be above 0, got {getattr(learned, key)}.")
    if not 0 < learned.tau[1] <= learned.tau[0]:
        found.append(f"`learned.tau` must be two numbers, the first at least the second, got {list(learned.tau)}.")
    return found


def _distill_problems(config: Config) -> list[str]:
    """Values of `distill.*`."""
    distill, found = config.distill, []
    choices = dict(
        kind=("none", "output", "features"), placement=("sharded", "whole"), dtype=("train", "float32", "bfloat16")
    )
    for key, known in choices.items():
        if getattr(distill, key) not in known:
            found.append(f"`distill.{key}` must be one of {', '.join(known)}, got {getattr(distill, key)}.")
    for key in ("plain_weight", "output_weight", "feature_weight"):
        if (getattr(distill, key) or 0) < 0:
            found.append(f"`distill.{key}` must be at least 0, got {getattr(distill, key)}.")
    if distill.plain_weight <= 0 and distill.output_weight <= 0:
        found.append("`distill.plain_weight` and `distill.output_weight` must not both be 0. Raise one of them.")
    if distill.feature_sigma <= 0:
        found.append(f"`distill.feature_sigma` must be above 0, got {distill.feature_sigma}.")
    if distill.start is not None and not 0 <= distill.start < config.train.num_steps:
        message = f"`distill.start` must lie in [0, train.num_steps), got {distill.start}. "
        found.append(message + f"Choose a step below {config.train.num_steps}.")
    if distill.kind == "none" and distill.teacher:
        message = f"`distill.teacher` is {distill.teacher}, but `distill.kind` is none: nothing would be learned from "
        found.append(message + "it. Set distill.kind=output or features, or leave the teacher out.")
    return found
