"""A job that finds its folder in use."""

from __future__ import annotations

from pathlib import Path

from entprune_ds import comm
from entprune_ds.faults import locked_by_job


def refused(folder: str) -> str:
    """What every rank is told."""
    try:
        with locked_by_job([Path(folder)], "`out`"):
            return "the lock was taken"
    except comm.DistributedError as error:
        return str(error)
