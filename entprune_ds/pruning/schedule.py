"""When checks stand and which depths each may choose (one-shot pruning is the case of a single check)."""

from __future__ import annotations

from collections.abc import Sequence

from entprune_ds.config import Config, PruneConfig


def check_steps(start: int, end: int, num_checks: int) -> list[int]:
    """Steps of the checks: the START of each of `num_checks` equal parts of [start, end), with recovery after each.

    Raises:
        ValueError: when the phase has fewer steps than checks.
    """
    if num_checks < 1 or end - start < num_checks:
        raise ValueError(f"{num_checks} checks need as many steps of pruning phase, got {start} to {end}.")
    return [start + i * (end - start) // num_checks for i in range(num_checks)]


def planned_checks(config: Config) -> list[int]:
    """Steps of the pruning checks; none without a target depth, and none where soft pruning takes their place."""
    return [] if config.prune.target_depth is None or config.soft.every else scheduled_checks(config)


def scheduled_checks(config: Config) -> list[int]:
    """Steps of the checks that the schedule has, whether or not anything asks for them."""
    prune = config.prune
    return check_steps(prune.start_step, prune.end_step or config.train.num_steps, prune.num_checks)


def default_cap(depth: int, target: int, num_checks: int) -> int:
    """Most blocks that one check may remove by default: ceil(2 (depth - target) / num_checks), at least 1."""
    return max(1, -(-2 * (depth - target) // num_checks))


def blocks_per_check(prune: PruneConfig, original_depth: int) -> int:
    """Most blocks that one check may remove: prune.max_blocks_per_check, or the default."""
    return prune.max_blocks_per_check or default_cap(original_depth, prune.target_depth or 1, prune.num_checks)


def usable_checks(steps: Sequence[int], last_removal: int | None, gap: int) -> int:
    """How many of some checks may remove, when `gap` steps must lie between two removals.

    Args:
        steps: of the checks, in order.
        last_removal: step of the removal before them; None when there was none.
        gap: prune.min_steps_between.
    """
    count, last = 0, last_removal
    for step in steps:
        if last is None or step - last >= gap:
            count, last = count + 1, step
    return count


def schedule_problem(config: Config) -> str | None:
    """Why the checks cannot reach the target with `prune.min_steps_between` steps between removals, or None."""
    prune, steps, depth = config.prune, planned_checks(config), len(config.model.blocks)
    if prune.target_depth is None or prune.score_only or config.soft.every:
        return None
    usable, cap = usable_checks(steps, None, prune.min_steps_between), blocks_per_check(prune, depth)
    if depth - prune.target_depth <= cap * usable:
        return None
    message = f"`prune.min_steps_between` ({prune.min_steps_between}) leaves {usable} of the {len(steps)} checks, too "
    message += f"few to remove {depth - prune.target_depth} blocks with at most {cap} each. Lower it, or raise "
    return message + "`prune.max_blocks_per_check` or `prune.end_step`."


def candidate_depths(
    depth_now: int, target: int, cap: int, checks_left: int, checks_after_removal: int | None = None
) -> list[int]:
    """Depths that this check may choose, deepest first.

    The current depth (remove nothing) is among them unless the cap would then keep the remaining checks from
    reaching the target; so the last check always reaches it.

    Args:
        depth_now: present blocks.
        target: blocks at the end of the run.
        cap: most blocks that one check removes.
        checks_left: checks that remain if this one removes nothing, this one included.
        checks_after_removal: checks that remain after this one if it removes something; None means all the others.
            Fewer, when steps must lie between two removals.

    Raises:
        ValueError: when the checks that remain cannot reach the target under the cap.
    """
    to_remove = max(0, depth_now - target)
    after = checks_left - 1 if checks_after_removal is None else checks_after_removal
    left = {removed: (after if removed else checks_left - 1) for removed in range(min(cap, to_remove) + 1)}
    depths = [depth_now - removed for removed, checks in left.items() if to_remove - removed <= cap * checks]
    if cap < 1 or checks_left < 1 or not depths:
        raise ValueError(
            f"{to_remove} blocks remain to be removed (depth {depth_now} to {target}), more than {checks_left} "
            f"checks of at most {cap} can. Raise `prune.max_blocks_per_check` or `prune.num_checks`."
        )
    return depths


def blocks_at_depth(kept_blocks: Sequence[int], order: Sequence[int], depth: int) -> list[int]:
    """Blocks that remain, sorted, when the first of `order` go until `depth` are left.

    Raises:
        ValueError: when `order` is not an order of `kept_blocks`, or `depth` is out of range.
    """
    if sorted(order) != sorted(kept_blocks) or not 0 <= depth <= len(order):
        raise ValueError(f"depth {depth} and order {list(order)} do not fit the blocks {list(kept_blocks)}.")
    return sorted(order[len(order) - depth :])
