"""Samples on many ranks: the same bytes whatever the ranks and the kills, and files in ADM's form."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from entprune_ds.cli.sample import main as sample
from entprune_ds.cli.sample import protocol_path
from entprune_ds.evaluation.npz import member_shape, open_member, save_npz, write_npz
from entprune_ds.evaluation.parts import Parts, begin
from entprune_ds.evaluation.sources import from_folder, from_npz, own_range
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.source import Source
from entprune_ds.interop.tensors import parameter_shapes
from entprune_ds.rng import generator_for
from tests.ranks import RankFailure, run_ranks
from tests.test_faults import finish, launch, rank_pids
from tests.tiny import MODEL

TINY = ["sample.num_samples=23", "sample.batch_size=2", "sample.num_steps=3", "sample.cfg_scale=2"]


def random_model(folder: Path, kept: tuple[int, ...] = (0, 2), seed: int = 0, **model: object) -> Path:
    """An export of a tiny model with random weights, so that labels and time matter."""
    config = replace(MODEL, kept_blocks=kept, **model)  # type: ignore[arg-type]
    shapes = parameter_shapes(config)

    def read(name: str) -> torch.Tensor:
        return 0.2 * torch.randn(shapes[name], generator=generator_for(seed, name))

    return write_export(folder, Source(config, read, {"weights": "ema", "step": 7}))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return random_model(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(scope="module")
def whole(model) -> Path:
    """23 samples by one process, never disturbed."""
    out = model.parent / "whole.npz"
    assert sample([f"weights={model}", f"out={out}", *TINY]) == 0
    return out


def adm_batches(path: Path, size: int) -> list[np.ndarray]:
    """arr_0 as ADM's evaluator reads it: from the zip, by the header, in pieces."""
    found = []
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy", "r") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert not fortran and dtype == np.uint8 and len(shape) == 4
        for start in range(0, shape[0], size):
            count = min(size, shape[0] - start)
            data = member.read(count * int(np.prod(shape[1:])))
            found.append(np.frombuffer(data, dtype).reshape(count, *shape[1:]))
    return found


def test_kills_ranks_and_batches_change_no_byte(model, whole, tmp_path, capsys):
    out, folder = tmp_path / "out.npz", tmp_path / "pictures"
    words = [f"weights={model}", f"out={out}", *TINY]
    with pytest.raises(RankFailure, match="exit -9"):
        run_ranks("tests.workers.sampling:killed", 2, words=words, parts=f"{out}.parts", after=2)
    left = len(list(Path(f"{out}.parts").glob("part_*.npy")))
    assert 2 <= left < 12 and not out.exists()
    with pytest.raises(RankFailure, match="exit -9"):  # by another number of ranks, and killed once more
        run_ranks("tests.workers.sampling:killed", 1, words=words, parts=f"{out}.parts", after=left + 2)

    assert sample([*words, "sample.seed=1", "sample.num_steps=4"]) == 2
    error = capsys.readouterr().err
    for text in ("`num_steps` is 4, but", "begun with 3", "`seed` is 1, but", "begun with 0", "another `out`"):
        assert text in error
    pictures = ["sample", f"weights={model}", f"out={folder}", *TINY]
    statuses = run_ranks("tests.workers.sampling:run", 3, commands=[["sample", *words]])
    assert statuses == [[0], [0], [0]]
    assert out.read_bytes() == whole.read_bytes() and not Path(f"{out}.parts").exists()
    assert (tmp_path / "out_grid.png").read_bytes() == whole.with_name("whole_grid.png").read_bytes()
    assert run_ranks("tests.workers.sampling:run", 2, commands=[pictures]) == [[0], [0]]

    images, source = open_member(out), from_folder(folder)
    assert source.shape == images.shape == (23, 4, 4, 1) and not Path(f"{folder}.parts").exists()
    for indices in (range(0, 23), own_range(23, 1, 3)):
        rank, size = (0, 1) if len(indices) == 23 else (1, 3)
        read = np.concatenate(list(source.batches(rank, size, 5)))
        np.testing.assert_array_equal(read, images[indices.start : indices.stop])
    assert (source.labels == from_npz(out).labels).all()
    before = out.stat().st_mtime_ns, (folder / "000000.png").stat().st_mtime_ns
    assert sample(words) == 0 and sample(pictures[1:]) == 0  # the same again: nothing is drawn
    assert (out.stat().st_mtime_ns, (folder / "000000.png").stat().st_mtime_ns) == before
    assert "drawn before" in capsys.readouterr().out
    assert sample([*pictures[1:], "sample.cfg_scale=3"]) == 2
    assert "`cfg_scale` is 3.0, but" in capsys.readouterr().err


