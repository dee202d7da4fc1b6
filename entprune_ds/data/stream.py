"""The training stream: an endless, reproducible order of examples that does not depend on the number of ranks.

R virtual readers define the order (reader.py). Position s of a global batch comes from reader s mod R, and rank p of P
runs the readers r with r mod P = p, itself or in worker processes. No example is dropped or repeated within an epoch
of a reader, the next epoch follows without a gap, and all ranks get equal batches for ever. So the whole state is one
place per reader, that of the batches handed out, and any P that divides R gives the same global batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entprune_ds.data.draw import Draw
from entprune_ds.data.index import Index, check_shards, load_index
from entprune_ds.data.latents import Batch, ShardError
from entprune_ds.data.part import Part, slots_of
from entprune_ds.data.pool import Pool
from entprune_ds.data.reader import Cursor, Damage, Plan, Reader, read_shard, too_many
from entprune_ds.logs import get_logger

__all__ = ["Stream", "first_examples", "merge_states", "read_all", "read_shard"]

log = get_logger()


class Stream:
    """Endless batches of one data-parallel rank.

    Args:
        index: an Index, or what `data.shards` may say.
        seed: seed of the run.
        num_readers: R; the data-parallel size must divide it, it must divide the global batch, and there must be as
            many shards.
        shuffle_buffer: examples that one reader shuffles together (and holds in memory).
        global_batch_size: examples of one step over all ranks.
        dp_rank, dp_size: this rank's place; pipeline stages of one data-parallel rank pass the same.
        verify: compare the SHA-256 of every shard, of a local one when it is first opened (sizes always are).
        purpose: another purpose gives another, independent order, e.g. "calibration".
        flip: mirror pixels and moments with probability 1/2.
        latent_scale: factor of latents drawn from moments.
        num_workers: processes that read for this rank, at most one per reader of it; 0 reads in this process.
        prefetch: batches that workers prepare ahead, all in shared memory.
        allow_pipe: whether `index` may be `pipe:` and a shell command.
        max_skipped: different damaged examples that may be passed over, in the whole run as far as this rank knows.

    Raises:
        ValueError: for numbers that do not fit together.
        ShardError: when shards are missing or truncated.
    """

    def __init__(
        self, index: Index | str | Path, *, seed: int, num_readers: int, shuffle_buffer: int, global_batch_size: int,
        dp_rank: int = 0, dp_size: int = 1, verify: bool = False, purpose: str = "train", flip: bool = False,
        latent_scale: float = 0.18215, num_workers: int = 0, prefetch: int = 4, max_skipped: int = 0,
        allow_pipe: bool = False,
    ):  # fmt: skip
        index = index if isinstance(index, Index) else load_index(index, allow_pipe)
        self.index, self.num_readers, self.max_skipped = index, num_readers, max_skipped
        self.order: dict[str, Any] = {  # what gives the numbers of a cursor their meaning
            "seed": seed, "purpose": purpose, "num_readers": num_readers, "shuffle_buffer": shuffle_buffer,
            "shards": index.digest,
        }  # fmt: skip
        problems = _setting_problems(index, num_readers, shuffle_buffer, global_batch_size, dp_rank, dp_size)
        if num_workers < 0 or prefetch < 1:
            problems.append(f"`data.num_workers` ({num_workers}) must be at least 0, `data.prefetch` ({prefetch}) 1.")
        if problems:
            raise ValueError("\n".join(problems))
        if missing := check_shards(index, checksums=False):
            raise ShardError("\n".join(missing))
        plan = Plan(index, seed, purpose, num_readers, shuffle_buffer, verify, flip, latent_scale, max_skipped)
        mine = range(dp_rank, num_readers, dp_size)
        self.slots = slots_of(mine, num_readers, global_batch_size)
        rows = [(row, slot % num_readers) for row, slot in enumerate(self.slots)]
        self.source: Part | Pool = Part(plan, mine, rows)
        if num_workers:
            self.source = Pool(plan, mine, rows, min(num_workers, len(mine)), prefetch)
        self.places: dict[int, Cursor] = dict.fromkeys(mine, Cursor())
        self.plan, self.rows, self.before = plan, rows, self.places  # for batch_origin
        self.batches = 0
        self.skipped: set[tuple[str, int]] = set()
        """(shard, position) of the damaged examples that were passed over."""

    @property
    def readers(self) -> dict[int, Reader]:
        """This rank's readers; none when workers read."""
        return self.source.readers if isinstance(self.source, Part) else {}

    @property
    def num_skipped(self) -> int:
        """How often this rank's readers have passed over a damaged example, in all epochs."""
        return sum(place.skipped for place in self.places.values())

    def next_batch(self) -> Batch:
        """This rank's examples of the next global batch: latents (N,C,H,W) f32, labels (N,) i64.

        Raises:
            ShardError: when a shard cannot be read, or too many examples are damaged.
            WorkerError: when a worker process has died.
            Whatever is raised, the cursor stays before this batch.
        """
        latents = torch.empty((len(self.slots), *self.index.latent_shape), dtype=torch.float32)
        labels = torch.empty(len(self.slots), dtype=torch.int64)
        try:
            damages = self.source.fill(latents.numpy(), labels.numpy())
            skipped = self._checked(damages)
        except BaseException:  # whatever happened, a checkpoint made now must not skip examples
            self.source.seek(self.places)
            raise
        self.before, self.places, self.skipped = self.places, self.source.places(), skipped
        self.batches += 1
        return Batch(latents, labels, self.slots)

    def _checked(self, damages: list[Damage]) -> set[tuple[str, int]]:
        """All damaged examples known now; each is reported once, and too many are an error."""
        known = set(self.skipped)
        for damage in damages:
            if (damage.shard, damage.position) not in known:
                known.add((damage.shard, damage.position))
                if len(known) > self.max_skipped:
                    raise too_many(damage, len(known), self.max_skipped)
                log.error("skipped a damaged example (%d of at most %d): %s", len(known), self.max_skipped, damage.text)
        return known

    def state(self) -> dict[str, Any]:
        """The cursor of this rank's readers as plain JSON values; `merge_states` joins those of all ranks."""
        readers = {str(r): place._asdict() for r, place in self.places.items()}
        skipped = [list(place) for place in sorted(self.skipped)]
        return {"readers": readers, "batches": self.batches, "skipped": skipped, "order": dict(self.order)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a cursor of this or of another number of ranks (merged); picks this rank's readers.

        Raises:
            ValueError: when the cursor belongs to another order of examples, or lacks a reader.
        """
        saved = state["order"]
        different = [f"{key} was {saved.get(key)}, is {v}" for key, v in self.order.items() if saved.get(key) != v]
        if different:
            message = f"The saved place in the data is of another stream: {'; '.join(different)}."
            raise ValueError(f"{message} Give the settings and shards of the checkpoint.")
        missing = [r for r in self.places if str(r) not in state["readers"]]
        if missing:
            raise ValueError(f"The saved place in the data lacks readers {missing}. Merge the states of all ranks.")
        self.places = {r: Cursor(**state["readers"][str(r)]) for r in self.places}
        self.source.seek(self.places)
        self.batches = state["batches"]
        self.skipped = {(shard, position) for shard, position in state.get("skipped", [])}

    def close(self) -> None:
        """End the workers; the next batch would start them again."""
        self.source.close()


def _setting_problems(
    index: Index, num_readers: int, shuffle_buffer: int, global_batch_size: int, dp_rank: int, dp_size: int
) -> list[str]:
    """Every reason why these numbers cannot make a stream."""
    given = {"data.num_readers": num_readers, "data.shuffle_buffer": shuffle_buffer}
    given |= {"train.global_batch_size": global_batch_size, "data-parallel size": dp_size}
    found = [f"`{name}` must be above 0, got {value}." for name, value in given.items() if value < 1]
    if found:
        return found
    name = f"`data.num_readers` ({num_readers})"
    if len(index.shards) < num_readers:
        message = f"{name} must be at most the number of shards in {index.folder} ({len(index.shards)})."
        found.append(f"{message} Lower it, or write smaller shards (`data.shard_size`).")
    if num_readers % dp_size:
        found.append(f"{name} must be a multiple of the data-parallel size ({dp_size}). Change one of them.")
    if global_batch_size % num_readers:
        found.append(f"{name} must divide `train.global_batch_size` ({global_batch_size}). Change one of them.")
    if not 0 <= dp_rank < dp_size:
        found.append(f"The data-parallel rank must lie in [0, {dp_size}), got {dp_rank}.")
    return found


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One cursor from those of all data-parallel ranks.

    Raises:
        ValueError: when they are not of the same step and stream.
    """
    parts = list(states)
    merged: dict[str, Any] = {**parts[0], "readers": {}}
    skipped = {(shard, position) for part in parts for shard, position in part.get("skipped", [])}
    merged["skipped"] = [list(place) for place in sorted(skipped)]
    for part in parts:
        clash = [r for r, place in part["readers"].items() if merged["readers"].get(r, place) != place]
        if clash or part["batches"] != merged["batches"] or part["order"] != merged["order"]:
            raise ValueError("The ranks' places in the data are not of the same step and run: they cannot be merged.")
        merged["readers"] |= part["readers"]
    return merged


def _latents_of(index: Index, entries: list[tuple[str, np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """latents (N,C,H,W) f32, drawn once and never mirrored, and labels (N,) i64 of stored examples."""
    latents = torch.empty((len(entries), *index.latent_shape), dtype=torch.float32)
    draw = Draw(0, "all", index.kind)
    for row, (key, array, _) in zip(latents.numpy(), entries, strict=True):
        draw.into(row, key, draw.keep(key, array, 0), 0)
    return latents, torch.tensor([label for _, _, label in entries], dtype=torch.int64)


def read_all(index: Index | str | Path, allow_pipe: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """All examples, in the order of their keys, for sets that fit in memory.

    Args:
        index: an Index, or what `data.shards` may say.
        allow_pipe: whether `index` may be `pipe:` and a shell command.

    Returns:
        latents (N,C,H,W) f32 and labels (N,) i64.
    """
    index = index if isinstance(index, Index) else load_index(index, allow_pipe)
    if missing := check_shards(index, checksums=False):
        raise ShardError("\n".join(missing))
    entries = [entry for shard in index.shards for entry in read_shard(index, shard)]
    return _latents_of(index, sorted(entries, key=lambda entry: entry[0]))


def first_examples(
    index: Index | str | Path, count: int, *, seed: int, purpose: str, num_readers: int = 1, shuffle_buffer: int = 1024
) -> Batch:
    """The first `count` examples of a stream of its own, equal on all ranks; `slots` are 0 ... count - 1."""
    size = -(-count // num_readers) * num_readers  # rounded up to a multiple of the readers
    order: dict[str, Any] = {
        "seed": seed,
        "purpose": purpose,
        "num_readers": num_readers,
        "shuffle_buffer": shuffle_buffer,
    }
    batch = Stream(index, global_batch_size=size, **order).next_batch()
    return Batch(batch.latents[:count], batch.labels[:count], batch.slots[:count])
