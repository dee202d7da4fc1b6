"""Data that make the loss infinite at chosen steps: finite latents so large that their square is not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from entprune_ds.config import Config
from entprune_ds.data.index import load_index
from entprune_ds.data.latents import Example
from entprune_ds.data.origin import batch_origin
from entprune_ds.data.shards import write_shards
from entprune_ds.data.stream import Stream, read_shard


def keys_by_step(config: Config, last: int) -> dict[int, list[str]]:
    """Keys of the global batch of the steps 1 ... last of a run that nothing happens to."""
    data, found = config.data, {}
    stream = Stream(
        data.shards, seed=config.run.seed, num_readers=data.num_readers, shuffle_buffer=data.shuffle_buffer,
        global_batch_size=config.train.global_batch_size,
    )  # fmt: skip
    for step in range(1, last + 1):
        stream.next_batch()
        found[step] = batch_origin(stream).keys
    return found


def poison(config: Config, out: Path, steps: list[int], value: float = 1e30) -> dict[int, str]:
    """Write the training shards of a config to `out`, with one example of each step overwritten by `value`.

    Returns:
        {step: key of its bad example}.
    """
    index, keys = load_index(config.data.shards), keys_by_step(config, max(steps))
    bad = {step: keys[step][-1] for step in steps}

    def example(key: str, array, label: int) -> Example:
        if key in bad.values():
            array = array * 0 + value
        return key, array, label, {}

    examples = [example(*entry) for shard in index.shards for entry in read_shard(index, shard)]
    facts = {"poisoned": sorted(bad.values()), "shards": [asdict(s)["name"] for s in index.shards]}
    write_shards(examples, out, index.shard_size, facts, num_classes=index.num_classes)
    return bad