@pytest.mark.full
def test_a_rank_that_hangs_is_not_waited_for(model, tmp_path):
    """It stands still with all its connections; the other leaves its stacks and ends, and the rest is drawn later."""
    out, log = tmp_path / "out.npz", tmp_path / "log"
    parts = Path(f"{out}.parts")
    given = [f"weights={model}", f"out={out}", *TINY, "sample.num_steps=900", "run.timeout_seconds=20"]
    process = launch(given, log, module="entprune_ds.cli.sample")
    while not list(parts.glob("part_*")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    os.kill(rank_pids(log)[1], signal.SIGSTOP)
    finish(process, seconds=150)
    text = log.read_text()
    assert re.search(r"rank 0 on .* made no progress for 20 s .*rank_00000\.txt\. What is finished stays in", text), (
        text
    )
    assert "in draw_missing" in (parts / "stacks" / "rank_00000.txt").read_text() and not out.exists()
    assert 6 <= len(list(parts.glob("part_*"))) < 12
    assert sample(given) == 0 and out.exists() and not parts.exists()


def test_an_image_depends_on_its_seed_and_index_alone(model, whole, tmp_path):
    protocol = json.loads(whole.with_name("whole_protocol.json").read_text())
    assert (protocol["num_samples"], protocol["labels"], protocol["tf32"], protocol["seed"]) == (
        23,
        "uniform",
        False,
        0,
    )
    assert (protocol["weights"], protocol["tf32"], protocol["vae"]) == ("ema", False, "none (pixels)")
    images, labels = open_member(whole), open_member(whole, "arr_1")
    for size in (1, 7, 23):
        out = tmp_path / f"{size}.npz"
        assert sample([f"weights={model}", f"out={out}", *TINY, f"sample.batch_size={size}"]) == 0
        difference = np.abs(open_member(out).astype(int) - images)  # kernels may round otherwise at another batch size
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
        assert (open_member(out, "arr_1") == labels).all()
    out = tmp_path / "other.npz"
    assert sample([f"weights={model}", f"out={out}", *TINY, "sample.seed=1"]) == 0
    assert np.abs(open_member(out).astype(int) - images).mean() > 5
    out = tmp_path / "balanced.npz"
    assert sample([f"weights={model}", f"out={out}", *TINY, "sample.labels=balanced"]) == 0
    assert (open_member(out, "arr_1") == np.arange(23) % 3).all()


def test_the_npz_has_adms_form(whole):
    with np.load(whole, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
        assert file.files == ["arr_0", "arr_1"]
    assert images.dtype == np.uint8 and images.shape == (23, 4, 4, 1) and labels.shape == (23,)
    np.testing.assert_array_equal(np.concatenate(adm_batches(whole, 10)), images)
    mapped = open_member(whole)
    assert isinstance(mapped, np.memmap) and (mapped == images).all() and member_shape(whole) == images.shape


def test_pieces_go_to_the_disk_one_at_a_time(tmp_path):
    path, piece = tmp_path / "large.npz", np.arange(2**20, dtype=np.uint8).reshape(16, 256, 256, 1)
    tracemalloc.start()
    write_npz(path, (16 * 64, 256, 256, 1), (piece + np.uint8(i) for i in range(64)), np.zeros(1024, np.int64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20 < path.stat().st_size / 8
    assert (open_member(path)[33 * 16 : 34 * 16] == piece + 33).all()
    for pieces, message in (([piece], "hold 16 samples, not 32"), ([piece[:, :9]], r"\(9, 256, 1\).*not \(256")):
        with pytest.raises(ValueError, match=message):
            write_npz(tmp_path / "wrong.npz", (32, 256, 256, 1), iter(pieces), np.zeros(32, np.int64))
    assert [p.name for p in tmp_path.iterdir()] == ["large.npz"]


@pytest.mark.full
def test_an_npz_above_4_gib_can_be_read(tmp_path):
    path, piece = tmp_path / "huge.npz", np.zeros((64, 1024, 1024, 1), np.uint8)
    piece[:, 5, 5] = 7
    write_npz(path, (64 * 66, 1024, 1024, 1), (piece for _ in range(66)), np.zeros(64 * 66, np.int64))
    assert path.stat().st_size > 2**32
    assert open_member(path)[-1, 5, 5, 0] == 7 and open_member(path)[-1].sum() == 7
    assert open_member(path, "arr_1").shape == (64 * 66,)


def test_damaged_parts_are_drawn_again_and_what_is_left_of_a_kill_is_cleared(tmp_path):
    parts = Parts(tmp_path, 5, 2)
    for part, indices in enumerate(parts.ranges):
        np.save(parts.path(part), np.full((len(indices), 4, 4, 1), part, np.uint8))
    rest = tmp_path / ".part_000001.npy.77.tmp"
    rest.write_bytes(b"half")
    assert begin(parts, {"seed": 0}) == [] and parts.missing() == [] and not rest.exists()
    assert parts.take([4, 0, 3])[:, 0, 0, 0].tolist() == [2, 0, 1]
    parts.path(1).write_bytes(parts.path(1).read_bytes()[:-1])
    np.save(parts.path(2), np.zeros((2, 4, 4, 1), np.uint8))  # of another number
    assert begin(parts, {"seed": 0}) == [] and parts.missing() == [1, 2]
    assert "`seed` is 1, but" in begin(parts, {"seed": 1})[0]
    assert begin(parts, {"seed": 0, "extra": 1})[0] == f"`extra` is 1, but {tmp_path} was begun with absent."
    for damaged in ("{", "[]"):
        (tmp_path / "settings.json").write_text(damaged)
        assert "is damaged" in begin(parts, {"seed": 0})[0]


def test_a_kill_between_the_samples_and_their_protocol_names_them_as_no_others(model, tmp_path, capsys):
    """Samples of seed 2 lie beside the protocol of seed 1 for a moment, unless that goes first."""
    out = tmp_path / "out.npz"
    given = [f"weights={model}", f"out={out}", *TINY]
    assert sample([*given, "sample.seed=1"]) == 0
    with pytest.raises(RankFailure, match="exit 9"):
        run_ranks("tests.workers.sampling:ended_before_the_protocol", 1, words=[*given, "sample.seed=2"])
    assert sample([*given, "sample.seed=1"]) == 2 and "`seed` is 1, but" in capsys.readouterr().err
    assert sample([*given, "sample.seed=2"]) == 0 and json.loads(protocol_path(out).read_text())["seed"] == 2


def test_outputs_with_points_in_their_names_have_protocols_of_their_own():
    assert protocol_path(Path("o/cfg1.5")) != protocol_path(Path("o/cfg1.25"))
    assert protocol_path(Path("o/x.npz")) == Path("o/x_protocol.json")


def test_wrong_samples_are_named_with_their_fault(tmp_path):
    images, labels, good = np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int64), tmp_path / "good.npz"
    save_npz(images, labels, good)
    with pytest.raises(ValueError, match="does not exist"):
        from_npz(tmp_path / "absent.npz")
    bad = tmp_path / "bad.npz"
    for content in (b"", b"text", good.read_bytes()[:200]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as an npz"):
            from_npz(bad)
    for arrays, message in (
        ({"images": images}, "holds no arr_0, only images"),
        ({"arr_0": images[0], "arr_1": labels}, "arr_0 must be a non-empty uint8"),
        ({"arr_0": images, "arr_1": labels[:1]}, "arr_1 must be 2 integers"),
        ({"arr_0": np.array([{}], dtype=object), "arr_1": labels}, "cannot be read"),
    ):
        np.savez(bad, **arrays)
        with pytest.raises(ValueError, match=message):
            from_npz(bad)
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        from_folder(folder)
    for name, side in (("a", 8), ("b", 8), ("c", 16)):
        Image.new("RGB", (side, 8)).save(folder / f"{name}.png")
    with pytest.raises(ValueError, match=r"several sizes.*\[8, 8, 3\]: 2.*\[8, 16, 3\]: 1, e\.g\. c\.png"):
        from_folder(folder)
    (folder / "c.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"c\.png cannot be opened"):
        from_folder(folder)


def test_what_cannot_be_written_is_refused_before_the_model_is_read(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    for out, message in (("file/x.npz", "is a file"), ("full", "exists already"), ("file", "exists already")):
        assert sample([f"weights={model}", f"out={tmp_path / out}", *TINY]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "note").read_text() == "mine"
