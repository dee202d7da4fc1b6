"""`entprune_ds.cli.encode`: the VAE's moments of every image and its mirror, once, on any number of ranks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from entprune_ds.cli.encode import main
from entprune_ds.data.index import check_shards, load_index
from entprune_ds.data.reader import read_shard
from entprune_ds.data.shards import write_shards
from tests.ranks import ROOT, free_port, rank_environment, run_ranks

diffusers = pytest.importorskip("diffusers")
CLASSES = ("cat", "dog", "emu")


def write_pixels(folder: Path, count: int, shard_size: int, size: int = 16) -> Path:
    generator = np.random.default_rng(count)
    images = [generator.integers(0, 256, (3, size, size), dtype=np.uint8) for _ in range(count)]
    examples = [(f"{i:08d}", image, i % 3, {}) for i, image in enumerate(images)]
    write_shards(examples, folder, shard_size, {"count": count, "size": size}, num_classes=3, kind="pixels")
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A random AutoencoderKL that halves images once."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Path:
    """train/ with 11 images in 4 shards, val/ with 2."""
    folder = tmp_path_factory.mktemp("pixels")
    write_pixels(folder / "train", 11, 3)
    write_pixels(folder / "val", 2, 3)
    return folder


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, vae, pixels) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("encoded")
    assert main([f"data.shards={pixels}", f"out={out}", f"sample.vae={vae}", "data.encode_batch=2"]) == 0
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def entries(folder: Path):
    index = load_index(folder)
    assert check_shards(index, checksums=True) == []
    return [entry for shard in index.shards for entry in read_shard(index, shard)]


def test_moments_are_those_of_the_image_and_of_its_mirror_image(vae, pixels, encoded):
    model = diffusers.AutoencoderKL.from_pretrained(vae)
    for split, count in (("train", 11), ("val", 2)):
        index = load_index(encoded / split)
        assert index.kind == "moments" and index.shape == (2, 8, 8, 8) and index.total == count
        assert json.loads((encoded / split / "classes.json").read_text()) == list(CLASSES)
        for (key, moments, label), (same, image, origin) in zip(
            entries(encoded / split), entries(pixels / split), strict=True
        ):
            assert (key, label) == (same, origin)
            x = torch.from_numpy(image.copy())[None].float() / 127.5 - 1
            for found, seen in ((moments[0], x), (moments[1], x.flip(3))):
                with torch.no_grad():
                    posterior = model.encode(seen).latent_dist
                expected = torch.cat([posterior.mean, posterior.logvar], dim=1)[0].numpy()
                assert np.abs(found - expected).max() < 1e-4
    description = load_index(encoded / "train").description
    assert description["pixels"] == load_index(pixels / "train").digest
    assert description["vae_revision"].startswith("sha256:") and description["vae_scaling_factor"] == 0.18215


def test_two_ranks_write_what_one_process_writes(vae, pixels, encoded, tmp_path):
    words = [f"data.shards={pixels}", f"out={tmp_path}", f"sample.vae={vae}", "data.encode_batch=2"]
    assert run_ranks("entprune_ds.cli.encode:main", 2, argv=words) == [0, 0]
    assert content(tmp_path) == content(encoded)


def test_a_rank_that_is_killed_ends_the_job_and_a_restart_completes_it(vae, tmp_path, capsys):
    source = write_pixels(tmp_path / "pixels", 60, 1)
    words = [f"data.shards={source}", f"sample.vae={vae}", "data.encode_batch=1"]
    command = [sys.executable, "-m", "entprune_ds.cli.encode", *words, f"out={tmp_path / 'cut'}"]
    port, parts = free_port(), tmp_path / "cut" / "parts"
    ranks = [
        subprocess.Popen(command, env=rank_environment(r, 2, port), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    while len(list(parts.glob("0*.json"))) < 4:
        assert ranks[0].poll() is None and ranks[1].poll() is None
        time.sleep(0.002)
    ranks[1].send_signal(signal.SIGKILL)
    error = ranks[0].communicate(timeout=60)[1]
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "another rank is gone" in error and "Traceback" not in error
    finished = {p.name: p.stat().st_mtime_ns for p in parts.glob("0*.json")}
    assert 4 <= len(finished) < 60 and not (tmp_path / "cut" / "index.json").exists()
    for out in ("cut", "whole"):
        assert main([*words, f"out={tmp_path / out}"]) == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert {p.name: p.stat().st_mtime_ns for p in parts.glob("0*.json") if p.name in finished} == finished
    assert "written again" not in capsys.readouterr().err
    (tmp_path / "cut" / "shard-000007.tar").write_bytes(b"damaged")
    assert main([*words, f"out={tmp_path / 'cut'}"]) == 0  # and repairs what is damaged
    assert f"written again in {tmp_path / 'cut'}: shard-000007.tar (was damaged)\n" in capsys.readouterr().err
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_bfloat16_is_near_and_another_precision_is_another_data_set(vae, pixels, encoded, tmp_path, capsys):
    words = [f"data.shards={pixels}/val", f"sample.vae={vae}", "data.encode_dtype=bfloat16"]
    assert main([*words, f"out={tmp_path}"]) == 0
    for (_, near, _), (_, exact, _) in zip(entries(tmp_path), entries(encoded / "val"), strict=True):
        assert 0 < np.abs(near - exact).max() < 0.1
    assert main([*words[:2], f"out={tmp_path}"]) == 1
    assert "already holds other shards: data.encode_dtype was bfloat16, is float32. Give" in capsys.readouterr().err


def test_wrong_input_is_one_clear_error(vae, pixels, tmp_path, capsys, digits):
    def error(shards, *words, status):
        assert main([f"data.shards={shards}", f"out={tmp_path / 'out'}", f"sample.vae={vae}", *words]) == status
        return capsys.readouterr().err

    assert main(["data.encode_dtype=half"]) == 2
    text = capsys.readouterr().err
    for key in ("`data.encode_dtype` must be", "`data.shards` is missing", "`data.out` is", "`sample.vae` is missing"):
        assert key in text
    assert "holds latents of shape [1, 8, 8], not RGB pixels" in error(f"{digits}/train", status=1)
    odd = write_pixels(tmp_path / "odd", 2, 2, size=17)
    assert "The VAE cannot halve images of 17x17" in error(odd, status=1)
    assert "index.json does not exist" in error(tmp_path, status=2)
    assert "`sample.vae`" in error(pixels, "sample.vae=/nowhere", status=2)
    bad = write_pixels(tmp_path / "bad", 6, 2)
    data = bytearray((bad / "shard-000001.tar").read_bytes())
    data[512:560] = b"x" * 48
    (bad / "shard-000001.tar").write_bytes(data)
    assert str(bad / "shard-000001.tar") in error(bad, status=1)
    assert not (tmp_path / "out" / "index.json").exists()
    (bad / "shard-000002.tar").unlink()
    assert "shard-000002.tar is missing" in error(bad, status=1)


def test_dry_run_counts_and_writes_nothing(vae, pixels, tmp_path, capsys):
    assert main([f"data.shards={pixels}", f"out={tmp_path / 'o'}", f"sample.vae={vae}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"train: would encode 11 pixels 3x16x16 in 4 shards, to {tmp_path / 'o' / 'train'}" in out
    assert not (tmp_path / "o").exists()
