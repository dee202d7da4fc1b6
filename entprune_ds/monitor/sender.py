"""A client in a thread of its own: whatever it waits for, the training does not.

What the run says waits in a bounded line. When the client is slower than the run, the oldest pictures go first, then
the oldest rows of numbers; both are counted and told. metrics.jsonl and samples/ hold everything in any case.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .interface import Monitor

MOST_WAITING = 1000
"""Longest line of what the client has not taken yet."""
HURRY_SECONDS = 15.0
"""Longest wait at the end of a failed or stopped run, which may be short of time: clusters kill soon after a signal."""


class Item(NamedTuple):
    """Something to hand over, in words and as a call."""

    kind: str
    call: Callable[[Monitor], None]


class QueuedMonitor:
    """Monitor that passes everything on from its own thread, where also the client is started.

    Args:
        start: makes the client; called in the thread.
        logger: for what was dropped.
        finish_seconds: longest wait of `finish`.
        abandon: called when that has passed, to end what the client has started.
        folder: where the client keeps what it has not sent.
    """

    def __init__(
        self, start: Callable[[], Monitor], logger: logging.Logger, finish_seconds: float,
        abandon: Callable[[], None], folder: Path,
    ):  # fmt: skip
        self.start, self.logger, self.finish_seconds, self.abandon = start, logger, finish_seconds, abandon
        self.folder = folder
        self.waiting: deque[Item] = deque()
        self.changed = threading.Condition()
        self.dropped: Counter[str] = Counter()
        self.closing = self.ended = False
        self.thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        self.thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One row of numbers, copied now."""
        row = dict(values)
        self._put("row", lambda client: client.log(step, row))

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture, read when its turn comes."""
        self._put("picture", lambda client: client.image(step, name, path))

    def decision(self, decision: Mapping[str, Any]) -> None:
        """A decision; its figures are drawn in the thread."""
        self._put("decision", lambda client: client.decision(decision))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final figures."""
        self._put("summary", lambda client: client.summary(values))

    def artifact(self, folder: Path, name: str, kind: str, facts: Mapping[str, Any] | None = None) -> None:
        """A folder."""
        self._put("artifact", lambda client: client.artifact(folder, name, kind, facts))

    def finish(self, exit_code: int = 0, hurry: bool = False) -> None:
        """Let the client take what waits, for a bounded time; what it has not taken then is given up and told."""
        if self.closing:
            return
        seconds = min(self.finish_seconds, HURRY_SECONDS) if hurry else self.finish_seconds
        self._put("end", lambda client: client.finish(exit_code))
        self.thread.join(seconds)
        with self.changed:
            lost = self.dropped + Counter(item.kind for item in self.waiting if item.kind != "end")
            self.waiting.clear()  # should the thread wake up, it has nothing to say any more
        if self.thread.is_alive():
            self.abandon()
            text = "Weights & Biases did not finish within %.0f s and is left behind; what it kept can be sent with "
            self.logger.warning(text + "`wandb sync --include-online %s`.", seconds, self.folder / "latest-run")
        if lost:
            what = " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in sorted(lost.items()))
            self.logger.warning("Weights & Biases has missed %s; the run folder has them.", what)

    def _put(self, kind: str, call: Callable[[Monitor], None]) -> None:
        with self.changed:
            if self.closing:
                return
            self.closing = kind == "end"
            if self.ended:
                self.dropped.update([] if self.closing else [kind])
                return
            first_loss = not self.dropped
            while len(self.waiting) >= MOST_WAITING and not self.closing:
                self._drop_one()
            self.waiting.append(Item(kind, call))
            self.changed.notify()
        if first_loss and self.dropped:
            text = "Weights & Biases is slower than the run: the oldest pictures, then the oldest rows are left out "
            self.logger.warning(text + "there. The run folder has everything.")

    def _drop_one(self) -> None:
        """The oldest picture, else the oldest row, else the oldest of anything."""
        for kind in ("picture", "row"):
            place = next((i for i, item in enumerate(self.waiting) if item.kind == kind), None)
            if place is not None:
                break
        place = place or 0
        self.dropped[self.waiting[place].kind] += 1
        del self.waiting[place]

    def _work(self) -> None:
        kind = ""
        try:
            client = self.start()
            while kind != "end":
                with self.changed:
                    while not self.waiting:
                        self.changed.wait()
                    kind, call = self.waiting.popleft()
                call(client)
        except BaseException as error:  # whatever it is, SystemExit included: the thread would end in silence
            with self.changed:
                self.ended = True
                self.dropped.update([kind] if kind not in ("", "end") else [])
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            self.logger.warning("The client of Weights & Biases has ended (%s); training goes on without it.", text)
