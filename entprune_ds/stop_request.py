"""A request to stop: the ranks agree on a step, save a checkpoint there, and leave with status 85.

SIGUSR1 to any rank asks for it; so does SIGTERM where Slurm has started the ranks (pre-emption, requeue, scancel: Slurm
gives them some seconds). A flag per rank is looked at by all together, every two seconds or so, not at every step.
"""

from __future__ import annotations

import os
import signal
import time

import torch

from entprune_ds import comm

STOPPED = 85
"""Exit status of a job that has saved its state and left because it was asked to."""
LOOK_SECONDS = 2.0
"""Time between two looks, as measured at the last one."""
MOST_STEPS = 200
"""Steps between two looks at most."""

_asked: list[int] = []
"""Signals that have asked this rank."""


class Stopped(BaseException):
    """The job has saved its state and leaves as it was asked to; no `except Exception` swallows it."""


def listen() -> None:
    """From now on the signals ask this rank to stop, instead of ending it."""
    _asked.clear()
    numbers = [signal.SIGUSR1]
    if "SLURM_STEP_ID" in os.environ:
        numbers.append(signal.SIGTERM)
    for number in numbers:
        signal.signal(number, lambda number, frame: _asked.append(number))
        signal.siginterrupt(number, False)  # a system call of a library goes on


class StopWatch:
    """When the ranks look together whether any of them was asked to stop, first after one step, which gives a time."""

    def __init__(self, step: int):
        self.next, self.step, self.time = step + 1, step, time.monotonic()

    def asked(self, step: int) -> bool:
        """Whether the job stops before this step: the same answer on all ranks. Collective at some steps."""
        if step < self.next:
            return False
        now = time.monotonic()
        seconds = (now - self.time) / (step - self.step)
        mine = torch.tensor([float(bool(_asked)), seconds], dtype=torch.float64, device=comm.device())
        asked, total = comm.all_reduce_sum(mine).tolist()
        steps = LOOK_SECONDS * comm.world_size() / max(total, 1e-9)  # the mean of the ranks, so that all agree
        self.next, self.step, self.time = step + max(1, min(MOST_STEPS, int(steps))), step, now
        return asked > 0
