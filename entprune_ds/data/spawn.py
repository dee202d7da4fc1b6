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


class Workers:
    """Processes that are started at the first use and end with the `with` block.

    Args:
        number: processes; 0 runs everything in this one.
    """

    def __init__(self, number: int):
        self.number = number
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results of function(task), in the order in which they are ready.

        Args:
            function: of a module, so that a fresh process can import it.
            tasks: plain values.

        Raises:
            ValueError: when a worker is killed, for instance because memory is short.
        """
        if self.number == 0:
            yield from map(function, tasks)
            return
        if self.pool is None:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy threads and locks in an unknown state
            self.pool = ProcessPoolExecutor(self.number, mp_context=spawn, initializer=_start_worker)
        try:
            for future in as_completed([self.pool.submit(function, task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool as error:
            message = (
                "A worker process was killed, perhaps for lack of memory. What is finished stays: the same command "
            )
            raise ValueError(message + "goes on; lower `data.num_workers` if it happens again.") from error


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
