"""The worker processes of `entprune-ds compare`: started, watched, and started again when one dies with a row."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from entprune_ds.cli.compare_worker import log_path, note_failure

Watch = Callable[[str, str], None]
"""watch(event, row): start, done, failed, or again (a worker died with the row and another goes on with it)."""


class Pool:
    """Worker processes that all go through the same rows; each row belongs to who holds its lock."""

    def __init__(self, words: list[str], part: str, out: Path, workers: int, threads: int, watch: Watch):
        """
        Args:
            words: of the command.
            part: "base" or "rows".
            out: folder of the comparison.
            workers: processes.
            threads: of each.
            watch: told what happens.
        """
        self.command = [sys.executable, "-m", "entprune_ds.cli.compare", f"--worker={part}", *words]
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.out, self.watch = out, watch
        self.events: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self.alive: dict[int, subprocess.Popen[str]] = {}
        self.doing: dict[int, str] = {}
        self.started = 0
        self.killed: set[str] = set()
        self.workers = workers

    def run(self) -> None:
        """Until every worker has gone through all rows. However it ends, no worker is left.

        Raises:
            RuntimeError: when a worker dies before it has begun a row.
        """
        try:
            for _ in range(self.workers):
                self._start()
            while self.alive:
                worker, line = self.events.get()
                if line is None:
                    self._ended(worker)
                else:
                    self._heard(worker, line)
        finally:
            for process in self.alive.values():
                process.terminate()
            deadline = time.monotonic() + 20
            for process in self.alive.values():
                try:
                    process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()

    def _start(self) -> None:
        worker, self.started = self.started, self.started + 1
        log = log_path(self.out, f"worker_{worker}")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as errors:
            process = subprocess.Popen(
                self.command, env=self.environment, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        self.alive[worker] = process
        threading.Thread(target=self._listen, args=(worker, process), daemon=True).start()

    def _listen(self, worker: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.events.put((worker, line))
        self.events.put((worker, None))

    def _heard(self, worker: int, line: str) -> None:
        try:
            event = json.loads(line)
            name, what = event["row"], event["event"]
        except (ValueError, TypeError, KeyError):
            return  # something that a library prints
        if what == "start":
            self.doing[worker] = name
        else:
            self.doing.pop(worker, None)
        self.watch(what, name)

    def _ended(self, worker: int) -> None:
        """A worker is gone: at the end of its work, or with a row, which another one goes on with or which failed."""
        process = self.alive.pop(worker)
        status, name = process.wait(), self.doing.pop(worker, None)
        if name is None:
            if status:
                log = log_path(self.out, f"worker_{worker}")
                message = f"a worker ended with status {status} before it began a row, see {log}:\n"
                raise RuntimeError(message + _tail(log))
            return
        by_signal = status < 0 or status >= 128
        if by_signal and name not in self.killed:
            self.killed.add(name)
            self.watch("again", name)
        else:
            note_failure(self.out, name, _reason(status, self.out, name))
            self.watch("failed", name)
        self._start()


def _reason(status: int, out: Path, name: str) -> str:
    """Why a training ended: the signal, or the last line of its log."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name} twice"
    lines = _tail(log_path(out, name)).splitlines()
    return f"ended with status {status}: {lines[-1] if lines else 'nothing was printed'}"


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:].strip() if path.is_file() else ""
