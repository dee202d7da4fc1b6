"""The training stream: an endless, reproducible order of examples that does not depend on the number of ranks.

R virtual readers define the order. In epoch e all shards are permuted with (seed, e), and reader r reads every R-th of
them, r, r + R, ...; it shuffles its examples block by block and goes on with its next epoch when they are used up: no
example is dropped or repeated within an epoch. Position s of a global batch comes from reader s mod R, and rank p of P
runs the readers r with r mod P = p. So the whole state of a reader is (epoch, examples emitted in it), and any P that
divides R gives the same global batches.

WebDataset reads the tars one by one; its shuffles and splitters are not used: they ignore seeds and cannot resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entprune_ds import rng
from entprune_ds.data.latents import REMEDY, Batch, Entry, ShardError, decode_example, read_tar
from entprune_ds.data.shards import Index, Shard, check_shards, load_index, shard_problems


def read_shard(index: Index, shard: Shard, skip: int = 0) -> Iterator[Entry]:
    """The examples of one tar in the order of the file, from position `skip` on.

    Raises:
        ShardError: naming the file and the member, when the tar is missing, damaged, or not what the index says.
    """
    _raise_any(shard_problems(index, shard, checksums=False))
    path, count = index.folder / shard.name, 0
    for sample in read_tar(path):
        count += 1
        if count > shard.count:
            break
        if count > skip:
            yield decode_example(path, sample, index.shape, index.num_classes, index.kind)
    if count != shard.count:  # a damaged member header ends a tar silently
        found = f"more than {shard.count} examples" if count > shard.count else f"{count} examples only"
        raise ShardError(f"{path} gives {found}, the index says {shard.count}: it is damaged. {REMEDY}")


def _raise_any(problems: list[str]) -> None:
    if problems:
        raise ShardError("\n".join(problems))


class _Reader:
    """One virtual reader. Its state is (epoch, emitted); the block in memory follows from it."""

    def __init__(self, stream: Stream, number: int):
        self.stream, self.number = stream, number
        self.seek(0, 0)

    def epoch_shards(self, epoch: int) -> list[Shard]:
        """This reader's shards of an epoch, in reading order."""
        shards = self.stream.index.shards
        order = rng.permutation(self.stream.seed, f"{self.stream.purpose}/shards", epoch, 0, len(shards))
        return [shards[i] for i in order[self.number :: self.stream.num_readers]]

    def seek(self, epoch: int, emitted: int) -> None:
        """Go to the place after `emitted` examples of `epoch`; reads nothing yet."""
        self.epoch, self.emitted = epoch, emitted
        self.shards = self.epoch_shards(epoch)
        self.length = sum(shard.count for shard in self.shards)
        self.block: list[Entry] = []
        self.source = self._read(emitted - emitted % self.stream.shuffle_buffer)

    def _read(self, start: int) -> Iterator[Entry]:
        """This epoch's examples from position `start` on, unshuffled."""
        for shard in self.shards:
            if start < shard.count:
                self.stream.verify_once(shard)
                yield from read_shard(self.stream.index, shard, skip=start)
            start = max(start - shard.count, 0)

    def take(self) -> Entry:
        """The next example."""
        if self.emitted == self.length:
            self.seek(self.epoch + 1, 0)
        number, position = divmod(self.emitted, self.stream.shuffle_buffer)
        if position == 0 or not self.block:  # a new block, or the current one after a seek
            block = list(islice(self.source, self.stream.shuffle_buffer))
            purpose = f"{self.stream.purpose}/shuffle/{self.epoch}"
            order = rng.permutation(self.stream.seed, purpose, number, self.number, len(block))
            self.block = [block[i] for i in order]
        self.emitted += 1
        return self.block[position]


