"""Impossible settings of the methods beside the vote: gradient criteria, learned gates, distillation."""

from __future__ import annotations

from entprune_ds.config_schema import Config

MAX_GROUP = 16
"""Most blocks that `learned.group_size` may put into a group."""


def method_problems(config: Config) -> list[str]:
    """Impossible values of the methods' own sections."""
    return [*_gradient_problems(config), *_learned_problems(config), *_distill_problems(config)]


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
