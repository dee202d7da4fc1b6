"""Training in which one rank is slow: at its data, or in its forward pass."""

from __future__ import annotations

import logging
import time

from entprune_ds import comm, trainer
from entprune_ds.data.stream import Stream
from entprune_ds.logs import get_logger
from entprune_ds.models.layers import Block


def train_slowly(words: list[str], rank: int, where: str, seconds: float) -> list[str]:
    """Train; returns the warnings of this rank."""
    from entprune_ds.cli.train import main

    owner, name = {"data": (Stream, "next_batch"), "compute": (Block, "forward")}[where]
    method = getattr(owner, name)

    def late(*args, **kwargs):
        time.sleep(seconds)
        return method(*args, **kwargs)

    if comm.rank() == rank:
        setattr(owner, name, late)
    told: list[str] = []
    get_logger().addHandler(handler := logging.Handler(logging.WARNING))
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    assert main(words) == 0 and trainer is not None
    return told
