"""One job at a time in a folder: a file `lock` in it says who works there."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

LOCK = "lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system without file locks answers."""


LEASE_SECONDS = 100.0
"""Longest time that a file server keeps the lock of a node that has died (NFS: 90 s, mostly)."""


class FolderBusy(ValueError):
    """Another job works in the folder; the message says which, and what to do."""


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Make a folder and hold its lock.

    The lock is an advisory file lock: it vanishes with its process, so whatever a killed job leaves is taken over; that
    of a node that has died vanishes a little later, so a requeued Slurm job waits for its own one.
    Where the file system has no locks, the job that the file names counts: it is taken over when it was this Slurm job
    (requeued), or a process of this host that is gone.

    Args:
        folder: made when missing.
        setting: what names the folder, for messages.

    Raises:
        FolderBusy: when another job holds it.
        OSError: when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with _taken(path, setting) as handle:
        try:
            handle.seek(0)
            handle.truncate()
            handle.write(_ourselves() + "\n")
            handle.flush()
            yield
        finally:
            if _is_there(handle, path):
                path.unlink()


def _taken(path: Path, setting: str) -> IO[str]:
    """The open file that is the lock."""
    end = time.monotonic() + LEASE_SECONDS
    while True:
        handle = open(path, "a+")  # noqa: SIM115 - the caller closes it
        try:
            if not _is_free(handle):
                owner = _owner(handle)
                if not _is_gone(owner) or time.monotonic() > end:
                    raise FolderBusy(_busy(path, owner, setting))
                time.sleep(0.5)
            elif _is_there(handle, path):
                return handle
        except BaseException:
            handle.close()
            raise
        handle.close()  # its owner took it away in between, or is gone


def _is_free(handle: IO[str]) -> bool:
    """Take the file lock; where the file system has none, see who is named in the file."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            raise
        return _is_gone(_owner(handle))
    return True


def _is_there(handle: IO[str], path: Path) -> bool:
    """Whether the open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _ourselves() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"host {socket.gethostname()}, process {os.getpid()}" + (f", Slurm job {job}" if job else "")


def _owner(handle: IO[str]) -> str:
    handle.seek(0)
    return handle.read(1000).strip()


def _is_gone(owner: str) -> bool:
    """Whether the job that a lock names is over, as far as this host can know."""
    found = re.fullmatch(r"host (.+), process (\d+)(?:, Slurm job (.+))?", owner)
    if found is None:
        return not owner
    if found[1] == socket.gethostname():
        return not psutil.pid_exists(int(found[2]))
    return found[3] is not None and found[3] == os.environ.get("SLURM_JOB_ID")


def _busy(path: Path, owner: str, setting: str) -> str:
    message = f"{path.parent} is in use by {owner or 'an unknown process'}. "
    message += f"Wait for it, stop it, or choose another {setting}."
    if owner.startswith(f"host {socket.gethostname()},"):
        return message
    return f"{message} If that job is gone for certain, remove {path} (rm {shlex.quote(str(path))})."
