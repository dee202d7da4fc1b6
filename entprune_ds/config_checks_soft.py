"""Impossible settings of soft pruning."""

from __future__ import annotations

from entprune_ds.config_schema import Config
from entprune_ds.soft_budget import least_share, soft_end, target_share

UNITS = ("block", "head", "channel")
SCHEDULES = ("linear", "cubic")


def soft_problems(config: Config) -> list[str]:
    """Values of `soft.*`, and what they cannot be combined with; nothing while soft pruning is off."""
    soft, found = config.soft, list[str]()
    if soft.every < 0:
        return [f"`soft.every` must be at least 0, got {soft.every}."]
    if not soft.every:
        return []
    if not soft.units or not set(soft.units) <= set(UNITS) or len(set(soft.units)) < len(soft.units):
        found.append(f"`soft.units` must be some of {', '.join(UNITS)}, each once, got {list(soft.units)}.")
    if soft.schedule not in SCHEDULES:
        found.append(f"`soft.schedule` must be one of {', '.join(SCHEDULES)}, got {soft.schedule}.")
    for key in ("eta", "budget_weight", "removals"):
        if getattr(soft, key) <= 0:
            found.append(f"`soft.{key}` must be above 0, got {getattr(soft, key)}.")
    if soft.eta * soft.budget_weight > 0.5:
        message = f"`soft.eta` x `soft.budget_weight` must be at most 0.5, got {soft.eta * soft.budget_weight:g}: "
        found.append(message + "above, the mask overshoots its budget at every update. Lower one of them.")
    if not 0 < soft.threshold < 1:
        found.append(f"`soft.threshold` must lie between 0 and 1, got {soft.threshold}.")
    if config.prune.score_only:
        found.append("`prune.score_only` has no meaning with soft pruning. Set soft.every=0, or leave it out.")
    unheard = [k for k in ("min_steps_between", "recovery_tolerance") if getattr(config.prune, k)]
    if unheard:
        keys = ", ".join(f"`prune.{key}`" for key in unheard)
        found.append(f"{keys}: soft pruning has no checks that would follow it. Set soft.every=0, or leave it out.")
    end = soft_end(config)
    if not 0 <= soft.start_step < end < config.train.num_steps:
        message = "`soft.start_step` < `soft.end_step` < `train.num_steps` must hold, got "
        found.append(message + f"{soft.start_step}, {end}, {config.train.num_steps}.")
    elif (end - soft.start_step) // soft.every < soft.removals:
        message = f"`soft.removals` ({soft.removals}) needs as many updates, one every {soft.every} steps between "
        given = "" if soft.end_step is not None else " (three quarters of the run, as `soft.end_step` is not set)"
        found.append(message + f"{soft.start_step} and {end}{given}. Lower it or `soft.every`.")
    return found


def soft_target_problems(config: Config) -> list[str]:
    """A target that is missing or out of reach; all other settings are sound."""
    soft, share = config.soft, target_share(config)
    if soft.target_macs is None and config.prune.target_depth is None:
        return ["`soft.target_macs` or `prune.target_depth` must say how much remains. Set one of them."]
    what = "`soft.target_macs`" if soft.target_macs is not None else "`prune.target_depth` / `model.depth`"
    if not 0 < share < 1:
        return [f"{what} must lie between 0 and 1, got {share:g}."]
    if share * (1 + 1e-9) < (least := least_share(config)):
        message = f"{what} is {share:g}, but with `soft.units` {list(soft.units)} and `prune.protected_blocks` "
        message += f"{list(config.protected_blocks)} at least {least:.3g} stays. "
        return [message + "Raise it, add units, or protect fewer blocks."]
    return []
