"""Training under clocks that jump: the one of the machine (as a command), and the one by which progress is judged."""

from __future__ import annotations

import time

from entprune_ds import comm
from entprune_ds.cli.common import leave

DAY = 86400.0


def stall(words: list[str]) -> int:
    """Train; a wait at a fault point takes a million seconds at once by the clock of progress."""
    from entprune_ds.cli.train import main

    ahead, sleep = [0.0], time.sleep

    def long_sleep(seconds: float) -> None:
        ahead[0] += 1e6 if seconds > 100 else 0.0
        sleep(seconds)

    comm.clock, time.sleep = lambda: time.monotonic() + ahead[0], long_sleep
    comm.mark_progress()
    return main(words)


def jumping_wall_clock() -> None:
    """Let time.time() leap a month ahead at its 20th call, and a year back at its 50th."""
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + (0 if calls[0] < 20 else 30 * DAY if calls[0] < 50 else -365 * DAY)

    time.time = jumping


if __name__ == "__main__":
    from entprune_ds.cli.train import main

    jumping_wall_clock()
    leave(main())
