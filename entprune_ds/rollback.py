"""Going back to the checkpoint before a removal (prune.rollback); what came later moves aside, nothing is deleted."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from entprune_ds import comm
from entprune_ds.atomic import write_text
from entprune_ds.config import Config
from entprune_ds.engine.checkpoint import file_problems, step_folders
from entprune_ds.logs import get_logger


def step_of(name: str) -> int:
    """Training step of step_400 or step_00000400."""
    return int(name.removeprefix("step_"))


def rollback_pending(config: Config) -> bool:
    """Whether this start has to go back: prune.rollback is set, and no earlier start has done it."""
    if not config.prune.rollback:
        return False
    try:
        stored = yaml.safe_load((config.run_dir / "config.yaml").read_text())
        return stored["prune"].get("rollback") != config.prune.rollback
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return True


def rollback_problem(config: Config) -> str | None:
    """Why there is nothing to go back to, with what there is, or None."""
    if not rollback_pending(config):
        return None
    names = [p.name for p in step_folders(_root(config))]
    if step_of(config.prune.rollback) in [step_of(name) for name in names]:
        return None
    there = f"There are {', '.join(names)}" if names else "There is none"
    message = f"`prune.rollback` is {config.prune.rollback}, but {_root(config)} holds no such checkpoint. {there}"
    return message + "; those before a removal are always kept."


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
    comm.raise_together(error)
    if comm.is_main() and later:
        try:
            write_text(root / "latest", target.name)
            number = 1 + len(list(root.glob("superseded_*")))
            aside = root / f"superseded_{number}"
            aside.mkdir()
            for folder in reversed(later):  # the newest first: a resume in between finds no gap
                os.replace(folder, aside / folder.name)
            text = "rolled back to %s; %d later checkpoints are in %s. Unchanged settings remove the same blocks again."
            get_logger().info(text, target.name, len(later), aside)
        except OSError as problem:
            error = f"cannot move later checkpoints in {root}: {problem}. Free space, then run the same command again."
    comm.raise_together(error)


def _root(config: Config) -> Path:
    return config.run_dir / "checkpoints"