class Stream:
    """Endless batches of one data-parallel rank.

    Args:
        index: an Index, or what `data.shards` may say.
        seed: seed of the run.
        num_readers: R; the data-parallel size must divide it, and it must divide the global batch.
        shuffle_buffer: examples that one reader shuffles together (and holds in memory).
        global_batch_size: examples of one step over all ranks.
        dp_rank, dp_size: this rank's place; pipeline stages of one data-parallel rank pass the same.
        verify: compare the SHA-256 of every shard when it is first opened (sizes always are).
        purpose: another purpose gives another, independent order, e.g. "calibration".

    Raises:
        ValueError: for numbers that do not fit together.
        ShardError: when shards are missing or truncated.
    """

    def __init__(
        self, index: Index | str | Path, *, seed: int, num_readers: int, shuffle_buffer: int, global_batch_size: int,
        dp_rank: int = 0, dp_size: int = 1, verify: bool = False, purpose: str = "train",
    ):  # fmt: skip
        self.index = index if isinstance(index, Index) else load_index(index)
        self.seed, self.purpose, self.verify = seed, purpose, verify
        self.num_readers, self.shuffle_buffer = num_readers, shuffle_buffer
        self.order: dict[str, Any] = {  # what gives the numbers of a cursor their meaning
            "seed": seed, "purpose": purpose, "num_readers": num_readers, "shuffle_buffer": shuffle_buffer,
            "shards": self.index.digest,
        }  # fmt: skip
        problems = _setting_problems(self.index, num_readers, shuffle_buffer, global_batch_size, dp_rank, dp_size)
        if problems:
            raise ValueError("\n".join(problems))
        _raise_any(check_shards(self.index, checksums=False))
        self.verified: set[str] = set()
        self.readers = {r: _Reader(self, r) for r in range(dp_rank, num_readers, dp_size)}
        self.slots = tuple(s for s in range(global_batch_size) if s % num_readers in self.readers)
        self.batches = 0

    def verify_once(self, shard: Shard) -> None:
        """Compare the checksum of a shard before its first use, where `verify` asks for it."""
        if self.verify and shard.name not in self.verified:
            _raise_any(shard_problems(self.index, shard, checksums=True))
            self.verified.add(shard.name)

    def next_batch(self) -> Batch:
        """This rank's examples of the next global batch: latents (N,C,H,W) f32, labels (N,) i64.

        Raises:
            ShardError: when a shard cannot be read; the cursor stays before this batch.
        """
        before = self.state()
        try:
            entries = [self.readers[slot % self.num_readers].take() for slot in self.slots]
        except BaseException:  # whatever happened, a checkpoint made now must not skip examples
            self.load_state(before)
            raise
        self.batches += 1
        return Batch(*_collate(entries), self.slots)

    def state(self) -> dict[str, Any]:
        """The cursor of this rank's readers as plain JSON values; `merge_states` joins those of all ranks."""
        readers = {str(r): {"epoch": reader.epoch, "emitted": reader.emitted} for r, reader in self.readers.items()}
        return {"readers": readers, "batches": self.batches, "order": dict(self.order)}

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
        missing = [r for r in self.readers if str(r) not in state["readers"]]
        if missing:
            raise ValueError(f"The saved place in the data lacks readers {missing}. Merge the states of all ranks.")
        for r, reader in self.readers.items():
            reader.seek(state["readers"][str(r)]["epoch"], state["readers"][str(r)]["emitted"])
        self.batches = state["batches"]


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


def _collate(entries: list[Entry]) -> tuple[torch.Tensor, torch.Tensor]:
    """latents (N,C,H,W) f32 and labels (N,) i64 of examples."""
    latents = np.stack([latents for _, latents, _ in entries])
    return torch.from_numpy(latents), torch.tensor([label for _, _, label in entries], dtype=torch.int64)


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One cursor from those of all data-parallel ranks.

    Raises:
        ValueError: when they are not of the same step and stream.
    """
    parts = list(states)
    merged: dict[str, Any] = {**parts[0], "readers": {}}
    for part in parts:
        clash = [r for r, place in part["readers"].items() if merged["readers"].get(r, place) != place]
        if clash or part["batches"] != merged["batches"] or part["order"] != merged["order"]:
            raise ValueError("The ranks' places in the data are not of the same step and run: they cannot be merged.")
        merged["readers"] |= part["readers"]
    return merged


def read_all(index: Index | str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All examples, in the order of their keys, for sets that fit in memory.

    Returns:
        latents (N,C,H,W) f32 and labels (N,) i64.
    """
    index = index if isinstance(index, Index) else load_index(index)
    _raise_any(check_shards(index, checksums=False))
    entries = [entry for shard in index.shards for entry in read_shard(index, shard)]
    return _collate(sorted(entries, key=lambda entry: entry[0]))


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
