"""`entprune-ds shards` on real image files: nothing lost, nothing silent, the same bytes however it is run."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from entprune_ds.cli.shards import main
from entprune_ds.data.images import load_image
from entprune_ds.data.index import check_shards, load_index
from entprune_ds.data.reader import read_shard
from entprune_ds.data.spawn import Workers
from tests.ranks import ROOT
from tests.test_image_sources import tar_of

SIZE, COUNT = 8, 60
SETTINGS = [f"data.image_size={SIZE}", "data.shard_size=7", "run.seed=3", "data.num_workers=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """60 images in the classes a, b, c; JPEG and PNG, of many sizes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(COUNT):
        path = root / "abc"[i % 3] / f"{i:03d}.{'jpg' if i % 2 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        height, width = generator.integers(SIZE, 60, 2)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return root


def run(capsys, *words) -> tuple[int, str, str]:
    status = main([*SETTINGS, *words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def examples(folder: Path) -> list[tuple[str, np.ndarray, int]]:
    index = load_index(folder)
    assert check_shards(index, checksums=True) == [] and index.kind == "pixels"
    return [entry for shard in index.shards for entry in read_shard(index, shard)]


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.open(newline="")))[1:]


def test_every_image_is_stored_once_with_its_label(images, tmp_path, capsys):
    assert run(capsys, "source=folder", f"src={images}", f"out={tmp_path}", "data.val_fraction=0.2")[0] == 0
    names = sorted(p.relative_to(images).as_posix() for p in images.rglob("*.*g"))
    found = {}
    for split, count in (("train", 48), ("val", 12)):
        entries = examples(tmp_path / split)
        assert len(entries) == count
        assert json.loads((tmp_path / split / "classes.json").read_text()) == ["a", "b", "c"]
        for key, pixels, label in entries:
            name = names[int(key)]
            assert label == "abc".index(name[0])
            assert np.array_equal(pixels, load_image((images / name).read_bytes(), name, SIZE, 10**8))
            found[name] = split
    assert sorted(found) == names
    index = load_index(tmp_path / "train")
    assert [shard.count for shard in index.shards] == [7] * 6 + [6] and index.shape == (3, SIZE, SIZE)
    first = {label for _, _, label in list(read_shard(index, index.shards[0]))}
    assert len(first) == 3  # a shard holds all classes, so that a reader's buffer mixes them


def test_the_bytes_do_not_depend_on_the_workers_and_a_second_run_changes_nothing(images, tmp_path, capsys):
    for name, workers in (("one", 0), ("two", 2)):
        words = ["source=folder", f"src={images}", f"out={tmp_path / name}", f"data.num_workers={workers}"]
        assert run(capsys, *words)[0] == 0
    assert content(tmp_path / "one") == content(tmp_path / "two")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*.tar")}
    assert run(capsys, "source=folder", f"src={images}", f"out={tmp_path / 'one'}")[0] == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "one").rglob("*.tar")} == before
    whole = content(tmp_path / "two")
    changed = bytearray(whole["train/shard-000003.tar"])
    changed[1000] ^= 1  # of the same size
    (tmp_path / "two" / "train" / "shard-000003.tar").write_bytes(changed)
    (tmp_path / "two" / "train" / "shard-000004.tar").unlink()
    (tmp_path / "two" / "train" / "parts" / "000005.json").write_text("{")
    (tmp_path / "two" / "train" / "parts" / "000006.json").unlink()
    status, _, error = run(capsys, "source=folder", f"src={images}", f"out={tmp_path / 'two'}")
    assert status == 0 and content(tmp_path / "two") == whole
    told = [line for line in error.splitlines() if "written again" in line]
    assert len(told) == 1 and told[0].endswith(
        f"written again in {tmp_path / 'two' / 'train'}: shard-000003.tar (was damaged), shard-000004.tar (was missing)"
        ", shard-000005.tar (parts/000005.json is damaged), shard-000006.tar (parts/000006.json is missing)"
    )
    error = run(capsys, "source=folder", f"src={images}", f"out={tmp_path / 'two'}")[2]
    assert "written again" not in error


