"""Impossible settings of the pruning and of its methods."""

from __future__ import annotations

import re
from pathlib import Path

from entprune_ds.config_checks_methods import method_problems
from entprune_ds.config_checks_score import estimator_problems
from entprune_ds.config_checks_soft import soft_problems, soft_target_problems
from entprune_ds.config_methods import CRITERIA, METHODS, SWEEP_CRITERIA
from entprune_ds.config_schema import Config
from entprune_ds.race_plan import race_problems

NOT_COMBINED = ("combined", "recovery_race")
"""Criteria that `prune.combined` cannot hold: a race judges sets, not blocks."""


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
    weights = prune.vote_weights
    if len(weights) != 3:
        message = f"`prune.vote_weights` must be 3 numbers (NTK, ZiCo, step time), got {list(weights)}. "
        found.append(message + "Write 0 for what has no vote, e.g. [1,1,0].")
    elif min(weights) < 0 or sum(weights) <= 0:
        found.append(f"`prune.vote_weights` must be at least 0 and not all 0, got {list(weights)}.")
    if prune.vote_tolerance < 0:
        found.append(f"`prune.vote_tolerance` must be at least 0, got {prune.vote_tolerance}.")
    found += _score_problems(config) or estimator_problems(config, SWEEP_CRITERIA)
    found += [*method_problems(config), *soft_problems(config)]
    found += _waiting_problems(config)
    if prune.method and prune.method not in METHODS:
        found.append(f"`prune.method` must be empty or one of {', '.join(METHODS)}, got {prune.method}.")
    if config.soft.every and not found:
        found += _unknown_protected(config) or soft_target_problems(config)
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
        message = f"`score.batch_size` must divide `score.draws` ({score.draws}) and be at most half of it, for the "
        found.append(f"{message}jackknife, got {score.batch_size}. Lower it, or raise `score.draws`.")
    end = config.train.num_steps if prune.end_step is None else prune.end_step
    if not 0 <= prune.start_step < end <= config.train.num_steps:
        message = "`prune.start_step` < `prune.end_step` <= `train.num_steps` must hold, got "
        found.append(message + f"{prune.start_step}, {end}, {config.train.num_steps}. Lower the first two.")
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
    found += _protected_problems(config)
    if prune.criterion == "recovery_race" and not found:
        found += race_problems(config)
    return found


def _waiting_problems(config: Config) -> list[str]:
    """Values of what a check may wait for."""
    prune, found = config.prune, []
    for key in ("min_steps_between", "recovery_tolerance"):
        got = getattr(prune, key)
        if got is not None and got < 0:
            found.append(f"`prune.{key}` must be at least 0, got {got}.")
    if prune.recovery_tolerance is not None and not config.train.validate_every:
        message = "`prune.recovery_tolerance` looks at the validation loss, but `train.validate_every` is 0. "
        found.append(message + "Set that, or prune.recovery_tolerance=null.")
    return found


def _protected_problems(config: Config) -> list[str]:
    """Protected blocks that are not there, or leave too few to be removed."""
    prune, blocks = config.prune, config.model.blocks
    if unknown := _unknown_protected(config):
        return unknown
    protected = config.protected_blocks
    if len(protected) > (prune.target_depth or 0):
        message = f"`prune.protected_blocks` keeps {len(protected)} of {len(blocks)} blocks for good, more than "
        message += f"`prune.target_depth` ({prune.target_depth}). Protect fewer, or raise prune.target_depth."
        return [message]
    both = [b for b in prune.explicit_order if b in protected] if prune.criterion == "explicit" else []
    if both:
        return [f"`prune.explicit_order` removes {both}, which `prune.protected_blocks` keeps. Take them out of one."]
    return []


def _unknown_protected(config: Config) -> list[str]:
    """Protected blocks that are not there."""
    asked, blocks = config.prune.protected_blocks, config.model.blocks
    unknown = [b for b in asked if b not in blocks and not -len(blocks) <= b < 0]
    message = f"`prune.protected_blocks` names {unknown}, but the model has blocks {list(blocks)}. "
    return [message + "Take them out; -1 is the last block."] if unknown else []


def _score_problems(config: Config) -> list[str]:
    """Values of `score.*`."""
    score, found = config.score, []
    for key, least in dict(draws=2, batch_size=1, stack_memory=1).items():
        if getattr(score, key) < least:
            found.append(f"`score.{key}` must be at least {least}, got {getattr(score, key)}.")
    choices: dict[str, tuple[str, ...]] = dict(dtype=("float32", "float64"), sweep=("always", "needed"))
    choices |= dict(unit=("block", "attention", "mlp"), mode=("once", "greedy"), weights=("raw", "ema"))
    for key, known in choices.items():
        if getattr(score, key) not in known:
            found.append(f"`score.{key}` must be one of {', '.join(known)}, got {getattr(score, key)}.")
    unknown = [name for name in score.criteria if name not in CRITERIA and not name.endswith(".py")]
    if unknown:
        found.append(f"`score.criteria` must be among {', '.join(CRITERIA)}, got {', '.join(unknown)}.")
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
