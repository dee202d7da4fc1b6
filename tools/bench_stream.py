"""How fast the stream is, against iterating the same tars with `tarfile` and reading every member.

  python tools/bench_stream.py [--json] [examples=N] [repeats=N]

Writes shards of VAE moments (2x8x32x32 f32, 64 KiB each: latents of 4x32x32 and their mirror images) into a temporary
folder and reads them all in five ways, one after the other, again and again; medians count. The files stay in the page
cache, so this measures the reading and not the disk.

  raw        read() of whole files, nothing parsed
  tarfile    tarfile.open, every member read, one process: the reference of the ratios
  stream     our stream in this process: parsed, checked, shuffled, drawn into batches of f32 latents
  2 workers  the same with two worker processes that run already; batches prepared before the clock starts do not count
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from entprune_ds.data.index import Index, load_index
from entprune_ds.data.latents import Example
from entprune_ds.data.shards import write_shards
from entprune_ds.data.stream import Stream

SHARDS, READERS, BUFFER, BATCH, PREFETCH = 32, 16, 64, 64, 4


def examples(count: int) -> Iterator[Example]:
    """Random moments; a handful of different arrays is enough, none is looked at."""
    arrays = np.random.default_rng(0).standard_normal((8, 2, 8, 32, 32)).astype(np.float32)
    for i in range(count):
        yield f"example-{i:06d}", arrays[i % 8], i % 1000, {"source": "bench", "position": i}


def raw(index: Index) -> int:
    """Read every file whole."""
    for shard in index.shards:
        with open(f"{index.folder}/{shard.name}", "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    return index.total


def with_tarfile(index: Index) -> int:
    """Read every member of every tar."""
    count = 0
    for shard in index.shards:
        with tarfile.open(f"{index.folder}/{shard.name}") as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                count += bool(file.read()) and member.name.endswith(".npy")
    return count


def with_stream(stream: Stream) -> int:
    """As many batches as hold every example once."""
    batches = stream.index.total // BATCH
    for _ in range(batches):
        stream.next_batch()
    return batches * BATCH


def measure(index: Index, repeats: int) -> dict[str, float]:
    """Examples per second of every way: median over interleaved repeats."""
    settings = dict(seed=0, num_readers=READERS, shuffle_buffer=BUFFER, global_batch_size=BATCH, flip=True)
    alone, two = Stream(index, **settings), Stream(index, **settings, num_workers=2, prefetch=PREFETCH)  # type: ignore[arg-type]
    ways: dict[str, Callable[[], int]] = {
        "raw": lambda: raw(index), "tarfile": lambda: with_tarfile(index), "stream": lambda: with_stream(alone),
        "stream_2_workers": lambda: with_stream(two),
    }  # fmt: skip
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            for _ in range(PREFETCH if way is ways["stream_2_workers"] else 0):
                two.next_batch()  # what the workers have prepared while others were measured does not count
            start = time.perf_counter()
            rates[name].append(way() / (time.perf_counter() - start))
    two.close()
    return {name: statistics.median(found) for name, found in rates.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=4096, help="examples in the shards")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repeats; medians are printed")
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    options = parser.parse_args()
    count, repeats = options.examples, options.repeats
    with tempfile.TemporaryDirectory() as folder:
        write_shards(examples(count), Path(folder), -(-count // SHARDS), {}, num_classes=1000, kind="moments")
        index = load_index(folder)
        rates = measure(index, repeats)
        megabytes = sum(shard.bytes for shard in index.shards) / index.total / 1e6
    found = {
        "ratio": rates["stream"] / rates["tarfile"],
        "ratio_2_workers": rates["stream_2_workers"] / rates["tarfile"],
        **{f"{name}_examples_per_second": rate for name, rate in rates.items()},
        **{f"{name}_megabytes_per_second": rate * megabytes for name, rate in rates.items()},
        "examples": count, "repeats": repeats, "cpus": os.cpu_count(), "load": os.getloadavg()[0],
    }  # fmt: skip
    if options.json:
        print(json.dumps(found))
        return
    for name, rate in rates.items():
        print(
            f"{name:17s} {rate:10.0f} examples/s {rate * megabytes:8.0f} MB/s {rate / rates['tarfile']:6.2f} x tarfile"
        )


if __name__ == "__main__":
    main()
