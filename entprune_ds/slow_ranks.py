"""Which rank holds the others up: every monitor.slow_every steps each rank times one step of its own.

In a synchronous job all ranks take the same time; a slow one shows in that it waits for nobody. So the time of a step
is parted into the wait for data, communication (in which ranks wait for each other) and the rest, computing; a rank
whose data and computing together take monitor.slow_factor times those of the median rank is told by name.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TypeVar

from entprune_ds import comm
from entprune_ds.engine.communication import synchronise, timed_communication
from entprune_ds.logs import get_logger
from entprune_ds.monitor.interface import Monitor

T = TypeVar("T")
LEAST_SECONDS = 0.002
"""Differences below it are noise."""


@dataclass(frozen=True)
class RankTime:
    """One step of one rank, in seconds."""

    host: str
    data: float
    """Wait for the batch."""
    compute: float
    """Forward, backward, optimizer."""
    communication: float
    """In collectives and transfers, waiting for others included."""

    @property
    def own(self) -> float:
        """What the rank itself takes, whoever waits for it."""
        return self.data + self.compute


def find_slow(times: Sequence[RankTime], factor: float) -> dict[int, str]:
    """{rank: what to say of it} of the ranks that hold the others up. A pure function.

    Args:
        times: of all ranks, in their order.
        factor: monitor.slow_factor. Of two ranks the faster one is the median.
    """
    usual = statistics.median_low([t.own for t in times])
    found = {}
    for rank, t in enumerate(times):
        if t.own > factor * usual and t.own - usual > LEAST_SECONDS:
            others = [statistics.median_low([getattr(o, part) for o in times]) for part in ("data", "compute")]
            text = f"rank {rank} on {t.host} is slow: {t.own:.3f} s of its own in a step, the median {usual:.3f} s. "
            parts = f"Data {t.data:.3f} s (median {others[0]:.3f}), computing {t.compute:.3f} s ({others[1]:.3f}). "
            starved = t.data - others[0] > t.compute - others[1]
            cause = "its storage and data workers" if starved else "its GPU and CPU: heat, clock, other jobs"
            found[rank] = f"{text}{parts}Look at {cause}."
    return found


def summary(times: Sequence[RankTime]) -> dict[str, float]:
    """ranks/* metrics: median and largest value of every part, and the slowest rank."""
    values: dict[str, float] = {}
    for part in ("data", "compute", "communication"):
        seconds = [getattr(t, part) for t in times]
        values |= {f"ranks/{part}_seconds": statistics.median_low(seconds), f"ranks/{part}_seconds_max": max(seconds)}
    own = [t.own for t in times]
    usual = statistics.median_low(own)
    slowest = {"ranks/slowest": own.index(max(own)), "ranks/slowest_ratio": max(own) / usual if usual > 0 else 1.0}
    return values | slowest


class StepSample:
    """Times one step of this rank where it is `due`, and does nothing elsewhere."""

    def __init__(self, due: bool):
        self.due, self.data = due, 0.0
        self.time: RankTime | None = None

    def fetch(self, get: Callable[[], T]) -> T:
        """What `get` returns: the batch, whose wait is timed."""
        start = time.perf_counter()
        found = get()
        self.data = time.perf_counter() - start
        return found

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the whole step, the fetch included."""
        if not self.due:
            yield
            return
        synchronise()
        start = time.perf_counter()
        with timed_communication() as spent:
            yield
            synchronise()
        whole, talk = time.perf_counter() - start, sum(spent)
        self.time = RankTime(socket.gethostname(), self.data, max(whole - self.data - talk, 0.0), talk)

    def tell(self, monitor: Monitor, step: int, factor: float) -> None:
        """Gather the times, log them, and warn of slow ranks. Collective where due."""
        if self.time is None:
            return
        times = [RankTime(**values) for values in comm.all_gather_json(asdict(self.time))]
        monitor.log(step, summary(times))
        for text in find_slow(times, factor).values():
            get_logger().warning("step %d: %s", step, text)
