"""What a person sees: a logger that speaks on rank 0, and a progress line.

On a terminal the progress is a rich bar; elsewhere (Slurm logs, pipes) it is plain lines.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from entprune_ds.redact import redacted


def get_logger() -> logging.Logger:
    """Logger "entprune_ds": INFO on rank 0, errors only on the others."""
    logger = logging.getLogger("entprune_ds")
    if not logger.handlers:
        rank = os.environ.get("RANK", "0")
        handler = _Stderr()
        prefix = "" if rank == "0" else f"[rank {rank}] "
        handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if rank == "0" else logging.ERROR)
        logger.propagate = False
    return logger


class _Formatter(logging.Formatter):
    """Keeps the secrets of addresses out of every line, whoever wrote it."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class _Stderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is now, so that a running progress bar stays below the log lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class ProgressLine:
    """One advancing line: a bar on a terminal, a plain line every `seconds` elsewhere.

    `update(done, text)` may be called at every step; it costs microseconds between two prints.
    """

    def __init__(self, title: str, total: int, done: int = 0, seconds: float = 10.0):
        self.title, self.total, self.seconds = title, total, seconds
        self.shown, self.last = done, time.monotonic()
        self.visible = os.environ.get("RANK", "0") == "0"
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if self.visible and console.is_terminal:
            columns = (
                TextColumn(title),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(title, total=total, completed=done, text="")
            self.bar.start()

    def update(self, done: int, text: str = "") -> None:
        """Show that `done` of `total` are finished, with a short text."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)
        elif self.visible and (done == self.total or time.monotonic() - self.last >= self.seconds):
            now = time.monotonic()
            rate = (done - self.shown) / max(now - self.last, 1e-9)  # of late: a pruning check says nothing about steps
            self.shown, self.last = done, now
            left = f"{(self.total - done) / rate:.0f} s left" if rate > 0 else "started"
            get_logger().info("%s %d/%d  %s  %s", self.title, done, self.total, text, left)

    def close(self) -> None:
        """Leave the terminal clean."""
        if self.bar is not None:
            self.bar.stop()


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[ProgressLine]:
    """A ProgressLine that is closed in any case."""
    line = ProgressLine(title, total, done)
    try:
        yield line
    finally:
        line.close()
