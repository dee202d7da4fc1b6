"""The stream at scale: every example once, whatever the ranks and workers; damage, dead workers and dead ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from entprune_ds import rng
from entprune_ds.data import pool
from entprune_ds.data.draw import Draw
from entprune_ds.data.index import load_index
from entprune_ds.data.latents import ShardError, encode_array
from entprune_ds.data.pool import WorkerError
from entprune_ds.data.reader import Damage, scan_shard
from entprune_ds.data.shards import write_shards
from entprune_ds.data.stream import Stream, merge_states, read_all
from entprune_ds.data.tar import _is_header
from tests.test_data import overwrite, replace_member

COUNT, READERS, BATCH = 317, 12, 24  # prime: nothing divides it
SETTINGS = {"seed": 5, "num_readers": READERS, "shuffle_buffer": 10, "global_batch_size": BATCH, "flip": True}
EPOCH = 20
"""Batches after which every reader is in its second epoch at least."""


def examples(count=COUNT):
    """Moments of 1x2x2 that carry their number as label."""
    for i in range(count):
        yield f"m{i:04d}", np.random.default_rng(i).standard_normal((2, 2, 2, 2)).astype(np.float32), i, {}


def write(folder, shard_size=13):
    write_shards(examples(), folder, shard_size, {"source": "test"}, num_classes=COUNT, kind="moments")
    return load_index(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """25 shards for 12 readers; the last one is shorter."""
    return write(tmp_path_factory.mktemp("data") / "train")


def global_batches(index, steps, dp_size=1, num_workers=0, state=None, **changes):
    """`steps` global batches (latents and labels in slot order), assembled from all ranks, and the merged state."""
    settings = {**SETTINGS, **changes, "num_workers": num_workers}
    ranks = [Stream(index, **settings, dp_rank=p, dp_size=dp_size) for p in range(dp_size)]
    for stream in ranks:
        if state is not None:
            stream.load_state(state)
    batches = []
    for _ in range(steps):
        parts = [stream.next_batch() for stream in ranks]
        assert len({len(part.labels) for part in parts}) == 1  # equal counts on all ranks
        order = torch.tensor([slot for part in parts for slot in part.slots]).argsort()
        assert sorted(slot for part in parts for slot in part.slots) == list(range(BATCH))
        latents, labels = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("latents", "labels"))
        batches.append((latents, labels))
    state = merge_states(json.loads(json.dumps([stream.state() for stream in ranks])))
    for stream in ranks:
        stream.close()
    return batches, state


def same(one, other):
    """Whether two sequences of batches are equal, bit by bit."""
    return len(one) == len(other) and all(
        torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True)
    )


def first_epoch(index, batches):
    """How often each example was in the first epoch of the reader that gave it."""
    given = {r: [] for r in range(READERS)}
    for _, labels in batches:
        for slot, label in enumerate(labels.tolist()):
            given[slot % READERS].append(label)
    lengths = {r: reader.length for r, reader in Stream(index, **SETTINGS).readers.items()}
    assert all(len(given[r]) >= lengths[r] for r in given)
    return Counter(label for r in given for label in given[r][: lengths[r]])


# ---------------------------------------------------------------- every example once


@pytest.fixture(scope="module")
def reference(index):
    """The batches of one rank without workers."""
    return global_batches(index, EPOCH + 10)


def test_one_rank_gives_every_example_once_an_epoch(index, reference):
    assert first_epoch(index, reference[0]) == Counter(range(COUNT))


@pytest.mark.parametrize(("dp_size", "num_workers"), [(2, 0), (3, 0), (4, 0), (2, 1)])
def test_ranks_and_workers_change_nothing(index, reference, dp_size, num_workers):
    batches, state = global_batches(index, EPOCH + 10, dp_size, num_workers)
    assert same(batches, reference[0]) and state == reference[1]


@pytest.mark.full
@pytest.mark.parametrize("shard_size", [7, 26])  # 46 and 13 shards
@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_matrix_of_ranks_workers_and_shards(tmp_path, dp_size, num_workers, shard_size):
    index = write(tmp_path / "d", shard_size)
    whole, end = global_batches(index, 3 * EPOCH)
    assert first_epoch(index, whole) == Counter(range(COUNT))
    head, state = global_batches(index, EPOCH + 3, dp_size, num_workers)
    tail, last = global_batches(index, 2 * EPOCH - 3, 5 - dp_size, int(num_workers < 2), state)
    assert same(head + tail, whole) and last == end


def test_a_resume_with_other_ranks_and_workers_sees_exactly_what_was_not_seen(index, reference):
    head, state = global_batches(index, EPOCH + 3, dp_size=1, num_workers=2)
    tail, end = global_batches(index, 7, dp_size=3, state=state)
    assert same(head + tail, reference[0]) and end == reference[1]


# ---------------------------------------------------------------- latents of moments


def test_draws_are_new_in_every_epoch_and_follow_the_formula(index):
    stored = {key: array for key, array, _, _ in examples()}
    reader = Stream(index, **SETTINGS).readers[0]
    draw, halves, latents = Draw(5, "train", "moments", flip=True), Counter(), {}
    for _ in range(2 * reader.length):
        key, array, _ = reader.take()
        whole = stored[key]
        row = np.empty((1, 2, 2), np.float32)
        draw.into(row, key, array, reader.epoch)
        generator = rng.generator_for(5, f"train/latents/{key}", reader.epoch)
        mirrored = generator.initial_seed() >> 62
        noise = torch.randn((1, 2, 2), generator=generator).double().numpy()
        assert np.array_equal(array, whole[mirrored])
        mean, log_variance = whole[mirrored].astype(np.float64)
        assert np.allclose(row, (mean + np.exp(log_variance / 2) * noise) * 0.18215, atol=1e-6)
        halves[mirrored] += 1
        latents[key, reader.epoch] = row
    assert min(halves.values()) > 10
    assert len({row.tobytes() for row in latents.values()}) == len(latents)
    first, other = np.empty((2, 1, 2, 2), np.float32)
    for again in (Draw(5, "train", "moments", flip=True), Draw(6, "train", "moments"), Draw(5, "eval", "moments")):
        draw.into(first, key, array, epoch=0)
        again.into(other, key, array, epoch=int(again == draw))  # another epoch, another seed, another purpose
        assert not np.array_equal(first, other)


def test_moments_have_the_mean_and_variance_they_say():
    array = np.stack([np.full((2, 1, 1), v, np.float32) for v in (0.5, 7.0)])
    array[:, 1] = np.log(4.0)
    rows = np.empty((4000, 1, 1, 1), np.float32)
    for i, row in enumerate(rows):
        Draw(0, "train", "moments", scale=2.0).into(row, f"k{i}", array[0], 0)
    assert abs(rows.mean() - 1.0) < 4 * 4 / 4000**0.5 and abs(rows.std() / 4 - 1) < 4 / 8000**0.5


def test_pixels_are_scaled_and_flipped(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 2, 4), dtype=np.uint8)
    listed = ((f"p{i}", image, i, {}) for i, image in enumerate(images))
    write_shards(listed, tmp_path, 10, {}, num_classes=40, kind="pixels")
    settings = {"seed": 0, "num_readers": 4, "shuffle_buffer": 8, "global_batch_size": 40}
    expected = torch.from_numpy(images).double() / 127.5 - 1
    batch = Stream(tmp_path, **settings).next_batch()
    assert batch.latents.min() == -1 and batch.latents.max() == 1
    assert torch.allclose(batch.latents.double(), expected[batch.labels], atol=1e-6)
    flipped = Stream(tmp_path, **settings, flip=True).next_batch()
    plain = [torch.equal(a, b) for a, b in zip(flipped.latents, batch.latents, strict=True)]
    mirror = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped.latents, batch.latents, strict=True)]
    assert all(a != b for a, b in zip(plain, mirror, strict=True)) and 5 < sum(mirror) < 35
    latents, labels = read_all(tmp_path)
    assert torch.allclose(latents.double(), expected[labels], atol=1e-6)


def test_latents_cannot_be_flipped(tmp_path):
    write_shards([("a", np.zeros((1, 2, 2), np.float32), 0, {})], tmp_path, 1, {}, num_classes=1)
    with pytest.raises(ValueError, match=r"`data.flip` needs shards of pixels or moments"):
        Stream(tmp_path, seed=0, num_readers=1, shuffle_buffer=1, global_batch_size=1, flip=True)


# ---------------------------------------------------------------- damage


def break_three(folder):
    """Damage examples 20 (nan), 30 (a header: its .npy is gone) and 40 (its label); the index agrees with the files."""
    replace_member(folder / "shard-000001.tar", "m0020.npy", encode_array(np.full((2, 2, 2, 2), np.nan)))
    path = folder / "shard-000002.tar"
    overwrite(path, path.read_bytes().index(b"m0030.npy"), b"m0030.xyz")
    replace_member(folder / "shard-000003.tar", "m0040.cls", b"317")
    return {20, 30, 40}


def test_damaged_examples_are_skipped_counted_and_nothing_else_changes(tmp_path, capsys):
    index = write(tmp_path / "d")
    broken = break_three(tmp_path / "d")
    whole, end = global_batches(index, 40, max_skipped=3)
    lengths = {r: reader.length for r, reader in Stream(index, **SETTINGS).readers.items()}
    given = {r: [] for r in range(READERS)}
    for _, labels in whole:
        for slot, label in enumerate(labels.tolist()):
            given[slot % READERS].append(label)
    assert not broken & {label for labels in given.values() for label in labels}
    places = end["readers"]
    for r, labels in given.items():  # positions used = examples given + damaged ones passed over
        used = places[str(r)]["emitted"] + sum(
            sum(s.count for s in Stream(index, **SETTINGS).readers[r].epoch_shards(e))
            for e in range(places[str(r)]["epoch"])
        )
        assert used == len(labels) + places[str(r)]["skipped"] and lengths[r] > 0
    assert end["skipped"] == [["shard-000001.tar", 7], ["shard-000002.tar", 4], ["shard-000003.tar", 1]]
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped a damaged example" in line]
    assert len(told) == 3  # each once, although some came twice
    assert any("d/shard-000002.tar: member m0030.npy is missing" in line for line in told)
    for dp_size, num_workers in ((3, 0), (1, 1)):
        head, state = global_batches(index, 17, dp_size, num_workers, max_skipped=3)
        tail, last = global_batches(index, 23, 1, state=state, max_skipped=3)
        assert same(head + tail, whole) and last == end


def test_a_header_is_believed_only_with_its_checksum(tmp_path):
    index = write(tmp_path / "d")
    path = tmp_path / "d" / "shard-000002.tar"
    content = path.read_bytes()
    overwrite(path, content.index(b"m0030.cls"), b"m0930.cls")  # taken at its word, it would be an example more
    found = list(scan_shard(index, index.shards[2]))
    assert len(found) == 13 and isinstance(found[4], Damage) and "m0030.cls is missing" in found[4].text
    assert not any(isinstance(one, Damage) for i, one in enumerate(found) if i != 4)
    path.write_bytes(content)
    for size in (b"-0000000001\0", b"77777777777\0", b"9999999999x\0"):
        header = bytearray(content[:512])
        header[124:136], header[148:156] = size, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        assert not _is_header(bytes(header)) and _is_header(content[:512])


def test_one_more_than_allowed_ends_the_run_and_the_cursor_stays(tmp_path):
    index = write(tmp_path / "d")
    break_three(tmp_path / "d")
    stream = Stream(index, **SETTINGS, max_skipped=2)
    with pytest.raises(ShardError, match=r"Damaged examples so far: 3, `data.max_skipped` allows 2"):
        for _ in range(EPOCH):
            before = stream.state()
            stream.next_batch()
    assert stream.state() == before
    again = Stream(index, **SETTINGS, max_skipped=3)
    again.load_state(before)
    whole, _ = global_batches(index, before["batches"] + 1, max_skipped=3)
    assert torch.equal(again.next_batch().latents, whole[-1][0])


def test_shards_without_one_sound_example_end_the_run_at_once(tmp_path):
    write(tmp_path / "d")
    values = json.loads((tmp_path / "d" / "index.json").read_text())
    (tmp_path / "d" / "index.json").write_text(json.dumps(values | {"shape": [2, 2, 2, 4]}))
    with pytest.raises(ShardError, match="the index says float32"):
        Stream(load_index(tmp_path / "d"), **SETTINGS, max_skipped=100).next_batch()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_reader_without_a_sound_example_stops_after_one_pass_however_many_may_be_skipped(tmp_path, num_workers):
    write(tmp_path / "d")
    values = json.loads((tmp_path / "d" / "index.json").read_text())
    (tmp_path / "d" / "index.json").write_text(json.dumps(values | {"shape": [2, 2, 2, 4]}))
    index = load_index(tmp_path / "d")
    stream = Stream(index, **SETTINGS, max_skipped=10**9, num_workers=num_workers)
    length = Stream(index, **SETTINGS).source.readers[0].length
    with pytest.raises(ShardError, match=rf"Not one of the {length} examples of an epoch .*the index says float32"):
        stream.next_batch()
    assert stream.num_skipped == 0 and stream.batches == 0


def test_one_sound_example_in_a_pass_is_enough(tmp_path):
    index = write(tmp_path / "d")
    one = Stream(index, **SETTINGS).readers[0].shards[0]
    number = int(one.name[6:12]) * 13
    for i in range(number + 1, number + 13):
        replace_member(tmp_path / "d" / one.name, f"m{i:04d}.cls", b"317")
    settings = {"seed": 5, "num_readers": 1, "shuffle_buffer": 10, "global_batch_size": 3, "max_skipped": 100}
    stream = Stream(load_index(tmp_path / "d" / one.name), **settings)
    assert [stream.next_batch().labels.tolist() for _ in range(3)] == [[number] * 3] * 3


# ---------------------------------------------------------------- workers that die, ranks that die


def test_workers_ahead_leave_the_cursor_alone_and_a_killed_one_is_a_clear_error(index, reference):
    stream = Stream(index, **SETTINGS, num_workers=2, prefetch=2)
    got = [stream.next_batch()]
    time.sleep(0.5)  # the workers are ahead now: by as much as the memory holds, and the cursor does not show it
    assert stream.source.ring.latents.shape[0] == 2 and stream.state() == global_batches(index, 1)[1]
    victim = stream.source.workers[1].process
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=rf"data worker 1 \(process {victim.pid}\) was killed by SIGKILL.*memory"):
        for _ in range(4):
            got.append(stream.next_batch())
    assert stream.source.workers == [] and stream.state()["batches"] == len(got)
    got.append(stream.next_batch())
    assert same([(b.latents, b.labels) for b in got], reference[0][: len(got)])
    stream.close()


def test_a_worker_reports_what_it_cannot_read_at_the_batch_that_needs_it(tmp_path):
    index = write(tmp_path / "d")
    break_three(tmp_path / "d")
    alone = Stream(index, **SETTINGS)
    with pytest.raises(ShardError):
        for _ in range(EPOCH):
            alone.next_batch()
    stream = Stream(index, **SETTINGS, num_workers=1, prefetch=3)
    for _ in range(alone.batches):
        stream.next_batch()
    with pytest.raises(ShardError, match=r"d/shard-00000\d.tar.*allows 0"):
        stream.next_batch()
    assert stream.state() == alone.state()


RANK = """
import sys, time
from entprune_ds.data.stream import Stream
stream = Stream(sys.argv[1], seed=0, num_readers=2, shuffle_buffer=4, global_batch_size=2, num_workers=2)
stream.next_batch()
print(*(worker.process.pid for worker in stream.source.workers), flush=True)
time.sleep(60)
"""


def test_no_worker_outlives_a_killed_rank(index):
    command = [sys.executable, "-c", RANK, str(index.folder)]
    root = Path(pool.__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as rank:
        workers = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(workers) == 2 and all(alive(pid) for pid in workers)
        rank.kill()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.05)


def alive(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.full
def test_bench_prints_its_ratios():
    command = [sys.executable, "tools/bench_stream.py", "--json", "--examples", "512", "--repeats", "3"]
    root = Path(pool.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert {"ratio", "ratio_2_workers", "raw_megabytes_per_second"} <= found.keys() and min(found.values()) > 0
