"""Worker processes that read for one rank, and the shared memory through which they hand over batches.

Worker w of W runs every W-th reader of the rank and writes its rows of every batch, so the order does not depend on W.
A worker may be `prefetch` batches ahead; each batch says where its readers stood after it, so the cursor of the rank is
that of the batches it has handed out. Workers are fresh Python processes (no fork: safe beside threads, CUDA and
process groups), talk in JSON lines, and end by themselves when their rank is gone, however it went.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from entprune_ds.data.latents import ShardError
from entprune_ds.data.reader import Cursor, Damage, Plan

MODULE = "entprune_ds.data.worker"
ROOT = Path(__file__).parents[2]


class WorkerError(ChildProcessError):
    """A worker process has died or met a programming error; the message says which and how."""


class Ring:
    """`depth` batches in memory that processes share: latents (depth,N,C,H,W) f32 and labels (depth,N) i64."""

    def __init__(self, shape: Sequence[int], descriptor: int | None = None):
        """Map the memory of `descriptor`, or make new memory; it vanishes with the last process that maps it."""
        depth, rows = shape[:2]
        numbers, label_bytes = int(np.prod(shape)), 8 * depth * rows
        size = label_bytes + 4 * numbers
        if descriptor is None:
            descriptor = os.memfd_create("entprune_ds_batches")
            weakref.finalize(self, os.close, descriptor)
            os.posix_fallocate(descriptor, 0, size)  # an error now instead of a dead process later
        self.descriptor, self.shape = descriptor, tuple(shape)
        memory = mmap.mmap(descriptor, size)
        self.labels = np.frombuffer(memory, np.int64, depth * rows).reshape(depth, rows)
        self.latents = np.frombuffer(memory, np.float32, numbers, offset=label_bytes).reshape(shape)


@dataclass(frozen=True)
class Worker:
    """One running process."""

    number: int
    process: subprocess.Popen
    results: IO[bytes]
    """One JSON line per batch."""

    def send(self, data: bytes) -> None:
        """Write to the worker; a dead one is noticed when its next result is missing."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    def result(self) -> dict[str, Any]:
        """What it says about the next batch.

        Raises:
            ShardError: when it cannot read a shard.
            WorkerError: when it has died or failed.
        """
        line = self.results.readline()
        if not line.endswith(b"\n"):
            raise WorkerError(self._obituary())
        message = json.loads(line)
        if "problem" in message:
            raise ShardError(message["problem"])
        if "failure" in message:
            raise WorkerError(f"data worker {self.number} failed:\n{message['failure']}")
        return message

    def _obituary(self) -> str:
        status = self.process.wait(timeout=30)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        message = f"data worker {self.number} (process {self.process.pid}) {how}. If memory ran out, lower "
        return message + "data.num_workers, data.shuffle_buffer or data.prefetch; data.num_workers=0 does without."


class Pool:
    """The workers of one rank; they start with the first batch.

    Args:
        plan: the order of the examples.
        readers: numbers of the rank's readers.
        rows: for each of its positions in the global batch, ascending: (row of its batch, reader).
        num_workers: processes, at most as many as readers.
        prefetch: batches that may be prepared ahead.
    """

    def __init__(
        self, plan: Plan, readers: Sequence[int], rows: Sequence[tuple[int, int]], num_workers: int, prefetch: int
    ):
        self.plan, self.rows, self.prefetch = plan, rows, prefetch
        self.shares = [list(readers[w::num_workers]) for w in range(num_workers)]
        self.at: dict[int, Cursor] = dict.fromkeys(readers, Cursor())
        self.batches = 0
        self.ring: Ring | None = None
        self.workers: list[Worker] = []
        weakref.finalize(self, _end, self.workers, os.getpid())

    def fill(self, latents: np.ndarray, labels: np.ndarray) -> list[Damage]:
        """Copy the next batch out of the shared memory; see Part.fill."""
        if not self.workers:
            self._start()
        assert self.ring is not None
        results = [worker.result() for worker in self.workers]
        slot = self.batches % self.prefetch
        np.copyto(latents, self.ring.latents[slot])
        np.copyto(labels, self.ring.labels[slot])
        for worker in self.workers:
            worker.send(b"\n")
        self.batches += 1
        self.at |= {int(r): Cursor(*place) for result in results for r, place in result["places"].items()}
        return [Damage(*damage) for result in results for damage in result["damages"]]

    def places(self) -> dict[int, Cursor]:
        """Where the readers were after the last batch that was handed out."""
        return dict(self.at)

    def seek(self, places: dict[int, Cursor]) -> None:
        """Go to the places of all readers: the workers end, and start anew with the next batch."""
        self.close()
        self.at = dict(places)

    def close(self) -> None:
        """End the workers."""
        _end(self.workers, os.getpid())

    def _start(self) -> None:
        shape = (self.prefetch, len(self.rows), *self.plan.index.latent_shape)
        if self.ring is None:
            self.ring = Ring(shape)
        self.batches = 0
        for number in range(len(self.shares)):
            self.workers.append(_launch(number, self.ring.descriptor))
        for worker, readers in zip(self.workers, self.shares, strict=True):
            job = {
                "plan": self.plan.to_json(), "shape": shape, "readers": readers,
                "rows": [(row, r) for row, r in self.rows if r in readers],
                "places": {r: self.at[r] for r in readers},
            }  # fmt: skip
            worker.send(json.dumps(job).encode() + b"\n" * (1 + self.prefetch))


def _launch(number: int, memory: int) -> Worker:
    """Start a worker; it inherits the two descriptors it needs and nothing else."""
    receive, send = os.pipe()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(os.getpid()), str(send), str(memory)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(send, memory),
            env={**os.environ, **alone}, process_group=0,
        )  # fmt: skip
    except BaseException:
        os.close(receive)
        raise
    finally:
        os.close(send)  # so that the death of the worker ends the pipe
    return Worker(number, process, os.fdopen(receive, "rb"))


def _end(workers: list[Worker], owner: int) -> None:
    """Kill the processes: they hold nothing that is worth keeping. A fork of the owner must leave them alone."""
    while workers and os.getpid() == owner:
        worker = workers.pop()
        worker.process.kill()
        worker.process.wait()
        worker.results.close()
        try:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        except BrokenPipeError:  # what was still buffered has no reader any more
            continue
