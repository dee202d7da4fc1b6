"""Where the time of a training step goes. Inert: nothing is synchronised that was not before.

    data            waiting for the next batch, drawing noise and t, copying both to the device
    forward         forward passes and the loss
    backward        backward passes; at ZeRO-3 with the partitions that they gather
    optimizer       clipping, the optimizer step, the EMA
    communication   waiting in collectives and between pipeline stages, wherever in the step that is
    hidden          collectives on another CUDA stream than the work around them: they take no time of their own
    teacher         the teacher's forward passes (distill.*)

All but `hidden` are disjoint: communication inside the backward pass counts as communication alone. On a CPU they are
times of the clock. On a GPU they are times between CUDA events on the stream that does the work: `data` is then how
long the GPU stood still for data, not how long the host waited while the GPU was busy, and what the host does while
the GPU works appears nowhere. Waiting for a slower rank is communication of the faster one.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

MOST_RUNNING = 512
"""Parts on a GPU that are kept before those that have ended are summed up."""
PARTS = ("data", "forward", "backward", "optimizer", "communication", "hidden", "teacher")


class Open(NamedTuple):
    """A part that has begun."""

    name: str
    stream: Any
    """CUDA stream that it is timed on; None on a CPU."""


class Timed(NamedTuple):
    """A part on a GPU that may still be running."""

    name: str
    inside: str | None
    start: torch.cuda.Event
    end: torch.cuda.Event


class StepParts:
    """Sums the seconds of the parts of steps; parts may lie inside each other."""

    def __init__(self, cuda: bool = False):
        self.cuda = cuda
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.open: list[Open] = []
        self.running: deque[Timed] = deque()
        self.spare: list[torch.cuda.Event] = []
        self.steps, self.began = 0, time.monotonic()

    def restart(self) -> None:
        """Forget what was measured: what stood between the steps was no training."""
        self.take()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside as part `name`, and no longer as the part around it."""
        stream = torch.cuda.current_stream() if self.cuda else None
        around = self.open[-1] if self.open else None
        if around is not None and around.stream != stream:
            name, around = "hidden", None
        self.open.append(Open(name, stream))
        start = self._event(stream) if self.cuda else time.perf_counter()
        try:
            yield
        finally:
            self.open.pop()
            inside = None if around is None else around.name
            if self.cuda:
                self.running.append(Timed(name, inside, start, self._event(stream)))  # type: ignore[arg-type]
                if len(self.running) > MOST_RUNNING:
                    self._sum_up()
            else:
                self._add(name, inside, time.perf_counter() - start)  # type: ignore[operator]

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds of a step since the last call, whatever stood between the steps included, and those of its parts.

        Parts that a GPU has not finished count next time; nobody waits for them.
        """
        self._sum_up()
        now, steps = time.monotonic(), max(self.steps, 1)
        whole, parts = (now - self.began) / steps, {name: self.seconds[name] / steps for name in PARTS}
        self.steps, self.began, self.seconds = 0, now, defaultdict(float)
        return whole, parts

    def _sum_up(self) -> None:
        while self.running and self.running[0].end.query():
            timed = self.running.popleft()
            self._add(timed.name, timed.inside, timed.start.elapsed_time(timed.end) / 1e3)
            self.spare += [timed.start, timed.end]

    def _add(self, name: str, inside: str | None, seconds: float) -> None:
        self.seconds[name] += seconds
        if inside is not None:
            self.seconds[inside] -= seconds

    def _event(self, stream: Any) -> torch.cuda.Event:
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event


def timed(parts: StepParts, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that counts its time as part `name`."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        with parts.part(name):
            return call(*args, **kwargs)

    return inner