def test_digits_that_are_written_again_are_told(tmp_path, capsys):
    assert main([f"out={tmp_path}"]) == 0 and "written again" not in capsys.readouterr().err
    (tmp_path / "val" / "shard-000001.tar").unlink()
    assert main([f"out={tmp_path}"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "written again" in line]
    assert len(told) == 1 and told[0].endswith(f"written again: {tmp_path}/val/shard-000001.tar is missing.")


def test_another_data_set_or_setting_is_refused_and_leaves_the_folder_alone(images, tmp_path, capsys):
    words = ["source=folder", f"src={images}", f"out={tmp_path / 'out'}"]
    assert run(capsys, *words)[0] == 0
    before = content(tmp_path)
    for change, differs in [
        ("data.max_pixels=5000", "data.max_pixels was 100000000, is 5000"),
        ("data.num_classes=4", "data.num_classes was 3, is 4"),
        ("data.shard_size=9", "data.shard_size was 7, is 9"),
    ]:
        status, _, error = run(capsys, *words, change)
        assert status == 2 and error.endswith(
            f"{tmp_path / 'out' / 'train'} already holds other shards: {differs}. "
            "Give what it was written with, choose another `out`, or delete that folder first.\n"
        )
    status, _, error = run(capsys, *words, "data.val_fraction=0.1", "run.seed=4")
    assert status == 2 and "shards: run.seed was 3, is 4; data.val_fraction was 0.0, is 0.1. Give" in error
    assert content(tmp_path) == before
    assert main([f"out={tmp_path / 'digits'}"]) == 0
    assert main([f"out={tmp_path / 'digits'}", "run.seed=1"]) == 2
    assert "digits/train already holds other shards: run.seed was 0, is 1. Give" in capsys.readouterr().err
    status, _, error = run(capsys, "source=folder", f"src={images}", f"out={tmp_path / 'digits'}")
    assert status == 2 and "already holds other shards, without plan.json" in error


def test_unusable_images_are_skipped_listed_and_counted_until_there_are_too_many(images, tmp_path, capsys):
    lines = [f"a/{i:03d}.{'jpg' if i % 2 else 'png'},0" for i in range(0, COUNT, 3)]
    (images / "empty.jpg").write_bytes(b"")
    Image.new("1", (20_000, 10_000)).save(images / "bomb.png")
    (images / "cut.jpg").write_bytes((images / "a" / "003.jpg").read_bytes()[:200])
    (images / "list.csv").write_text(
        "\n".join(["path,label", "gone.jpg,1", *lines, "empty.jpg,1", "bomb.png,1", "cut.jpg,0"])
    )
    words = ["source=csv", f"src={images / 'list.csv'}", f"out={tmp_path}"]
    status, out, error = run(capsys, *words, "data.max_unreadable=0.1")
    assert status == 1 and "4 of 24 examples had to be skipped, `data.max_unreadable` allows 0.1" in error
    assert not (tmp_path / "train" / "index.json").exists()
    status, out, _ = run(capsys, *words, "data.max_unreadable=0.2")
    assert status == 0 and "train: 4 images skipped, 0 other files ignored" in out
    listed = {name: reason for _, name, reason in rows(tmp_path / "train" / "skipped.csv")}
    assert listed["gone.jpg"] == "the file is missing" and "0 bytes" in listed["empty.jpg"]
    assert "100000000 pixels" in listed["bomb.png"] and "runcated" in listed["cut.jpg"] and len(listed) == 4
    values = json.loads((tmp_path / "train" / "index.json").read_text())
    assert values["skipped"] == 4 and values["total"] == 20 and values["label_histogram"] == [20, 0]
    assert len(examples(tmp_path / "train")) == 20

    Image.new("RGB", (9, 9)).save(images / "gone.jpg")  # what is repaired is taken in by the same command
    assert "(gone.jpg can be read now)" in run(capsys, *words, "data.max_unreadable=0.2")[2]
    assert len(examples(tmp_path / "train")) == 21 and len(rows(tmp_path / "train" / "skipped.csv")) == 3
    for name in ("empty.jpg", "bomb.png", "cut.jpg", "list.csv", "gone.jpg"):
        (images / name).unlink()


def test_a_folder_with_train_and_val_keeps_its_splits_and_labels(images, tmp_path, capsys):
    src = tmp_path / "src"
    for split, classes in (("train", "abc"), ("val", "bc")):
        for name in classes:
            (src / split).mkdir(parents=True, exist_ok=True)
            (src / split / name).symlink_to(images / name)
    (src / "train" / "notes.txt").write_text("")
    status, out, _ = run(capsys, "source=folder", f"src={src}", f"out={tmp_path / 'out'}")
    assert status == 0 and "train: 0 images skipped, 1 other files ignored" in out
    assert load_index(tmp_path / "out" / "val").label_histogram == (0, 20, 20)
    status, _, error = run(capsys, "source=folder", f"src={src}", f"out={tmp_path / 'o'}", "data.val_fraction=0.1")
    assert status == 2 and "has a folder val already" in error


def test_an_existing_webdataset_keeps_its_order(images, tmp_path, capsys):
    files = sorted(images.glob("a/*"))
    for number in range(2):
        members = []
        for path in files[number::2]:
            members += [
                (f"{path.stem}{path.suffix}", path.read_bytes()),
                (f"{path.stem}.cls", str(int(path.stem)).encode()),
            ]
        tar_of(tmp_path / "src" / f"in-{number}.tar", [*members, ("lost.cls", b"1")])
    words = [
        "source=webdataset",
        f"src={tmp_path}/src/in-{{0,1}}.tar",
        f"out={tmp_path / 'out'}",
        "data.num_classes=70",
    ]
    assert run(capsys, *words)[0] == 1
    status, out, _ = run(capsys, *words, "data.max_unreadable=0.1")
    assert status == 0 and "train: 2 images skipped" in out
    assert [label for _, _, label in examples(tmp_path / "out" / "train")] == [
        int(p.stem) for p in files[::2] + files[1::2]
    ]
    assert load_index(tmp_path / "out" / "train").num_classes == 70
    assert rows(tmp_path / "out" / "train" / "skipped.csv")[0] == ["skipped", "in-0.tar/lost", "has no image"]


def test_dry_run_and_wrong_settings_write_nothing(images, tmp_path, capsys):
    out = tmp_path / "out"
    status, text, _ = run(capsys, "source=folder", f"src={images}", f"out={out}", "--dry-run")
    assert status == 0 and "train: would write 60 images of 3 classes in 9 shards" in text
    for words, problem in [
        (["source=folder"], "`data.src` is missing"),
        (["source=folder", "src=/nowhere"], "there is no folder /nowhere"),
        (["source=csv", f"src={images}"], "there is no file"),
        (["source=webdataset", f"src={images}"], "names no tars of one folder"),
        ([f"src={images}"], "`data.source` is missing"),
        (["data.val_fraction=0.1"], "which has its own validation images"),
        (
            ["source=folder", f"src={images}", "data.val_fraction=1", "data.num_workers=-1"],
            "`data.val_fraction` must lie",
        ),
    ]:
        status, _, error = run(capsys, *words, f"out={out}")
        assert status == 2 and problem in error
    status, _, error = run(capsys, "source=folder", f"src={images}", f"out={images / 'a' / 'out'}")
    assert status == 2 and "`data.out` must lie outside `data.src`" in error
    assert not out.exists() and not (images / "a" / "out").exists()


def runs(process: str) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())  # empty once it has ended
    except OSError:
        return False


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.full), 2])
def test_killed_in_the_middle_it_goes_on_after_the_finished_shards(images, tmp_path, capsys, workers):
    words = ["source=folder", f"src={images}", *SETTINGS, "data.shard_size=1"]
    command = [sys.executable, "-m", "entprune_ds.cli.main", "shards", *words, f"out={tmp_path / 'cut'}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, f"data.num_workers={workers}"], env=env, stdout=subprocess.DEVNULL)
    parts = tmp_path / "cut" / "train" / "parts"
    while len(list(parts.glob("0*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(runs(child) for child in children):  # the workers end with their parent
        assert time.monotonic() < deadline, f"the workers {children} stay behind"
        time.sleep(0.02)
    finished = {p.stem: p.stat().st_mtime_ns for p in parts.glob("0*.json")}
    assert 5 <= len(finished) < COUNT and not (tmp_path / "cut" / "train" / "index.json").exists()
    (tmp_path / "cut" / "train" / ".shard-000059.tar.123.tmp").write_bytes(b"half")
    assert main([*words, f"out={tmp_path / 'cut'}"]) == 0 and main([*words, f"out={tmp_path / 'whole'}"]) == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert {p.stem: p.stat().st_mtime_ns for p in parts.glob("0*.json") if p.stem in finished} == finished


def test_a_killed_worker_is_an_error_with_a_remedy():
    with (
        pytest.raises(ValueError, match="A worker process was killed, perhaps for lack of memory"),
        Workers(1) as workers,
    ):
        list(workers.run(signal.raise_signal, [signal.SIGKILL]))
