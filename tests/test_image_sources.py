"""Where images come from: labels, order, and nothing outside the root, whatever a CSV file or a tar says."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from entprune_ds.data.image_csv import csv_source
from entprune_ds.data.image_sources import Item, SourceError, folder_source, read_bytes, split_folders
from entprune_ds.data.image_tars import scan_tar, tar_paths, tar_source


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def pairs(source):
    return [(item.name, item.label) for item in source.items]


# ---------------------------------------------------------------- folder


def test_folder_labels_are_the_sorted_class_names_and_other_files_are_listed(tmp_path):
    for name in ("dog/b.PNG", "dog/deep/a.jpeg", "cat/1.jpg", "Zebra/x.webp", "cat/notes.txt", "cat/.1.jpg", "README"):
        touch(tmp_path / name)
    touch(tmp_path / ".cache" / "x.jpg")
    source = folder_source(tmp_path)
    assert source.classes == ("Zebra", "cat", "dog") and source.num_classes == 3
    assert pairs(source) == [("Zebra/x.webp", 0), ("cat/1.jpg", 1), ("dog/b.PNG", 2), ("dog/deep/a.jpeg", 2)]
    assert {name for name, _ in source.ignored} == {"README", ".cache", "cat/notes.txt", "cat/.1.jpg"}


def test_folder_without_classes_or_with_an_empty_or_unknown_one_is_refused(tmp_path):
    touch(tmp_path / "a.jpg")
    with pytest.raises(SourceError, match="holds no sub-folders"):
        folder_source(tmp_path)
    touch(tmp_path / "cat" / "a.txt")
    with pytest.raises(SourceError, match="cat holds no images"):
        folder_source(tmp_path)
    touch(tmp_path / "cat" / "a.jpg")
    with pytest.raises(SourceError, match="the training images lack: cat"):
        folder_source(tmp_path, classes=("dog",))
    assert pairs(folder_source(tmp_path, classes=("ape", "cat"))) == [("cat/a.jpg", 1)]


def test_train_and_val_are_splits_only_when_there_is_nothing_else(tmp_path):
    touch(tmp_path / "train" / "a" / "x.jpg")
    assert set(split_folders(tmp_path)) == {"train"} and split_folders(tmp_path)["train"] == tmp_path
    touch(tmp_path / "val" / "a" / "x.jpg")
    assert split_folders(tmp_path) == {"train": tmp_path / "train", "val": tmp_path / "val"}
    touch(tmp_path / "bus" / "x.jpg")
    assert split_folders(tmp_path) == {"train": tmp_path}


def test_the_digest_knows_names_and_labels(tmp_path):
    for name in ("a/1.jpg", "b/2.jpg"):
        touch(tmp_path / name)
    before = folder_source(tmp_path).digest
    assert before == folder_source(tmp_path).digest
    touch(tmp_path / "b" / "3.jpg")
    assert before != folder_source(tmp_path).digest


def test_a_pipe_or_a_huge_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="not an ordinary file"):
        read_bytes(tmp_path, Item("pipe.jpg", 0), 100)
    touch(tmp_path / "big.jpg", b"x" * 101)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_bytes(tmp_path, Item("big.jpg", 0), 100)
    assert read_bytes(tmp_path, Item("big.jpg", 0), 101) == b"x" * 101


# ---------------------------------------------------------------- CSV


def csv_of(tmp_path, text):
    return touch(tmp_path / "data" / "labels.csv", text.encode())


def test_csv_takes_numbers_or_names_as_labels_and_ignores_other_columns(tmp_path):
    source = csv_source(csv_of(tmp_path, "\ufefflabel,path,note\n3,a.jpg,x\n0,in/b.jpg,\n"))
    assert pairs(source) == [("a.jpg", 3), ("in/b.jpg", 0)] and source.num_classes == 4 and source.classes is None
    assert csv_source(csv_of(tmp_path, "path,label\na.jpg,3\n"), num_classes=10).num_classes == 10
    source = csv_source(csv_of(tmp_path, 'path,label\na.jpg,dog\n"b,c.jpg",cat\n'))
    assert pairs(source) == [("a.jpg", 1), ("b,c.jpg", 0)] and source.classes == ("cat", "dog")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.jpg", "in/../x.jpg", "C:\\x.jpg", "..\\x.jpg", "~/x.jpg", ""])
def test_csv_paths_may_not_leave_the_folder_of_the_file(tmp_path, path):
    reason = "must be relative and stay below" if path else "is missing"
    with pytest.raises(SourceError, match=rf"labels.csv, line 3: the path.* {reason}"):
        csv_source(csv_of(tmp_path, f"path,label\na.jpg,0\n{path},0\n"))


def test_csv_paths_may_not_leave_through_links(tmp_path):
    touch(tmp_path / "secret" / "x.jpg")
    touch(tmp_path / "data" / "real.jpg")
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "file.jpg").symlink_to(tmp_path / "secret" / "x.jpg")
    (tmp_path / "data" / "inside.jpg").symlink_to(tmp_path / "data" / "real.jpg")
    with pytest.raises(SourceError) as caught:
        csv_source(csv_of(tmp_path, "path,label\nfolder/x.jpg,0\nfile.jpg,0\ninside.jpg,0\n"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and "line 2" in lines[0] and "line 3" in lines[1] and "through a link" in lines[1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a.jpg,0\n", "line 1: it must name the columns path and label, got 'a.jpg,0'. Add `path,label`"),
        ("path;label\na.jpg;0\n", "line 1: the columns are separated by ';', not by commas"),
        ("path\tlabel\na.jpg\t0\n", "line 1: the columns are separated by '\\t', not by commas"),
        ("path,label,path\na,0,b\n", "line 1: the column path is named twice"),
        ("path,label\n", "lists no images"),
        ("", "lists no images"),
        ("path,label\na.jpg,0\n\nb.jpg,0,1\n", "line 4: it has 3 cells, the header names 2. Put a text with a comma"),
        ("path,label\na.jpg\n", "line 2: the label is missing"),
        ("path,label\na.jpg,-1\n", "line 2: the label must be a whole number from 0 to 99999, got '-1'"),
        ("path,label\na.jpg,1.5\n", "got '1.5'"),
        ("path,label\na.jpg,1\nb.jpg,cat\n", "line 3: the label must be a whole number"),
        ("path,label\na.jpg,99999999999\n", "line 2: the label must be"),
        ('path,label\nb.jpg,1\n"a.jpg,1\nc.jpg,1\n', "line 3: is not CSV, or a quote does not close (unexpected end"),
        ('path,label\n"a.jpg,1\nb.jpg"",1\n"c.jpg",1\n', "line 2: is not CSV, or a quote does not close"),
        ('path,label,note\n\na.jpg,1,"x\nb.jpg,1,y"\nc.jpg,1,z\n', "line 3: a quote opens that closes in line 4 only"),
        ('path,label\n"a.jpg"x,1\n', "line 2: is not CSV"),
    ],
)
def test_csv_problems_name_the_line(tmp_path, text, problem):
    with pytest.raises(SourceError) as caught:
        csv_source(csv_of(tmp_path, text))
    assert problem in str(caught.value) and "labels.csv" in str(caught.value)


def test_csv_labels_out_of_range_are_listed_ten_at_most(tmp_path):
    rows = "".join(f"{i}.jpg,{i}\n" for i in range(30))
    with pytest.raises(SourceError) as caught:
        csv_source(csv_of(tmp_path, f"path,label\n{rows}"), num_classes=12)
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and "line 14: the label must be a whole number from 0 to 11, got '12'" in lines[0]
    assert lines[-1] == "... and 8 more lines."
    (tmp_path / "data" / "labels.csv").write_bytes(b"path,label\na.jpg,1\n\xff\xfe.jpg,1\n")
    with pytest.raises(SourceError, match="line 3: is not UTF-8"):
        csv_source(tmp_path / "data" / "labels.csv")


# ---------------------------------------------------------------- tars


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def source_of(*paths, num_classes=None):
    return tar_source(list(paths), num_classes, lambda function, tars: [function(tar) for tar in reversed(tars)])


def test_tars_are_read_in_order_and_in_place(tmp_path):
    one = tar_of(tmp_path / "b.tar", [("x/1.jpg", b"one"), ("x/1.cls", b"7"), ("2.PNG", b"two"), ("2.txt", b"?"),
                                      ("2.json", json.dumps({"label": 3}).encode())])  # fmt: skip
    two = tar_of(tmp_path / "a.tar", [("1.cls", b"0\n"), ("1.jpg", b"three")])
    source = source_of(one, two)
    assert pairs(source) == [("b.tar/x/1.jpg", 7), ("b.tar/2.png", 3), ("a.tar/1.jpg", 0)] and source.num_classes == 8
    assert [read_bytes(source.root, item, 99) for item in source.items] == [b"one", b"two", b"three"]
    assert tar_paths(str(tmp_path)) == [two, one] and tar_paths(f"{tmp_path}/{{b,a}}.tar") == [one, two]


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/cron.d/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg"])
def test_a_tar_whose_members_leave_their_root_is_refused(tmp_path, name):
    path = tar_of(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.cls", b"1"), (name, b"x")])
    with pytest.raises(SourceError, match=r"a.tar: the member name .* leaves the tar's root"):
        source_of(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["a.tar"]


def test_links_missing_parts_and_labels_out_of_range_are_listed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in [("l.cls", b"1"), ("n.jpg", b"x"), ("w.jpg", b"x"), ("w.cls", b"-1"), ("j.jpg", b"x"),
                           ("j.json", b'{"label": "1"}'), ("two.jpg", b"x"), ("two.png", b"x"), ("two.cls", b"1"),
                           ("far.jpg", b"x"), ("far.cls", b"9"), ("ok.jpg", b"x"), ("ok.cls", b"4")]:  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = source_of(path, num_classes=5)
    assert pairs(source) == [("a.tar/ok.jpg", 4)]
    reasons = dict(source.unusable)
    assert set(reasons) == {f"a.tar/{key}" for key in ("l.jpg", "l", "n", "w", "j", "two", "far.jpg")}
    assert reasons["a.tar/far.jpg"] == "its label 9 is not below 5" and "link" in reasons["a.tar/l.jpg"]


def test_a_key_that_occurs_again_is_listed_and_the_first_one_is_used(tmp_path):
    one = tar_of(tmp_path / "a.tar", [("1.jpg", b"first"), ("1.cls", b"1"), ("1.txt", b""), ("2.jpg", b"x"),
                                      ("2.cls", b"2"), ("2.cls", b"3"), ("1.jpg", b"second"), ("1.cls", b"4"),
                                      ("1.JPG", b"third"), ("1.txt", b""), ("3.cls", b"5"),
                                      ("3.jpg", b"y")])  # fmt: skip
    two = tar_of(tmp_path / "b.tar", [("1.jpg", b"other"), ("1.cls", b"6")])
    source = source_of(one, two)
    assert pairs(source) == [("a.tar/1.jpg", 1), ("a.tar/2.jpg", 2), ("a.tar/3.jpg", 5), ("b.tar/1.jpg", 6)]
    assert [read_bytes(source.root, item, 99) for item in source.items] == [b"first", b"x", b"y", b"other"]
    assert source.unusable == (
        ("a.tar/2", "occurs again in the tar (cls); the first occurrence is used"),
        ("a.tar/1", "occurs again in the tar (cls, jpg, txt); the first occurrence is used"),
        ("a.tar/1", "occurs again in the tar (jpg); the first occurrence is used"),
    )
    with pytest.raises(SourceError, match=r"a.tar is named twice by"):
        tar_paths(f"{tmp_path}/{{a,b,a}}.tar")


def test_damaged_tars_are_all_named(tmp_path):
    members = [(f"{i}.{suffix}", b"7" * 700) for i in range(30) for suffix in ("jpg", "cls")]
    whole = tar_of(tmp_path / "whole.tar", members).read_bytes()
    assert scan_tar(tmp_path / "whole.tar").problem == ""
    short = touch(tmp_path / "short.tar", whole[: len(whole) // 2])
    cut = touch(tmp_path / "cut.tar", whole[: 20 * 1536])  # between two members
    header = touch(tmp_path / "header.tar", whole[: 20 * 1536] + b"\xff" * 512 + whole[20 * 1536 + 512 :])
    zeros = touch(tmp_path / "zeros.tar", whole[: 20 * 1536] + bytes(1024) + whole[20 * 1536 + 1024 :])
    text = touch(tmp_path / "text.tar", b"hello" * 1000)
    empty = touch(tmp_path / "empty.tar", b"")
    damaged = [short, cut, header, zeros, text, empty]
    with pytest.raises(SourceError) as caught:
        source_of(tmp_path / "whole.tar", *damaged)
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == [str(path) for path in damaged]
    for src in (f"{tmp_path}/none-{{0..2}}.tar", f"{tmp_path}/a.tar.gz", f"{tmp_path}/nothing"):
        with pytest.raises(SourceError):
            tar_paths(src)
