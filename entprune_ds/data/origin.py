"""Where the examples of a batch came from: read again, only when somebody asks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from entprune_ds.data.reader import Reader
from entprune_ds.data.stream import Stream


@dataclass(frozen=True)
class Origin:
    """What a batch of one rank was made of."""

    shards: list[str]
    """Those that its examples lie in; a shuffle buffer spreads them over few neighbours."""
    keys: list[str]
    """Of the examples, in the order of the batch."""


def batch_origin(stream: Stream) -> Origin:
    """Shards and keys of the newest batch of a stream. Local.

    Raises:
        ShardError: when a shard cannot be read any more.
    """
    plan = replace(stream.plan, verify=False)
    readers = {number: Reader(plan, number, set()) for number in stream.before}
    for number, place in stream.before.items():
        readers[number].seek(*place)
    keys, shards = list[str](), dict[str, None]()
    for _, number in stream.rows:
        keys.append(readers[number].take()[0])
        shards |= dict.fromkeys(_block_shards(readers[number]))
    return Origin(list(shards), keys)


def _block_shards(reader: Reader) -> list[str]:
    """Shards that the shuffled block of the example that was taken last comes from."""
    buffer = reader.plan.shuffle_buffer
    first = (reader.emitted - 1) // buffer * buffer
    ends = accumulate(shard.count for shard in reader.shards)
    spans = zip(reader.shards, ends, strict=True)
    return [shard.name for shard, end in spans if end > first and end - shard.count < first + buffer]
