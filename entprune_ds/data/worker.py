"""A worker process: reads its readers' rows of every batch into shared memory. Started by pool.py, by nobody else.

Standard input brings one line of JSON, the job, and then one empty line per batch that may be prepared; its end means
that the rank is gone, and ends this process at once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import traceback
from dataclasses import astuple
from itertools import count
from queue import SimpleQueue
from typing import Any

import torch

from entprune_ds.data.part import Part
from entprune_ds.data.pool import Ring
from entprune_ds.data.reader import Cursor, Plan


def main() -> None:
    """Work until the rank goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rank decides when the work is over
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, results, memory = (int(word) for word in sys.argv[1:])
    torch.set_num_threads(1)
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(rank, lines), daemon=True).start()
    with os.fdopen(results, "wb") as out:
        try:
            _work(lines, out, memory)
        except BrokenPipeError:
            return
        except (ValueError, OSError) as problem:  # a shard, its server, its disk
            message = {"problem": str(problem)}
        except Exception:
            message = {"failure": traceback.format_exc()}
        _say(out, message)


def _work(lines: SimpleQueue[bytes], out: Any, memory: int) -> None:
    job = json.loads(lines.get())
    ring = Ring(job["shape"], memory)
    part = Part(Plan.from_json(job["plan"]), job["readers"], job["rows"])
    part.seek({int(r): Cursor(*place) for r, place in job["places"].items()})
    for batch in count():
        lines.get()
        slot = batch % len(ring.latents)
        damages = part.fill(ring.latents[slot], ring.labels[slot])
        _say(out, {"places": part.places(), "damages": [astuple(damage) for damage in damages]})


def _say(out: Any, message: dict[str, Any]) -> None:
    out.write(json.dumps(message).encode() + b"\n")
    out.flush()


def _listen(rank: int, lines: SimpleQueue[bytes]) -> None:
    """Pass lines on. End the process when standard input ends, or (should another process hold it open) the rank."""
    rest = b""
    while True:
        ready, _, _ = select.select([0], [], [], 1.0)
        data = os.read(0, 1 << 16) if ready else b""
        if (ready and not data) or os.getppid() != rank:
            os._exit(0)
        *complete, rest = (rest + data).split(b"\n")
        for line in complete:
            lines.put(line)


if __name__ == "__main__":
    main()
