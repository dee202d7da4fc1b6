"""Kinds of examples: latents, pixels and moments on disk, and the latents that training sees."""

from __future__ import annotations

import json

import numpy as np
import pytest

from entprune_ds.data.index import check_shards, load_index
from entprune_ds.data.latents import ShardError, decode_array, encode_array
from entprune_ds.data.shards import write_shards
from entprune_ds.data.stream import read_shard

CLASSES = 5


def arrays(kind, count=10):
    """`count` random examples of a kind, latents of 2x4x4."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        if kind == "pixels":
            yield generator.integers(0, 256, (2, 4, 4), dtype=np.uint8)
        elif kind == "moments":
            yield generator.standard_normal((2, 4, 4, 4)).astype(np.float32)
        else:
            yield generator.standard_normal((2, 4, 4)).astype(np.float32)


def examples(kind, count=10):
    for i, array in enumerate(arrays(kind, count)):
        yield f"k{i:03d}", array, i % CLASSES, {"i": i}


def write(folder, kind, count=10, shard_size=4):
    write_shards(examples(kind, count), folder, shard_size, {"kind": kind}, num_classes=CLASSES, kind=kind)
    return load_index(folder)


@pytest.mark.parametrize("kind", ["latents", "pixels", "moments"])
def test_every_kind_comes_back_as_it_was_written(tmp_path, kind):
    index = write(tmp_path, kind)
    assert index.kind == kind and index.latent_shape == (2, 4, 4) and check_shards(index, checksums=True) == []
    back = [array for shard in index.shards for _, array, _ in read_shard(index, shard)]
    for found, expected in zip(back, arrays(kind), strict=True):
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
    values = json.loads((tmp_path / "index.json").read_text())
    assert values["kind"] == kind and values["dtype"] == ("uint8" if kind == "pixels" else "float32")


def test_an_index_without_a_kind_holds_latents(tmp_path):
    write(tmp_path, "latents")
    values = json.loads((tmp_path / "index.json").read_text())
    del values["kind"]
    (tmp_path / "index.json").write_text(json.dumps(values))
    assert load_index(tmp_path).kind == "latents"
    assert write(tmp_path, "latents").kind == "latents"  # and the folder counts as complete
    with pytest.raises(ShardError, match="already holds other shards"):
        write(tmp_path, "pixels")


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("pixels", np.zeros((2, 4, 4), np.float32)),
        ("latents", np.zeros((2, 4, 4), np.uint8)),
        ("latents", np.zeros((2, 2, 4, 4), np.float32)),
        ("moments", np.zeros((2, 4, 4), np.float32)),
        ("moments", np.zeros((1, 4, 4, 4), np.float32)),
        ("moments", np.zeros((2, 3, 4, 4), np.float32)),
        ("moments", np.full((2, 4, 4, 4), np.nan, np.float32)),
    ],
)
def test_arrays_of_another_kind_are_refused(tmp_path, kind, array):
    with pytest.raises(ValueError, match=f"example a: {kind} (must be|hold nan)"):
        write_shards([("a", array, 0, {})], tmp_path, 4, {}, num_classes=1, kind=kind)
    assert not any(tmp_path.iterdir())


def test_an_unknown_kind_or_an_index_that_lies_about_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be one of latents, pixels, moments, got 'images'"):
        write(tmp_path / "a", "images")
    write(tmp_path, "pixels")
    values = json.loads((tmp_path / "index.json").read_text())
    for changes in ({"kind": "images"}, {"kind": "latents"}, {"dtype": "float32"}, {"shape": [2, 2, 4, 4]}):
        (tmp_path / "index.json").write_text(json.dumps(values | changes))
        with pytest.raises(ShardError, match="cannot be used"):
            load_index(tmp_path)
    with pytest.raises(ValueError, match=r"holds uint8 \(2, 4, 4\), the index says float32"):
        decode_array(encode_array(np.zeros((2, 4, 4)), "pixels"), (2, 4, 4), "latents")
