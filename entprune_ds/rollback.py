"""Going back to the checkpoint before a removal (prune.rollback); what came later moves aside, nothing is deleted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import yaml

from entprune_ds import comm
from entprune_ds.atomic import write_text
from entprune_ds.config import Config, PruneConfig, config_from_dict
from entprune_ds.engine.checkpoint import file_problems, read_checkpoint, step_folders
from entprune_ds.logs import get_logger
from entprune_ds.plain_yaml import read_yaml
from entprune_ds.pruning.schedule import blocks_per_check, planned_checks, usable_checks


def step_of(name: str) -> int:
    """Training step of step_400 or step_00000400."""
    return int(name.removeprefix("step_"))


def rollback_pending(config: Config) -> bool:
    """Whether this start has to go back: prune.rollback is set, and no earlier start did so with these settings."""
    if not config.prune.rollback:
        return False
    stored = _stored(config)
    return stored is None or _normal(stored.prune) != _normal(config.prune)


def rollback_done(config: Config) -> str:
    """What config.yaml is to say: a start without prune.rollback does not forget what an earlier one has done."""
    stored = _stored(config)
    return config.prune.rollback or ("" if stored is None else stored.prune.rollback)


def _stored(config: Config) -> Config | None:
    try:
        return config_from_dict(read_yaml((config.run_dir / "config.yaml").read_text()))
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        return None


def _normal(prune: PruneConfig) -> PruneConfig:
    return replace(prune, rollback=prune.rollback and f"step_{step_of(prune.rollback)}")


def rollback_problem(config: Config) -> str | None:
    """Why there is nothing to go back to, or why going back leads nowhere, with a remedy, or None."""
    if not rollback_pending(config):
        return None
    root, wanted = _root(config), config.prune.rollback
    folders = {step_of(p.name): p for p in step_folders(root)}
    folder = folders.get(step_of(wanted))
    if folder is None:
        there = f"There are {', '.join(p.name for p in folders.values())}" if folders else "There is none"
        message = f"`prune.rollback` is {wanted}, but {root} holds no such checkpoint. {there}"
        return message + "; those before a removal are always kept."
    if step_of(wanted) == max(folders) and not list(root.glob("superseded_*")):  # else: interrupted while moving them
        return f"`prune.rollback`: {folder.name} is the newest checkpoint, there is nothing to undo. Leave it out."
    try:
        depth = len(read_checkpoint(folder).kept_blocks)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # roll_back() says what is wrong with it
    return _schedule_problem(config, folder.name, depth)


def _schedule_problem(config: Config, name: str, depth: int) -> str | None:
    prune = config.prune
    if prune.target_depth is None or prune.score_only or config.soft.every:
        return None
    if prune.target_depth > depth:
        message = f"`prune.target_depth` is {prune.target_depth}, but {name} holds {depth} blocks. Lower it, or give "
        return message + "`prune.rollback` an earlier checkpoint."
    left = usable_checks([s for s in planned_checks(config) if s >= step_of(name)], None, prune.min_steps_between)
    cap = blocks_per_check(prune, len(config.model.blocks))
    if depth - prune.target_depth <= cap * left:
        return None
    message = f"`prune.rollback`: from {name} on, {left} checks of at most {cap} blocks stand before the end, too few "
    message += f"to come from depth {depth} to {prune.target_depth}. Raise `prune.num_checks`, `prune.end_step` or "
    return message + "`prune.max_blocks_per_check`."


def roll_back(config: Config) -> None:
    """Make the named checkpoint the newest one; later ones move to a folder `superseded_N` beside it. Collective.

    Interrupted anywhere, the same command does the rest: config.yaml, which says that it is done, is written later.

    Raises:
        DistributedError: on all ranks, when that checkpoint is damaged or the folder cannot be written.
    """
    if not comm.broadcast_json(rollback_pending(config)):
        return
    root, step = _root(config), step_of(config.prune.rollback)
    folders = comm.broadcast_json([str(p) for p in step_folders(root)])
    [target] = [Path(name) for name in folders if step_of(Path(name).name) == step]
    later = [Path(name) for name in folders if step_of(Path(name).name) > step]
    problems = [p for part in comm.all_gather_json(file_problems(target)) for p in part]
    error = f"`prune.rollback`: {target} is damaged: {problems[0]}. Choose another checkpoint." if problems else None
    if error is None:
        try:
            read_checkpoint(target)
        except ValueError as problem:  # of a newer version: before anything moves
            error = str(problem)
    comm.raise_together(error)
    set_aside(root, target, later)
    if later:
        get_logger().info("rolled back to %s; %d later checkpoints are set aside", target.name, len(later))


def set_aside(root: Path, newest: Path | None, later: list[Path]) -> None:
    """Move checkpoints to a folder `superseded_N` beside them. Collective.

    Args:
        root: the checkpoints folder.
        newest: the one that stays newest, None when none stays.
        later: those to move, oldest first.

    Raises:
        DistributedError: on all ranks, when the folder cannot be written.
    """
    error = None
    if comm.is_main() and later:
        try:
            if newest is not None:
                write_text(root / "latest", newest.name)
            else:
                (root / "latest").unlink(missing_ok=True)
            taken = [p.name.removeprefix("superseded_") for p in root.glob("superseded_*")]
            aside = root / f"superseded_{1 + max((int(n) for n in taken if n.isdecimal()), default=0)}"
            aside.mkdir()
            for folder in reversed(later):  # the newest first: a resume in between finds no gap
                os.replace(folder, aside / folder.name)
        except OSError as problem:
            error = f"cannot move later checkpoints in {root}: {problem}. Free space, then run the same command again."
    comm.raise_together(error)


def _root(config: Config) -> Path:
    return config.run_dir / "checkpoints"
