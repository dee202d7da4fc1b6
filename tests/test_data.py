"""Shards and the stream: nothing lost, nothing repeated, the same order on any number of ranks, exact resume."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
import webdataset

from entprune_ds.cli import shards as shards_command
from entprune_ds.data import builtin
from entprune_ds.data.index import check_shards, load_index, resolve
from entprune_ds.data.latents import ShardError, decode_array, decode_label, decode_meta, encode_array, encode_example
from entprune_ds.data.shards import write_shards
from entprune_ds.data.stream import Stream, first_examples, merge_states, read_all, read_shard

COUNT, SHARD_SIZE, READERS, BUFFER, BATCH = 250, 15, 4, 20, 8  # 17 shards, the last one of 10 examples
SETTINGS = {"seed": 3, "num_readers": READERS, "shuffle_buffer": BUFFER, "global_batch_size": BATCH}


def numbered_examples(count=COUNT):
    """Examples that carry their number in the first value and as label."""
    for i in range(count):
        latents = np.full((2, 4, 4), i, np.float32)
        latents[1] = np.random.default_rng(i).standard_normal((4, 4))
        yield f"n{i:05d}", latents, i, {"number": i}


def write(folder, count=COUNT, shard_size=SHARD_SIZE):
    write_shards(numbered_examples(count), folder, shard_size, {"source": "numbers", "count": count}, num_classes=COUNT)
    return load_index(folder)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "train")


def global_batches(index, steps, dp_size=1, state=None, **changes):
    """`steps` global batches (labels in slot order), assembled from all ranks, and the merged state."""
    ranks = [Stream(index, **{**SETTINGS, **changes}, dp_rank=p, dp_size=dp_size) for p in range(dp_size)]
    for stream in ranks:
        if state is not None:
            stream.load_state(state)
    batches = []
    for _ in range(steps):
        by_slot = {}
        for batch in (stream.next_batch() for stream in ranks):
            assert list(batch.slots) == sorted(batch.slots) and not set(batch.slots) & set(by_slot)
            assert torch.equal(batch.latents[:, 0, 0, 0].long(), batch.labels)
            by_slot |= dict(zip(batch.slots, batch.labels.tolist(), strict=True))
        batches.append([by_slot[slot] for slot in range(BATCH)])
    return batches, merge_states(json.loads(json.dumps([stream.state() for stream in ranks])))


def flat(batches):
    return [label for batch in batches for label in batch]


# ---------------------------------------------------------------- order


def test_batch_has_the_promised_types(index):
    batch = Stream(index, **SETTINGS, dp_rank=1, dp_size=2).next_batch()
    assert batch.latents.dtype == torch.float32 and batch.latents.shape == (4, 2, 4, 4)
    assert batch.labels.dtype == torch.int64 and batch.slots == (1, 3, 5, 7)
    number = int(batch.labels[0])
    expected = next(latents for _, latents, label, _ in numbered_examples() if label == number)
    assert np.array_equal(batch.latents[0].numpy(), expected)


def test_global_batches_do_not_depend_on_the_number_of_ranks(index):
    one, state = global_batches(index, 100)
    assert one == global_batches(index, 100)[0]
    for dp_size in (2, 4):
        assert global_batches(index, 100, dp_size) == (one, state)


def test_seed_purpose_and_epoch_change_the_order(index):
    one = flat(global_batches(index, 60)[0])
    assert one != flat(global_batches(index, 60, seed=4)[0])
    assert one != flat(global_batches(index, 60, purpose="calibration")[0])
    reader = Stream(index, **SETTINGS).readers[0]
    assert [s.name for s in reader.epoch_shards(0)] != [s.name for s in reader.epoch_shards(1)]


def test_blocks_are_shuffled_differently_in_every_block_reader_and_epoch(index):
    stream, orders = Stream(index, **SETTINGS), []
    for reader in stream.readers.values():
        for epoch in (0, 1):
            reader.seek(epoch, 0)
            emitted = [reader.take()[2] for _ in range(reader.length)]
            unshuffled = [label for shard in reader.epoch_shards(epoch) for label in labels_of(index, shard)]
            for start in range(0, reader.length, BUFFER):
                block, source = emitted[start : start + BUFFER], unshuffled[start : start + BUFFER]
                assert sorted(block) == sorted(source)
                if len(block) == BUFFER:
                    orders.append(tuple(source.index(label) for label in block))
    assert len(orders) == len(set(orders)) > 16 and tuple(range(BUFFER)) not in orders


def labels_of(index, shard):
    first = SHARD_SIZE * int(shard.name[6:12])
    return range(first, first + shard.count)


def test_every_example_comes_once_in_each_epoch(index):
    stream = Stream(index, **SETTINGS)
    for epoch in range(3):
        seen = Counter()
        for reader in stream.readers.values():
            reader.seek(epoch, 0)
            seen.update(reader.take()[2] for _ in range(reader.length))
        assert seen == Counter(range(COUNT))


def test_a_reader_goes_on_with_its_next_epoch_without_a_gap(index):
    reader = Stream(index, **SETTINGS).readers[0]
    length = reader.length
    both = [reader.take()[2] for _ in range(length + 5)]
    assert (reader.epoch, reader.emitted) == (1, 5) and len(set(both[:length])) == length
    reader.seek(1, 0)
    assert both[length:] == [reader.take()[2] for _ in range(5)]


@pytest.mark.parametrize("steps", [0, 1, 7, 10, 30, 31, 32, 33, 70])  # 10 = a block border, 31 = about an epoch
def test_resume_is_exact_even_on_another_number_of_ranks(index, steps):
    whole, end = global_batches(index, steps + 25)
    for before, after in ((1, 1), (4, 2), (2, 4)):
        head, state = global_batches(index, steps, before)
        tail, last = global_batches(index, 25, after, state=state)
        assert head + tail == whole and last == end


def test_resume_refuses_another_stream_or_a_part_of_the_state(index, tmp_path):
    stream = Stream(index, **SETTINGS)
    other = write(tmp_path / "other", count=240)
    with pytest.raises(ValueError, match=r"num_readers was 2, is 4.*shuffle_buffer was 10, is 20"):
        stream.load_state(Stream(index, **{**SETTINGS, "num_readers": 2, "shuffle_buffer": 10}).state())
    with pytest.raises(ValueError, match="shards was"):
        stream.load_state(Stream(other, **SETTINGS).state())
    half = Stream(index, **SETTINGS, dp_rank=0, dp_size=2)
    with pytest.raises(ValueError, match=r"lacks readers \[1, 3\]"):
        stream.load_state(half.state())
    ahead = Stream(index, **SETTINGS, dp_rank=1, dp_size=2)
    ahead.next_batch()
    with pytest.raises(ValueError, match="not of the same step"):
        merge_states([half.state(), ahead.state()])


def test_settings_that_cannot_work_are_refused_with_a_remedy(index, tmp_path):
    few = write(tmp_path / "few", count=40)  # 3 shards
    with pytest.raises(ValueError, match=r"num_readers` \(4\) must be at most the number of shards.*\(3\).*shard_size"):
        Stream(few, **SETTINGS)
    with pytest.raises(ValueError, match=r"multiple of the data-parallel size \(3\)"):
        Stream(index, **SETTINGS, dp_size=3)
    with pytest.raises(ValueError, match=r"must divide `train.global_batch_size` \(10\)"):
        Stream(index, **{**SETTINGS, "global_batch_size": 10})
    with pytest.raises(ValueError, match=r"shuffle_buffer` must be above 0"):
        Stream(index, **{**SETTINGS, "shuffle_buffer": 0})


def test_read_all_and_first_examples(index):
    latents, labels = read_all(index)
    assert latents.shape == (COUNT, 2, 4, 4) and labels.tolist() == list(range(COUNT))
    batch = first_examples(index, 30, seed=3, purpose="train", num_readers=READERS, shuffle_buffer=BUFFER)
    assert batch.labels.tolist() == flat(global_batches(index, 4)[0])[:30] and batch.slots == tuple(range(30))


# ---------------------------------------------------------------- files


def test_shards_have_the_same_bytes_every_time_and_webdataset_reads_them(index, tmp_path):
    again = write(tmp_path / "again")
    for name in ["index.json"] + [shard.name for shard in index.shards]:
        assert (index.folder / name).read_bytes() == (again.folder / name).read_bytes()
    assert sorted(p.name for p in again.folder.iterdir()) == ["index.json"] + [f"shard-{i:06d}.tar" for i in range(17)]
    samples = list(webdataset.WebDataset(str(again.folder / "shard-000003.tar"), shardshuffle=False))
    assert decode_array(samples[5]["npy"], (2, 4, 4))[0, 0, 0] == 50
    assert decode_label(samples[5]["cls"], COUNT) == 50 and decode_meta(samples[5]["json"]) == {"number": 50}


def test_index_says_what_is_there(index):
    assert index.total == COUNT and index.shape == (2, 4, 4) and index.label_histogram == (1,) * COUNT
    assert [shard.count for shard in index.shards] == [15] * 16 + [10]
    assert check_shards(index, checksums=True) == []


def test_a_finished_folder_is_kept_and_another_data_set_refused(index, tmp_path):
    write(tmp_path / "d")
    inode = (tmp_path / "d" / "shard-000000.tar").stat().st_ino

    def must_not_be_read():
        raise AssertionError("examples were read")
        yield

    description = {"source": "numbers", "count": COUNT}
    write_shards(must_not_be_read(), tmp_path / "d", SHARD_SIZE, description, num_classes=COUNT)
    assert (tmp_path / "d" / "shard-000000.tar").stat().st_ino == inode
    for changed in ({"shard_size": 17}, {"description": {"source": "else"}}, {"num_classes": COUNT + 1}):
        call = {"shard_size": SHARD_SIZE, "description": description, "num_classes": COUNT} | changed
        with pytest.raises(ShardError, match=r"already holds other shards.*delete that folder"):
            write_shards(numbered_examples(), tmp_path / "d", **call)
    assert check_shards(load_index(tmp_path / "d"), checksums=True) == []


def test_an_interrupted_write_leaves_no_index_and_can_be_repeated(tmp_path):
    def interrupted():
        yield from list(numbered_examples())[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path / "d", SHARD_SIZE, {}, num_classes=COUNT)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(ShardError, match=r"index.json does not exist"):
        load_index(tmp_path / "d")
    with pytest.raises(ShardError, match=r"shard-000000.tar exists with other content"):
        write_shards(list(numbered_examples())[1:], tmp_path / "d", SHARD_SIZE, {}, num_classes=COUNT)
    write_shards(numbered_examples(), tmp_path / "d", SHARD_SIZE, {}, num_classes=COUNT)
    assert check_shards(load_index(tmp_path / "d"), checksums=True) == []


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (("a.b", np.zeros((1, 2, 2), np.float32), 0, {}), "key 'a.b'"),
        (("n00000", np.zeros((1, 2, 2), np.float32), 0, {}), "n00000 comes twice"),
        (("b", np.zeros((1, 2, 3), np.float32), 0, {}), r"b: shape \(1, 2, 3\) differs"),
        (("c", np.zeros((1, 2, 2), np.float64), 0, {}), "c: latents must be float32"),
        (("d", np.full((1, 2, 2), np.nan, np.float32), 0, {}), "d: latents hold nan"),
        (("e", np.zeros((1, 2, 2), np.float32), 3, {}), r"e: the label must lie in \[0, 3\), got 3"),
    ],
)
def test_examples_that_cannot_be_stored_are_refused_by_name(tmp_path, example, message):
    good = ("n00000", np.zeros((1, 2, 2), np.float32), 0, {})
    with pytest.raises(ValueError, match=message):
        write_shards([good, example], tmp_path, 4, {}, num_classes=3)
    assert not any(tmp_path.iterdir())


def test_all_damaged_shards_are_reported_and_the_same_command_repairs(tmp_path):
    index = write(tmp_path / "d")
    (tmp_path / "d" / "shard-000002.tar").unlink()
    overwrite(tmp_path / "d" / "shard-000007.tar", 30_000, b"")  # cut there
    flip(tmp_path / "d" / "shard-000011.tar", 5_000)
    problems = check_shards(index, checksums=False)
    assert len(problems) == 2 and "shard-000002.tar is missing" in problems[0]
    assert "shard-000007.tar is truncated" in problems[1] and "30000 bytes" in problems[1]
    problems = check_shards(index, checksums=True)
    assert len(problems) == 3 and "shard-000011.tar is damaged: its SHA-256" in problems[2]
    assert all("repeat the `entprune-ds shards` command" in problem for problem in problems)
    with pytest.raises(ShardError) as caught:
        Stream(index, **SETTINGS)
    assert str(caught.value).splitlines() == check_shards(index, checksums=False)
    write(tmp_path / "d")
    flip(tmp_path / "d" / "shard-000011.tar", 5_000)
    write(tmp_path / "d")
    assert check_shards(index, checksums=True) == []


def overwrite(path, position, data):
    """Put bytes into a file; no bytes cut it there."""
    content = path.read_bytes()
    path.write_bytes(content[:position] + data + content[position + len(data) :] if data else content[:position])


def flip(path, position):
    overwrite(path, position, bytes([path.read_bytes()[position] ^ 255]))


def replace_member(path, name, data):
    """Other bytes of the same length (in blocks) for one member; the size of the tar stays."""
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as new:
        for info in old:
            content = old.extractfile(info).read()
            if info.name == name:
                content, info.size = data, len(data)
            new.addfile(info, io.BytesIO(content))
    assert len(out.getvalue()) == path.stat().st_size
    path.write_bytes(out.getvalue())


def drain(index, **changes):
    """Read one epoch and more."""
    stream = Stream(index, **{**SETTINGS, **changes})
    for _ in range(40):
        stream.next_batch()


def test_reading_names_the_shard_and_the_member_that_is_wrong(tmp_path):
    index = write(tmp_path / "d")
    path = tmp_path / "d" / "shard-000001.tar"  # examples 15 to 29
    sound = path.read_bytes()

    def error(**changes):
        with pytest.raises(ShardError) as caught:
            drain(index, **changes)
        path.write_bytes(sound)
        assert str(path) in str(caught.value) and "repeat the `entprune-ds shards`" in str(caught.value)
        return str(caught.value)

    replace_member(path, "n00020.npy", encode_array(np.zeros((2, 2, 8), np.float32)))
    assert "member n00020.npy holds float32 (2, 2, 8), the index says float32 (2, 4, 4)" in error()
    replace_member(path, "n00021.npy", encode_array(np.full((2, 4, 4), np.inf, np.float32)))
    assert "member n00021.npy holds nan or inf" in error()
    replace_member(path, "n00021.npy", encode_array(np.zeros((2, 4, 4), np.float32))[:-4])
    assert "member n00021.npy has 252 bytes, needs 256" in error()
    replace_member(path, "n00022.npy", b"\x80\x04cos\nsystem\n" + b" " * 200)
    assert "member n00022.npy" in error()
    for label in (b"250", b"-1", b"1.5", b""):
        replace_member(path, "n00022.cls", label)
        assert f"member n00022.cls holds {label!r}" in error()
    block = sound.index(b"n00023.npy")
    overwrite(path, block, b"n00023.xyz")  # the checksum of the header no longer fits: tarfile ends there in silence
    assert "n00023.npy is missing" in error()
    overwrite(path, sound.index(b"n00024.cls"), bytes(512))
    assert "gives 9 examples only, the index says 15" in error()
    flip(path, sound.index(b"n00025.npy") + 512 + 200)  # within the numbers: only the checksum can know
    assert "its SHA-256 is not the one in the index" in error(verify=True)
    drain(index, verify=True)


def test_a_shard_that_breaks_during_a_run_is_an_error_and_the_cursor_stays(tmp_path):
    index = write(tmp_path / "d")
    whole, _ = global_batches(index, 40)
    stream = Stream(index, **SETTINGS)
    head = [stream.next_batch().labels.tolist() for _ in range(3)]
    victim = stream.readers[2].shards[2]
    hidden = tmp_path / "hidden"
    (tmp_path / "d" / victim.name).rename(hidden)
    with pytest.raises(ShardError, match=f"{victim.name} is missing"):
        while True:
            head.append(stream.next_batch().labels.tolist())
    hidden.rename(tmp_path / "d" / victim.name)
    assert head + [stream.next_batch().labels.tolist() for _ in range(40 - len(head))] == whole


def test_a_tar_that_ends_within_a_member_names_it(tmp_path):
    folder = tmp_path / "d"
    write(folder)
    path = folder / "shard-000001.tar"
    overwrite(path, path.read_bytes().index(b"n00023.npy") + 600, b"")
    values = json.loads((folder / "index.json").read_text())  # an index made for the cut file: sizes agree
    values["shards"][1]["bytes"] = path.stat().st_size
    (folder / "index.json").write_text(json.dumps(values))
    with pytest.raises(ShardError, match=r"shard-000001.tar: cannot read n00023.npy"):
        drain(load_index(folder))


def test_a_tar_with_more_examples_than_the_index_says_gives_none_of_them(index):
    shard = dataclasses.replace(index.shards[2], count=14)
    entries = []
    with pytest.raises(ShardError, match=r"shard-000002.tar gives more than 14 examples"):
        entries.extend(entry for entry in read_shard(index, shard))
    assert len(entries) == 14


# ---------------------------------------------------------------- naming shards


def test_a_folder_or_a_brace_pattern_names_shards(index):
    folder = index.folder
    assert resolve(folder) == (folder, None) and load_index(f"{folder}/shard-{{000000..000016}}.tar") == index
    some = load_index(f"{folder}/shard-{{000002..000004}}.tar")
    assert [shard.name[6:12] for shard in some.shards] == ["000002", "000003", "000004"]
    assert some.total == 45 and some.label_histogram is None
    assert sorted(read_all(some)[1].tolist()) == list(range(30, 75))
    with pytest.raises(ShardError, match=r"does not list shard-000017.tar, shard-000018.tar. Correct the pattern"):
        load_index(f"{folder}/shard-{{000000..000018}}.tar")


@pytest.mark.parametrize("spec", ["pipe:cat x.tar", "file:///in-{00..10}.tar", "s3://bucket/x.tar", "a.tar::b.tar", ""])
def test_only_local_files_and_web_addresses_are_read(spec):
    with pytest.raises(ShardError, match=r"must be a local folder or tar pattern.*Copy them"):
        load_index(spec)


def test_a_wrong_path_says_what_to_do(index, tmp_path):
    with pytest.raises(ShardError, match=r"neither a folder of shards nor a pattern"):
        load_index(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"neither a folder of shards nor a pattern"):
        load_index("in-{0..3.tar}{")
    with pytest.raises(ShardError, match=f"Did you mean {index.folder}"):
        load_index(index.folder.parent)
    (tmp_path / "index.json").write_text('{"format": "something"}')
    with pytest.raises(ShardError, match=r"index.json cannot be used.*Delete the folder"):
        load_index(tmp_path)


# ---------------------------------------------------------------- digits


def test_digits_are_complete_scaled_and_stratified(tmp_path):
    indices = builtin.write_digits(tmp_path, 128, seed=0)
    assert {split: index["total"] for split, index in indices.items()} == {"train": 1500, "val": 297}
    train, val = read_all(tmp_path / "train"), read_all(tmp_path / "val")
    latents = torch.cat([train[0], val[0]])
    assert latents.shape == (1797, 1, 8, 8) and latents.min() == -1 and latents.max() == 1
    images, labels = builtin.load_digits()
    assert torch.equal(latents.double().sum(0), torch.from_numpy(images).double().sum(0))  # the same images
    counts, val_counts = np.bincount(labels), np.array(indices["val"]["label_histogram"])
    assert np.abs(val_counts - counts * 297 / 1797).max() < 1
    assert np.array_equal(val_counts + indices["train"]["label_histogram"], counts)
    first, second = builtin.split_digits(labels, 0), builtin.split_digits(labels, 1)
    assert first == builtin.split_digits(labels, 0) and first != second
    assert sorted(first["train"] + first["val"]) == list(range(1797))


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'entprune_ds\[demo\]'"):
        builtin.load_digits()


def test_encoding_survives_a_round_trip():
    latents = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    parts = encode_example("k", latents.transpose(2, 0, 1), 7, {"a": [1]})
    assert np.array_equal(decode_array(parts["npy"], (4, 2, 3)), latents.transpose(2, 0, 1))
    stream = io.BytesIO()
    np.save(stream, np.asfortranarray(latents))
    assert np.array_equal(decode_array(stream.getvalue(), (2, 3, 4)), latents)
    assert decode_label(parts["cls"], 8) == 7 and decode_meta(parts["json"]) == {"a": [1]}


# ---------------------------------------------------------------- command


def test_command_writes_says_so_and_repeats_without_change(tmp_path, capsys):
    out = tmp_path / "digits"
    assert shards_command.main([f"out={out}", "data.shard_size=100"]) == 0
    printed = capsys.readouterr().out
    assert f"train: 1500 examples in 15 shards, {out}/train" in printed and "val: 297 examples in 3" in printed
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert shards_command.main(["source=digits", f"data.out={out}", "data.shard_size=100"]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before
    capsys.readouterr()
    assert shards_command.main([f"out={out}", "data.shard_size=50"]) == 2
    assert "already holds other shards" in capsys.readouterr().err


def test_command_lists_all_problems_and_writes_nothing(tmp_path, capsys):
    assert shards_command.main(["data.shard_size=0", "source=cats"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "`data.source` must be one of digits, folder, csv, webdataset, got cats" in lines[0]
    assert "`data.out` is missing" in lines[1] and "`data.shard_size` must be above 0" in lines[2]
    assert shards_command.main(["out=x", "data.shardsize=4", "oops"]) == 2
    assert "Did you mean `data.shard_size`" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert shards_command.main([f"out={tmp_path}/file"]) == 2
    assert f"cannot read or write {tmp_path}/file" in capsys.readouterr().err
    assert shards_command.main([f"out={tmp_path}/new", "--dry-run"]) == 0 and not (tmp_path / "new").exists()
    assert shards_command.main(["--help"]) == 0 and "preset=digits out=data_digits" in capsys.readouterr().out


def test_command_reports_a_full_disk_and_leaves_no_index(tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert shards_command.main([f"out={tmp_path}/d"]) == 2
    assert "No space left on device. Make room" in capsys.readouterr().err
    assert not any((tmp_path / "d" / "train").iterdir())
