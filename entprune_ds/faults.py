"""What can go wrong around the training: run folders in use, signals, lost peers, and what the user is told."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from entprune_ds import comm
from entprune_ds.launcher import first_gone, launchers
from entprune_ds.locks import FolderBusy, locked
from entprune_ds.logs import get_logger
from entprune_ds.redact import redacted
from entprune_ds.stop_request import STOPPED, Stopped


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; a BaseException so that no `except Exception` swallows it."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(signal.Signals(number).name)


def raise_on_signals() -> None:
    """Turn SIGTERM and SIGINT into Interrupted at the next Python instruction."""

    def handler(number: int, frame: object) -> None:
        raise Interrupted(number)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


@contextmanager
def locked_by_job(folders: Iterable[Path], setting: str) -> Iterator[None]:
    """Make folders and hold their locks on rank 0 while the whole job works in them. Collective.

    Args:
        folders: to lock.
        setting: what names them, for messages.

    Raises:
        DistributedError: on all ranks, when another job holds one or it cannot be written.
    """
    error = None
    with ExitStack() as held:
        for folder in folders if comm.is_main() else ():
            try:
                held.enter_context(locked(folder, setting))
            except FolderBusy as problem:
                error = str(problem)
            except OSError as problem:
                error = f"{folder} cannot be written: {problem}. Choose another {setting}, or free space."
        comm.raise_together(error)
        yield


def check_space(folder: Path, needed_bytes: int) -> str | None:
    """Problem text when the file system of `folder` has less than `needed_bytes` free, else None."""
    free = shutil.disk_usage(folder).free
    if free >= needed_bytes:
        return None
    need, have = needed_bytes / 2**30, free / 2**30
    message = f"{folder} has {have:.2f} GiB free, but two checkpoints of this model need {need:.2f} GiB. "
    return message + "Free space or choose another `run.root`."


@contextmanager
def watched(seconds: float, folder: Path, remedy: str = "") -> Iterator[None]:
    """End this process when it makes no progress for `seconds`, or when its launcher is gone.

    A hanging peer must not hold the job for ever: the process groups that DeepSpeed makes have time-outs of their own
    (30 minutes), which nothing can set. The stacks of all threads go to a file in the run folder first. What is said
    has LAST_WORDS seconds: the file system may be what hangs.

    Args:
        seconds: without progress.
        folder: takes the stacks.
        remedy: closes what is said; without one it is that of a run whose folder this is.
    """
    done, above = threading.Event(), launchers()

    def remind() -> str:
        return remedy or _remedy(folder)

    def watch() -> None:
        while not done.wait(min(1.0, seconds / 4)):
            gone = first_gone(above)
            if gone is not None:
                _say(f"rank {comm.rank()} stops: its launcher (process {gone.pid}) is gone. {remind()}")
                _leave(75)
            if comm.seconds_without_progress() > seconds:
                speaker = threading.Thread(target=_tell_stalled, args=(seconds, folder, remind()), daemon=True)
                speaker.start()
                speaker.join(LAST_WORDS)
                _leave(75)

    comm.mark_progress()
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


LAST_WORDS = 20.0
"""Longest time that a stalled rank takes to say so."""
STACKS = "stacks"
"""Folder in the run folder: the stacks of all threads of every rank that stalled, the newest ones."""


def _tell_stalled(seconds: float, folder: Path, remedy: str) -> None:
    """Dump the stacks and say where they are."""
    path = folder / STACKS / f"rank_{comm.rank():05d}.txt"
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        where = str(path)
    except OSError as problem:  # the disk is full or gone
        faulthandler.dump_traceback(all_threads=True)
        where = f"above, for {path} cannot be written: {problem}"
    host = socket.gethostname()
    text = f"rank {comm.rank()} on {host} made no progress for {seconds:.0f} s (run.timeout_seconds): it has lost "
    _say(text + f"contact with another rank, or hangs itself. Stacks of all threads: {where}. {remedy}")


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Run the training; whatever ends it becomes one clear message and an exit status, and no rank lingers."""
    try:
        yield
    except BaseException as error:
        _leave(tell(error, folder))


def tell(error: BaseException, folder: Path) -> int:
    """Say once what ended this rank; from here on further signals are ignored, so that they cannot hide it.

    Returns:
        The exit status: 85 when stopped on request, 128 + signal when interrupted, 75 when another rank is gone, 2 for
        an error with a remedy (of this rank, or raised by all together), 1 for anything else (with its traceback).
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status, text = _explain(error, folder)
    if text and not _told:
        if status == 1:
            print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        _say(text)
    _told.append(status)
    return _told[0]


_told: list[int] = []
"""Statuses of what has been said; the first one counts."""


def _explain(error: BaseException, folder: Path) -> tuple[int, str]:
    if isinstance(error, Stopped):
        return STOPPED, f"{error} {_remedy(folder)}" if comm.is_main() else ""
    if isinstance(error, Interrupted):
        return 128 + error.number, f"stopped by {error}. {_remedy(folder)}"
    if isinstance(error, comm.RankError):
        return 2, f"{error} {_remedy(folder)}"
    if isinstance(error, comm.DistributedError):
        return 2, str(error) if comm.is_main() else ""
    if _is_lost_peer(error):
        return 75, f"rank {comm.rank()} lost contact with another rank ({error}). {_remedy(folder)}"
    if isinstance(error, OSError):
        where = error.filename or folder
        remedy = f"Free space or choose another `run.root`. {_remedy(folder)}"
        return 2, f"cannot read or write {where}: {error.strerror or error}. {remedy}"
    return 1, f"failed with {type(error).__name__}. {_remedy(folder)}"


def _is_lost_peer(error: BaseException) -> bool:
    text = str(error) if isinstance(error, RuntimeError) else ""
    return any(sign in text for sign in LOST_PEER)


LOST_PEER = (  # what gloo and NCCL say when another process is gone
    "Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "remote process exited",
    "communicator was aborted", "collective operation timeout",
)  # fmt: skip


def _remedy(folder: Path) -> str:
    latest = folder / "checkpoints" / "latest"
    if latest.is_file():
        newest = latest.read_text().strip()
        return f"The newest checkpoint is {folder / 'checkpoints' / newest}; the same command resumes from it."
    return "There is no checkpoint yet; the same command starts again."


def _say(text: str) -> None:
    get_logger().error(text)
    sys.stderr.flush()


def _leave(status: int) -> None:
    # Destructors of a process group with a dead peer can block, so the process ends here and now.
    sys.stdout.flush()
    os._exit(status)
