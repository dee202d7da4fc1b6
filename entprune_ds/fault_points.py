"""Named points at which ranks can be made to wait, so that a real signal meets a real run in the middle of something.

    ENTPRUNE_WAIT=resize:5 deepspeed --num_gpus 2 --module entprune_ds.cli.train ...

makes every rank say so and wait 5 s at its first resize (resize:5:2: at its second one). Nothing is patched.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter

POINTS = {
    "scoring": "calibration is scored in part",
    "broadcast": "rank 0 has decided, nobody knows it yet",
    "resize": "the old engine is gone, the new one is empty",
    "checkpoint": "the ranks' files are written, the manifest is not",
    "rollback": "the run has gone back, and is about to train on",
    "latest": "the checkpoint has its name, `latest` names the one before",
}
VARIABLE = "ENTPRUNE_WAIT"

_times: Counter[str] = Counter()


def reach(point: str) -> None:
    """Wait here where the environment says so.

    Args:
        point: one of POINTS.

    Raises:
        ValueError: when the variable is not POINT:SECONDS or POINT:SECONDS:N, for the N-th time.
    """
    value = os.environ.get(VARIABLE)
    if not value:
        return
    match = re.fullmatch(r"(\w+):(\d+)(?::(\d+))?", value)
    if match is None or match[1] not in POINTS:
        raise ValueError(f"{VARIABLE} is {value!r}. Unset it, or give POINT:SECONDS with one of {', '.join(POINTS)}.")
    _times[point] += 1
    if match[1] == point and _times[point] == int(match[3] or 1):
        text = f"waiting at {point} for {match[2]} s: {POINTS[point]} (process {os.getpid()})"
        print(text, file=sys.stderr, flush=True)
        time.sleep(int(match[2]))
