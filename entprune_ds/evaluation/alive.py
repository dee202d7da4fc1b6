"""Signs of life of ranks that work for hours without meeting: who waits for the others sees whether they go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entprune_ds import comm

SECONDS = 5.0
"""Between two looks at the progress of this rank."""


@contextmanager
def alive(folder: Path) -> Iterator[None]:
    """Renew a file of this rank as long as it makes progress (comm.mark_progress). It must not wait for others in here.

    Args:
        folder: that all ranks see.
    """
    over, path = threading.Event(), folder / f"alive_{comm.rank():05d}"

    def renew() -> None:
        while True:
            if comm.seconds_without_progress() < 2 * SECONDS:
                try:
                    path.touch()
                except OSError:  # the work itself will meet it, and say so
                    return
            if over.wait(SECONDS):
                return

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(SECONDS)  # the folder may be removed after this


def signs(folder: Path) -> list[tuple[str, int]]:
    """File and time of the last sign of every rank; equal as long as nobody goes on."""
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.glob("alive_*"))
