"""Worker processes: fresh interpreters that end with their parent, also when that is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], num_workers: int) -> Iterator[Result]:
    """Results of function(task), in the order in which they are ready.

    Args:
        function: of a module, so that a fresh process can import it.
        tasks: plain values.
        num_workers: processes; 0 runs everything here.

    Raises:
        ValueError: when a worker is killed, for instance because memory is short.
    """
    if num_workers == 0 or not tasks:
        yield from map(function, tasks)
        return
    workers = min(num_workers, len(tasks))
    spawn = multiprocessing.get_context("spawn")  # a fork would copy threads and locks in an unknown state
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        message = (
            "A worker process was killed, perhaps for lack of memory. What is finished stays: the same command goes "
        )
        raise ValueError(message + "on; lower `data.num_workers` if it happens again.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
