"""Draws of some classes only, an equal number of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch

from entprune_ds import comm
from entprune_ds.importance.measuring import Batch, Measuring


def draws_of_classes(m: Measuring, purpose: str, size: int) -> Iterator[Batch]:
    """Batches of `size` draws whose i-th draw, counted over all batches, is of class classes[i mod their number].

    Examples of other classes are read and passed over. Equal on all ranks, as `m.draw` is.

    Raises:
        DistributedError: on all ranks, when a class of `score.within_class` does not come.
    """
    classes = m.config.score.within_class
    patience = max(10_000, 100 * m.config.model.num_classes)
    waiting: dict[int, deque[Batch]] = {c: deque() for c in classes}
    last_seen, slot, read = dict.fromkeys(classes, 0), 0, 0
    while True:
        turns = [classes[i % len(classes)] for i in range(slot, slot + size)]
        while short := [c for c in waiting if len(waiting[c]) < turns.count(c)]:
            lost = [c for c in short if read - last_seen[c] >= patience]
            if lost:
                raise comm.DistributedError(
                    f"check {m.check}: no example of classes {lost} of `score.within_class` among {patience:,} "
                    "calibration examples. Name classes that the data hold more of. Nothing was removed."
                )
            batch = m.draw(purpose, size)
            read += size
            for i, label in enumerate(batch.labels.tolist()):
                if label in waiting:
                    waiting[label].append(Batch(*(column[i] for column in batch)))
                    last_seen[label] = read
        rows = [waiting[c].popleft() for c in turns]
        yield Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))
        slot += size
