"""Seconds that this rank spends in DeepSpeed's traffic, waiting for others included; for single steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

OPERATIONS = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast", "barrier",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all", "all_to_all_single", "send", "recv",
)  # fmt: skip
"""Methods of DeepSpeed's communication backend through which its traffic goes; each may be waited for where it is."""


@contextmanager
def timed_communication() -> Iterator[list[float]]:
    """Time all of DeepSpeed's traffic inside; the list holds the seconds of every operation. Local.

    Each operation waits for the device before and after, so a measured step is slower: measure few. DeepSpeed's own
    logger of communication is not used, for it ends the process at operations that it does not know.
    """
    from deepspeed.comm import comm as ds_comm

    backend, spent = ds_comm.cdb, list[float]()
    names = [name for name in OPERATIONS if backend is not None and callable(getattr(backend, name, None))]
    before = {name: vars(backend)[name] for name in names if name in vars(backend)}
    try:
        for name in names:
            setattr(backend, name, _timed(getattr(backend, name), spent))
        yield spent
    finally:
        for name in names:
            vars(backend).pop(name, None)  # the method of the class comes back
        if before:
            vars(backend).update(before)


def _timed(operation: Any, spent: list[float]) -> Any:
    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronise()
        start = time.perf_counter()
        work = operation(*args, **kwargs)
        for handle in work if isinstance(work, list) else [work]:
            if isinstance(handle, torch.distributed.Work):
                handle.wait()
        synchronise()
        spent.append(time.perf_counter() - start)
        return work

    return timed


def synchronise() -> None:
    """Wait for what was sent to the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
