"""tools/check_shards.py: it counts what is there, names what is damaged, and draws what it sees."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from entprune_ds.data.shards import write_shards
from tests.ranks import ROOT

spec = importlib.util.spec_from_file_location("check_shards", ROOT / "tools" / "check_shards.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
sys.modules["check_shards"] = tool
spec.loader.exec_module(tool)


def write(folder: Path, kind: str, shape: tuple[int, ...]) -> Path:
    generator = np.random.default_rng(0)
    arrays = (generator.integers(0, 256, shape) for _ in range(10))
    arrays = (a.astype(np.uint8) if kind == "pixels" else (a / 256).astype(np.float32) for a in arrays)
    examples = [(f"e{i}", array, i % 3, {}) for i, array in enumerate(arrays)]
    write_shards(examples, folder, 4, {"kind": kind}, num_classes=4, kind=kind)
    return folder


def run(capsys, *words) -> tuple[int, dict]:
    status = tool.main([*map(str, words), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return status, json.loads(lines[0])


def test_whole_folders_are_counted(tmp_path, capsys):
    write(tmp_path / "train", "pixels", (3, 8, 8))
    write(tmp_path / "val", "moments", (2, 8, 4, 4))
    status, result = run(capsys, tmp_path)
    assert status == 0 and result["ok"] and result["problems"] == []
    train, val = result["folders"]
    assert train["examples"] == 10 and train["label_histogram"] == [4, 3, 3, 0] and train["shards"] == 3
    assert train["shape"] == [3, 8, 8] and val["kind"] == "moments"
    assert tool.main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "10 of 10 pixels 3x8x8 in 3 shards" in text and "4 classes, 1 of them empty" in text


def test_every_damage_is_listed_and_the_status_is_1(tmp_path, capsys):
    folder = write(tmp_path / "a", "pixels", (3, 8, 8))
    data = bytearray((folder / "shard-000001.tar").read_bytes())
    data[700] ^= 1
    (folder / "shard-000001.tar").write_bytes(data)
    (folder / "shard-000002.tar").unlink()
    status, result = run(capsys, folder)
    text = "\n".join(result["problems"])
    assert status == 1 and not result["ok"] and result["folders"][0]["examples"] < 10
    assert "shard-000001.tar is damaged: its SHA-256" in text and "shard-000002.tar is missing" in text
    status, result = run(capsys, tmp_path / "nothing")
    assert status == 1 and "neither a folder of shards nor" in result["problems"][0]


def test_labels_other_than_the_index_says_are_noticed(tmp_path, capsys):
    folder = write(tmp_path / "a", "pixels", (3, 8, 8))
    values = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(values | {"label_histogram": [3, 4, 3, 0]}))
    status, result = run(capsys, folder)
    assert status == 1 and "labels are not as often there" in result["problems"][0]


def test_the_sheet_shows_the_stored_pixels_by_class(tmp_path, capsys):
    folder = write(tmp_path / "a", "pixels", (3, 8, 8))
    status, _ = run(capsys, folder, "--sheet", tmp_path / "sheet.png", "--examples", 6)
    assert status == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    first = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).transpose(1, 2, 0)
    assert np.array_equal(sheet[:64:8, :64:8], first)  # enlarged 8 times
    assert sheet.shape == (64 + 2 * tool.TEXT, 10 * 66, 3)


@pytest.mark.parametrize(("kind", "shape"), [("moments", (2, 8, 4, 4)), ("latents", (1, 8, 8)), ("latents", (4, 4, 4))])
def test_undecoded_latents_say_so(tmp_path, kind, shape):
    folder = write(tmp_path / "a", kind, shape)
    assert tool.main([str(folder), "--sheet", str(tmp_path / "sheet.png")]) == 0
    array = np.zeros((2, *shape), np.float32)
    assert "not decoded" in tool.pictures(array, kind, "")[1]


def test_moments_are_decoded_by_the_vae(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    folder = write(tmp_path / "a", "moments", (2, 8, 4, 4))
    status, _ = run(capsys, folder, "--sheet", tmp_path / "sheet.png", "--vae", tmp_path / "vae")
    arrays = np.random.default_rng(1).standard_normal((2, 2, 8, 4, 4)).astype(np.float32)
    images, how = tool.pictures(arrays, "moments", str(tmp_path / "vae"))
    with torch.no_grad():
        expected = model.eval().decode(torch.from_numpy(arrays[:, 0, :4])).sample
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert status == 0 and how == "means decoded by vae" and np.abs(images - expected).max() <= 1
    shutil.rmtree(tmp_path / "vae")
    status, result = run(capsys, folder, "--sheet", tmp_path / "sheet.png", "--vae", tmp_path / "vae")
    assert status == 1 and "no contact sheet: VAE " in result["problems"][0]
