"""Worker functions of test_sampling.py: `entprune-ds sample` and `evaluate` on several ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from entprune_ds import comm
from entprune_ds.cli.evaluate import main as evaluate
from entprune_ds.cli.sample import main as sample
from entprune_ds.evaluation import parts


def run(commands: list[list[str]]) -> list[int]:
    """Exit statuses of commands, run one after the other in one process group each."""
    mains = {"sample": sample, "evaluate": evaluate}
    return [mains[name](words) for name, *words in commands]


def killed(words: list[str], parts: str, after: int) -> None:
    """`sample`, killed outright when so many parts are there."""

    def watch() -> None:
        while len(list(Path(parts).glob("part_*.npy"))) < after:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    sample(words)


def ended_before_the_protocol(words: list[str]) -> None:
    """`sample` that is gone just before it writes the protocol of what it has drawn."""
    parts.finish_text = lambda *_: os._exit(9)
    sample(words)


def alone() -> int:
    """Ranks that are in a group."""
    return comm.world_size()
