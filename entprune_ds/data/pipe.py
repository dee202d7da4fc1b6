"""Files that a shell command prints. Only for users who wrote `data.allow_pipe=true` on the command line themselves.

There are no retries here: a command that needs them brings its own, such as `curl --retry 5`.
"""

from __future__ import annotations

import os
import signal
import subprocess

from entprune_ds.data.latents import ShardError
from entprune_ds.data.places import Pipe

CHUNK = 1 << 18


class PipeFile:
    """What a command prints, of known size, or (size None) of any.

    Raises:
        ShardError: from every method, when the command fails or prints something of another size.
    """

    def __init__(self, pipe: Pipe, size: int | None = None):
        self.pipe, self.size, self.offset = pipe, size, 0
        self.process = subprocess.Popen(
            pipe.command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0
        )

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer only at the end."""
        assert self.process.stdout is not None
        data = self.process.stdout.read(size)
        self.offset += len(data)
        if len(data) < size:
            self._check_end()
        return data

    def read_all(self) -> bytes:
        """The rest."""
        parts = []
        while data := self.read(CHUNK):
            parts.append(data)
        return b"".join(parts)

    def close(self) -> None:
        """End the command and what it has started."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _check_end(self) -> None:
        status = self.process.wait()
        if status:
            raise ShardError(f"`{self.pipe}` ended with status {status}. Try the command by hand.")
        if self.size is not None and self.offset != self.size:
            message = f"`{self.pipe}` is truncated or changed: {self.offset} bytes, the index says {self.size}."
            raise ShardError(f"{message} Try the command by hand.")
