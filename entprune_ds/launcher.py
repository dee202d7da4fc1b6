"""The launcher above this rank: when it is killed alone, its ranks would train on as orphans, holding their GPUs."""

from __future__ import annotations

import psutil

WORDS = ("deepspeed.launcher", "bin/deepspeed", "torchrun", "torch.distributed.run", "torch.distributed.launch")
"""What the command line of a launcher of deepspeed or torch contains."""


def launchers() -> list[psutil.Process]:
    """The launcher processes above this one, nearest first; a shell above them may go (nohup) and is not among them."""
    found: list[psutil.Process] = []
    for process in psutil.Process().parents():
        try:
            words = process.cmdline()
        except psutil.Error:
            break
        if not any(word in part for part in words[:5] for word in WORDS):
            break
        found.append(process)
    return found


def first_gone(processes: list[psutil.Process]) -> psutil.Process | None:
    """The first of some processes that has ended, or None."""
    return next((p for p in processes if not _alive(p)), None)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
