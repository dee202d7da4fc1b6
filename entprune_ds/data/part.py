"""Some readers of a rank and their positions in every batch: what the rank itself, or one of its workers, reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entprune_ds.data.reader import Cursor, Damage, Plan, Reader


def slots_of(readers: Sequence[int], num_readers: int, global_batch_size: int) -> tuple[int, ...]:
    """Positions of the global batch that these readers fill, ascending: position s comes from reader s mod R."""
    mine = set(readers)
    return tuple(s for s in range(global_batch_size) if s % num_readers in mine)


class Part:
    """Readers with their state.

    Args:
        plan: the order of the examples.
        readers: numbers of the readers.
        rows: for each position that they fill, ascending: (row of the batch of the rank, reader).
    """

    def __init__(self, plan: Plan, readers: Sequence[int], rows: Sequence[tuple[int, int]]):
        verified: set[str] = set()
        self.readers = {r: Reader(plan, r, verified) for r in readers}
        self.rows = tuple(rows)
        self.draw = plan.draw()

    def seek(self, places: dict[int, Cursor]) -> None:
        """Go to the places of all readers; reads nothing yet."""
        for number, reader in self.readers.items():
            reader.seek(*places[number])

    def close(self) -> None:
        """Nothing to end: the readers work in this process."""

    def places(self) -> dict[int, Cursor]:
        """Where the readers are."""
        return {number: reader.place for number, reader in self.readers.items()}

    def fill(self, latents: np.ndarray, labels: np.ndarray) -> list[Damage]:
        """Read the next batch into this part's rows of latents (N,C,H,W) f32 and labels (N,) i64.

        Returns:
            Damaged examples that were passed over.

        Raises:
            ShardError: when a shard cannot be read or too much is damaged; the places are undefined then: seek.
        """
        for reader in self.readers.values():
            reader.damages = []
        for row, number in self.rows:
            reader = self.readers[number]
            key, array, label = reader.take()
            self.draw.into(latents[row], key, array, reader.epoch)
            labels[row] = label
        return [damage for reader in self.readers.values() for damage in reader.damages]
