"""One virtual reader: the endless sequence of examples that its number, the seed and the shards define.

In epoch e all shards are permuted with (seed, e), and reader r of R reads every R-th of them: r, r + R, ... Its
examples are shuffled block by block, and its next epoch follows when they are used up. The state of a reader is its
place (epoch, positions used in it). A damaged example keeps its position; whoever asks gets the next one instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

from entprune_ds import rng
from entprune_ds.data.draw import Draw
from entprune_ds.data.index import Index, Shard, from_json, shard_problems, to_json
from entprune_ds.data.latents import REMEDY, Entry, ShardError, decode_example
from entprune_ds.data.source import open_shard
from entprune_ds.data.tar import read_samples


class Cursor(NamedTuple):
    """The state of a reader."""

    epoch: int = 0
    emitted: int = 0
    """Positions of the epoch that are used."""
    skipped: int = 0
    """Damaged examples that were passed over, in all epochs."""


@dataclass(frozen=True)
class Plan:
    """What defines the sequence of every reader, and how examples become latents."""

    index: Index
    seed: int
    purpose: str
    num_readers: int
    shuffle_buffer: int
    verify: bool
    """Compare the checksum of every shard: of a local one before it is used, of a remote one at its end."""
    flip: bool
    latent_scale: float
    max_skipped: int

    def draw(self) -> Draw:
        """How latents are made of the examples."""
        return Draw(self.seed, self.purpose, self.index.kind, self.flip, self.latent_scale)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a worker."""
        return {**vars(self), "index": to_json(self.index)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """The plan that `to_json` made plain."""
        return replace(cls(**values), index=from_json(values["index"]))


@dataclass(frozen=True)
class Damage:
    """An example that cannot be used."""

    shard: str
    position: int
    """In the shard."""
    text: str
    """What is wrong, with the file and the member, and the remedy."""


def scan_shard(index: Index, shard: Shard, skip: int = 0, verify: bool = False) -> Iterator[Entry | Damage]:
    """What stands at the positions skip, ..., shard.count - 1 of a tar, in the order of the file.

    Raises:
        ShardError: when the tar is missing or of another size, holds more examples than the index says, or (`verify`)
            is a remote one with another checksum, which is known only at its end.
    """
    _raise_any(shard_problems(index, shard, checksums=False))
    path, position, last = index.folder / shard.name, skip, ""
    with open_shard(path, shard, verify) as source:
        for sample in read_samples(source, skip):
            if position == shard.count:
                found = f"{path} gives more than {shard.count} examples, the index says {shard.count}"
                raise ShardError(f"{found}: it is damaged. {REMEDY}")
            last = ""
            try:
                yield decode_example(path, sample, index.shape, index.num_classes, index.kind)
            except ShardError as error:
                last = str(error)
                yield Damage(shard.name, position, last)
            position += 1
        source.finish()
    if position < shard.count:  # the end is cut off, or both members of an example are gone
        text = f"{path} gives {position} examples only, the index says {shard.count}: it is damaged. {REMEDY}"
        text = f"{last} {text}" if last else text
        yield from (Damage(shard.name, missing, text) for missing in range(position, shard.count))


def read_shard(index: Index, shard: Shard, skip: int = 0) -> Iterator[Entry]:
    """The examples of one tar in the order of the file, from position `skip` on.

    Raises:
        ShardError: naming the file and the member, when the tar is missing, damaged, or not what the index says.
    """
    for found in scan_shard(index, shard, skip):
        if isinstance(found, Damage):
            raise ShardError(found.text)
        yield found


def _raise_any(problems: list[str]) -> None:
    if problems:
        raise ShardError("\n".join(problems))


class Reader:
    """Reads ahead evenly: each example that leaves the shuffled block makes room for one of the next block."""

    def __init__(self, plan: Plan, number: int, verified: set[str]):
        self.plan, self.number, self.verified, self.draw = plan, number, verified, plan.draw()
        self.damages: list[Damage] = []
        """Met since the list was last emptied."""
        self.seek(0, 0)

    def epoch_shards(self, epoch: int) -> list[Shard]:
        """This reader's shards of an epoch, in reading order."""
        shards = self.plan.index.shards
        order = rng.permutation(self.plan.seed, f"{self.plan.purpose}/shards", epoch, 0, len(shards))
        return [shards[i] for i in order[self.number :: self.plan.num_readers]]

    def seek(self, epoch: int, emitted: int, skipped: int = 0) -> None:
        """Go to the place after `emitted` positions of `epoch`; reads nothing yet."""
        self._enter(epoch)
        self.emitted, self.skipped, self.sound = emitted, skipped, emitted > 0  # what came before is not known
        self.block: list[Entry | Damage | None] = []
        self.ahead: list[Entry | Damage] = []
        self.source: Iterator[Entry | Damage] | None = None

    @property
    def place(self) -> Cursor:
        """The place after what was taken last."""
        return Cursor(self.epoch, self.emitted, self.skipped)

    def take(self) -> Entry:
        """The next example: key, what Draw.keep left of its array, label; `epoch` is then its epoch.

        Raises:
            ShardError: when the shards cannot be read, more examples of one batch are damaged than may be skipped, or
                all of a whole epoch of this reader.
        """
        while isinstance(found := self._next(), Damage):
            self.skipped += 1
            self.damages.append(found)
            if len(self.damages) > self.plan.max_skipped:
                raise too_many(found, len(self.damages), self.plan.max_skipped)
            if self.emitted == self.length and not self.sound:  # going round again would find nothing either
                raise self._none_sound(found)
        self.sound = True
        return found

    def _none_sound(self, last: Damage) -> ShardError:
        names = [shard.name for shard in self.shards]
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more shards" if len(names) > 5 else "")
        message = f"Not one of the {self.length} examples of an epoch of reader {self.number} ({some}) is sound. "
        message += "Repair these shards, or leave them out of `data.shards`. "
        return ShardError(f"{message}The last one: {last.text}")

    def _enter(self, epoch: int) -> None:
        self.epoch, self.emitted, self.sound = epoch, 0, False
        self.shards = self.epoch_shards(epoch)
        self.length = sum(shard.count for shard in self.shards)

    def _next(self) -> Entry | Damage:
        buffer = self.plan.shuffle_buffer
        if self.emitted == self.length:
            self._enter(self.epoch + 1)
        number, position = divmod(self.emitted, buffer)
        if self.source is None:  # after a seek
            self.source = self._read(self.epoch, number * buffer)
        if position == 0 or not self.block:  # a new block, or the current one after a seek
            self.block = self._shuffled(number, min(buffer, self.length - number * buffer))
        found, self.block[position] = self.block[position], None
        if len(self.ahead) < buffer:
            self.ahead.append(next(self.source))
        self.emitted += 1
        assert found is not None  # a place is passed once
        return found

    def _shuffled(self, number: int, size: int) -> list[Entry | Damage | None]:
        """Block `number` of this epoch."""
        assert self.source is not None
        while len(self.ahead) < size:
            self.ahead.append(next(self.source))
        block, self.ahead = self.ahead[:size], self.ahead[size:]
        purpose = f"{self.plan.purpose}/shuffle/{self.epoch}"
        return [block[i] for i in rng.permutation(self.plan.seed, purpose, number, self.number, size)]

    def _read(self, epoch: int, start: int) -> Iterator[Entry | Damage]:
        """What stands at position `start` of an epoch and at all later ones, unshuffled; epoch follows epoch."""
        for later in count(epoch):
            for shard in self.epoch_shards(later):
                if start < shard.count:
                    self._verify_once(shard)
                    for found in scan_shard(self.plan.index, shard, start, self.plan.verify):
                        if isinstance(found, Damage):
                            yield found
                        else:
                            key, array, label = found
                            yield key, self.draw.keep(key, array, later), label
                start = max(start - shard.count, 0)

    def _verify_once(self, shard: Shard) -> None:
        """Compare the checksum of a shard before its first use."""
        if self.plan.verify and shard.name not in self.verified:
            _raise_any(shard_problems(self.plan.index, shard, checksums=True))
            self.verified.add(shard.name)


def too_many(damage: Damage, number: int, limit: int) -> ShardError:
    """The error when `number` damaged examples are above the limit; `damage` is the last of them."""
    return ShardError(f"{damage.text} Damaged examples so far: {number}, `data.max_skipped` allows {limit}.")
