"""The criterion that the settings ask for: a line of the table, or a user's own file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from entprune_ds.config import PruneConfig
from entprune_ds.importance.criteria import Criterion, find_criterion
from entprune_ds.user_criterion import guarded


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
    spec = importlib.util.spec_from_file_location(f"user_criterion_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"`prune.criterion`: {path} cannot be run ({why}). Correct it.") from error
    criterion = vars(module).get("CRITERION")
    if not isinstance(criterion, Criterion):
        message = f"`prune.criterion`: {path} must define CRITERION = Criterion(...), got {criterion!r}. "
        raise ValueError(message + "docs/CRITERIA.md has an example.")
    return guarded(path, criterion)
