"""Impossible settings of the pruning and of its methods."""

from __future__ import annotations

import re

from entprune_ds.config_checks_soft import soft_problems
from entprune_ds.config_schema import Config

CRITERIA = ("ced", "ced_abs", "loss", "random", "every_other", "explicit", "gradient_flow")


def pruning_problems(config: Config) -> list[str]:
    """Impossible values of `prune.*`, `score.*` and the methods; the rest of the settings is sound."""
    prune, score, depth = config.prune, config.score, len(config.model.blocks)
    found: list[str] = []
    if prune.criterion not in CRITERIA:
        found.append(f"`prune.criterion` must be one of {', '.join(CRITERIA)}, got {prune.criterion}.")
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
    found += _score_problems(config)
    found += soft_problems(config)
    if config.soft.every and not found:
        found += gradient_draw_problems(config)
    if prune.target_depth is None or config.soft.every or found:
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
    if prune.criterion == "gradient_flow":
        found += gradient_draw_problems(config)
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
    return found


def _score_problems(config: Config) -> list[str]:
    """Values of `score.*`."""
    score, found = config.score, []
    for key, least in dict(draws=2, batch_size=1).items():
        if getattr(score, key) < least:
            found.append(f"`score.{key}` must be at least {least}, got {getattr(score, key)}.")
    for key, known in dict(dtype=("float32", "float64"), sweep=("always", "needed")).items():
        if getattr(score, key) not in known:
            found.append(f"`score.{key}` must be one of {', '.join(known)}, got {getattr(score, key)}.")
    return found


def gradient_draw_problems(config: Config) -> list[str]:
    """Draws of the gradient-flow scores that cannot be split into groups."""
    draws, size = config.score.gradient_draws, config.score.gradient_batch_size
    if size >= 1 and draws % size == 0 and draws >= 2 * size:
        return []
    message = f"`score.gradient_batch_size` must divide `score.gradient_draws` into at least 2 groups ({draws}), "
    return [message + f"got {size}."]
