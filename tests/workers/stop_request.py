"""Worker function of test_restarts.py: steps without a training."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from entprune_ds import comm, stop_request


def stops(steps: int, asked_at: int) -> dict[str, Any]:
    """Steps of a millisecond, with a signal to rank 1 on the way: where the ranks stop, and how often they look."""
    stop_request.listen()
    watch, looks = stop_request.StopWatch(0), set()
    for step in range(steps):
        if step == asked_at and comm.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if watch.asked(step):
            return {"stopped": step, "looks": len(looks)}
        looks.add(watch.next)
        time.sleep(0.001)
    return {"stopped": None, "looks": len(looks)}
