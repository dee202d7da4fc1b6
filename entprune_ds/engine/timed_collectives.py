"""The time of DeepSpeed's collectives, as a part of the step that calls them.

DeepSpeed sends everything through one backend object. Its methods are wrapped once per process; outside a training
step the wrapper does nothing but call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _CoalescingManager

from entprune_ds.engine.step_parts import StepParts

NAMES = (
    "all_reduce", "inference_all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "send", "recv", "barrier",
)  # fmt: skip
_listening: list[StepParts] = []
"""Whose step is running."""


@contextmanager
def collectives_of(parts: StepParts) -> Iterator[None]:
    """Count the collectives inside as `communication` of `parts`."""
    _wrap_backend()
    _listening.append(parts)
    try:
        yield
    finally:
        _listening.pop()


class TimedWork:
    """Handle of an asynchronous collective whose wait counts as communication too."""

    def __init__(self, work: Any):
        self.work = work

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the collective."""
        if not _listening:
            return self.work.wait(*args, **kwargs)
        with _listening[-1].part("communication"):
            return self.work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def _wrap_backend() -> None:
    """Put the wrappers around the methods of DeepSpeed's backend, where there is one that has none."""
    from deepspeed.comm import comm as ds_comm

    backend = ds_comm.cdb
    if backend is None or NAMES[0] in vars(backend):
        return
    for name in NAMES:
        setattr(backend, name, _timed_collective(getattr(backend, name)))


def _timed_collective(call: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        if not _listening:
            return call(*args, **kwargs)
        with _listening[-1].part("communication"):
            result = call(*args, **kwargs)
        return TimedWork(result) if isinstance(result, (dist.Work, _CoalescingManager)) else result

    return inner
