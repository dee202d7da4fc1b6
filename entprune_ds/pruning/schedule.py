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
    prune = config.prune
    if prune.target_depth is None or config.soft.every:
        return []
    return check_steps(prune.start_step, prune.end_step or config.train.num_steps, prune.num_checks)


def default_cap(depth: int, target: int, num_checks: int) -> int:
    """Most blocks that one check may remove by default: ceil(2 (depth - target) / num_checks), at least 1."""
    return max(1, -(-2 * (depth - target) // num_checks))


def blocks_per_check(prune: PruneConfig, original_depth: int) -> int:
    """Most blocks that one check may remove: prune.max_blocks_per_check, or the default."""
    return prune.max_blocks_per_check or default_cap(original_depth, prune.target_depth or 1, prune.num_checks)


def candidate_depths(depth_now: int, target: int, cap: int, checks_left: int) -> list[int]:
    """Depths that this check may choose, deepest first.

    The current depth (remove nothing) is among them unless the cap would then keep the remaining checks from
    reaching the target; so the last check always reaches it.

    Args:
        depth_now: present blocks.
        target: blocks at the end of the run.
        cap: most blocks that one check removes.
        checks_left: checks that remain, this one included.

    Raises:
        ValueError: when the checks that remain cannot reach the target under the cap.
    """
    to_remove = max(0, depth_now - target)
    if cap < 1 or checks_left < 1 or to_remove > cap * checks_left:
        raise ValueError(
            f"{to_remove} blocks remain to be removed (depth {depth_now} to {target}), more than {checks_left} "
            f"checks of at most {cap} can. Raise `prune.max_blocks_per_check` or `prune.num_checks`."
        )
    least = max(0, to_remove - cap * (checks_left - 1))
    return [depth_now - removed for removed in range(least, min(cap, to_remove) + 1)]


def blocks_at_depth(kept_blocks: Sequence[int], order: Sequence[int], depth: int) -> list[int]:
    """Blocks that remain, sorted, when the first of `order` go until `depth` are left.

    Raises:
        ValueError: when `order` is not an order of `kept_blocks`, or `depth` is out of range.
    """
    if sorted(order) != sorted(kept_blocks) or not 0 <= depth <= len(order):
        raise ValueError(f"depth {depth} and order {list(order)} do not fit the blocks {list(kept_blocks)}.")
    return sorted(order[len(order) - depth :])
