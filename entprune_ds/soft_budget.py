"""When soft pruning updates its mask and removes, and how many multiply-accumulates it may keep. Pure arithmetic."""

from __future__ import annotations

from entprune_ds.config_schema import Config
from entprune_ds.macs import blocks_macs, unit_macs


def soft_end(config: Config) -> int:
    """Step of the last update, which removes: soft.end_step, or after three quarters of the training."""
    return config.train.num_steps * 3 // 4 if config.soft.end_step is None else config.soft.end_step


def update_steps(config: Config) -> list[int]:
    """Steps before which the mask is updated; none when soft pruning is off."""
    soft, end = config.soft, soft_end(config)
    return [*range(soft.start_step + soft.every, end, soft.every), end] if soft.every else []


def removal_steps(config: Config) -> list[int]:
    """Those of the updates that also remove, evenly over them; the last update is the last removal."""
    steps, count = update_steps(config), config.soft.removals
    return sorted({steps[-(-len(steps) * i // count) - 1] for i in range(1, count + 1)}) if steps else []


def target_share(config: Config) -> float:
    """Multiply-accumulates of the blocks at the end over those at the start, at most."""
    if config.soft.target_macs is not None:
        return config.soft.target_macs
    return (config.prune.target_depth or 0) / len(config.model.blocks)


def least_share(config: Config) -> float:
    """The smallest share that can be reached: protected blocks, or else one, with a head and a channel always stay."""
    model, units, full = config.model, unit_macs(config.model), blocks_macs(config.model)
    smallest = {}
    for block in model.blocks:
        heads, channels = model.widths(block)
        heads, channels = 1 if "head" in config.soft.units else heads, 1 if "channel" in config.soft.units else channels
        smallest[block] = units.total(heads, channels)
    if "block" not in config.soft.units:
        return sum(smallest.values()) / full
    return (sum(smallest[b] for b in config.protected_blocks) or min(smallest.values())) / full


def least_depth(config: Config) -> int:
    """A depth that soft pruning cannot fall below."""
    depth = len(config.model.blocks)
    if "block" not in config.soft.units:
        return depth
    narrow = len(config.soft.units) > 1 or config.model.block_widths
    return max(1, len(config.protected_blocks), 0 if narrow else int(target_share(config) * depth + 1e-9))


def budget(config: Config, step: int) -> float:
    """C(step): share of the multiply-accumulates that the mask may keep, from 1 to the target."""
    done = (step - config.soft.start_step) / (soft_end(config) - config.soft.start_step)
    left = 1 - min(max(done, 0.0), 1.0)
    end = target_share(config)
    return end + (1 - end) * (left if config.soft.schedule == "linear" else left**3)
