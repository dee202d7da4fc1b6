"""Which rank holds the others up, told from the time split of all ranks (engine/step_parts.py).

In a synchronous job all ranks take the same time; a slow one shows in that it waits for nobody. So a rank whose wait
for data and computing together take monitor.slow_factor times those of the median rank is told by name; communication,
in which ranks wait for each other, is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COMPUTE = ("forward", "backward", "optimizer", "teacher")
"""Parts of a step in which a rank computes."""
LEAST_SECONDS = 0.002
"""Differences below it are noise."""


@dataclass(frozen=True)
class RankTime:
    """Seconds of a step on one rank, means since the last look."""

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


def rank_times(hosts: Sequence[str], parts: Sequence[Mapping[str, float]]) -> list[RankTime]:
    """The time split of every rank, as far as it tells who is slow."""
    return [
        RankTime(host, seconds["data"], sum(seconds[name] for name in COMPUTE), seconds["communication"])
        for host, seconds in zip(hosts, parts, strict=True)
    ]


def due(step: int, log_every: int, slow_every: int) -> bool:
    """Whether the log after `step` is the first one at or after a multiple of monitor.slow_every."""
    return slow_every > 0 and step // slow_every > (step - log_every) // slow_every


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
