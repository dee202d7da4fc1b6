"""The criterion that the settings ask for: a line of the table, or a user's own file."""

from __future__ import annotations

from pathlib import Path

from entprune_ds.config import PruneConfig
from entprune_ds.importance.criteria import Criterion, find_criterion
from entprune_ds.user_criterion import guarded
from entprune_ds.user_file import object_of_file


def chosen_criterion(prune: PruneConfig) -> Criterion:
    """The criterion of a run.

    Raises:
        ValueError: when it is not known, or its file does not define one.
    """
    if prune.criterion.endswith(".py"):
        return load_criterion(Path(prune.criterion))
    return find_criterion(prune.criterion)


def load_criterion(path: Path) -> Criterion:
    """CRITERION of a user's Python file, whose code runs here.

    Raises:
        ValueError: when the file cannot be run, or defines no CRITERION.
    """
    found = object_of_file(path, "CRITERION", Criterion, "prune.criterion", "docs/CRITERIA.md shows")
    return guarded(path, found)
