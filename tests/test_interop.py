"""Exports: what is written comes back to the bit, and every fault is one ValueError that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from entprune_ds.config import DiffusionConfig
from entprune_ds.interop.safetensors import (
    open_export,
    read_export,
    save_model,
)
from entprune_ds.interop.tensors import key_report
from entprune_ds.interop.weights import starting_problems
from entprune_ds.models.dit import DiT
from tests.tiny import MODEL, load_model

DIFFUSION = DiffusionConfig()

KEPT = (0, 2, 3)
CONFIG = replace(MODEL, kept_blocks=KEPT, learn_sigma=True)
FACTS = {"weights": "ema", "step": 12, "commit": "abc", "config_digest": "def"}


def random_model() -> DiT:
    """The tiny model without block 1, all weights random."""
    model, generator = DiT(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=generator)
    return model


def export(model: DiT, folder: Path) -> Path:
    """Export a model, one tensor at a time."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return save_model(folder, weights, weights.__getitem__, CONFIG, FACTS)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A complete export."""
    return export(random_model(), tmp_path / "model")


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change config.json."""
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def edit_weights(folder: Path, change: Callable[[dict], object]) -> None:
    """Change model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    """The message with which load_model refuses a folder."""
    with pytest.raises(ValueError) as error:
        load_model(folder)
    return str(error.value)


# ---------------------------------------------------------------- there and back


def test_an_export_comes_back_to_the_bit(folder):
    original, (loaded, facts) = random_model(), load_model(folder)
    weights = dict(loaded.named_parameters())
    assert weights.keys() == {n for n, _ in original.named_parameters()}
    assert all(torch.equal(p, weights[n]) and weights[n].dtype == torch.float32 for n, p in original.named_parameters())
    assert list(loaded.blocks) == ["0", "2", "3"]
    generator = torch.Generator().manual_seed(1)
    z_t, t = torch.randn(3, 1, 4, 4, generator=generator), torch.rand(3, generator=generator)
    assert torch.equal(loaded(z_t, t, torch.arange(3)), original(z_t, t, torch.arange(3)))
    assert facts["kept_blocks"] == [0, 2, 3] and {k: facts[k] for k in FACTS} == FACTS


def test_a_loaded_model_is_ready_for_use_only(folder):
    model, _ = load_model(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_architecture_comes_back_without_the_path_it_started_from(tmp_path):
    weights = {n: p.detach() for n, p in random_model().named_parameters()}
    save_model(tmp_path, weights, weights.__getitem__, replace(CONFIG, weights="/somewhere/private"), FACTS)
    config, _ = read_export(tmp_path)
    assert config == CONFIG
    assert "private" not in (tmp_path / "config.json").read_text()


def test_all_blocks_are_listed_even_where_none_was_removed(tmp_path):
    model = DiT(MODEL)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    save_model(tmp_path, weights, weights.__getitem__, MODEL, FACTS)
    config, facts = read_export(tmp_path)
    assert config.kept_blocks == (0, 1, 2, 3) and facts["kept_blocks"] == [0, 1, 2, 3]


def test_an_export_is_two_files_and_replaces_an_older_one(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    other = random_model()
    with torch.no_grad():
        other.x_embedder.proj.bias.fill_(7)
    export(other, folder)
    assert torch.equal(load_model(folder)[0].x_embedder.proj.bias, other.x_embedder.proj.bias)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_export_leaves_the_older_one_as_it_was(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def broken(name: str) -> torch.Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        save_model(folder, ["x_embedder.proj.bias"], broken, CONFIG, FACTS)
    with pytest.raises(ValueError, match="JSON"):
        weights = {n: p.detach() for n, p in random_model().named_parameters()}
        save_model(folder, weights, weights.__getitem__, CONFIG, {"step": float("nan")})
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    load_model(folder)


def test_a_reader_gives_single_tensors_in_single_precision(folder):
    read = open_export(folder).read
    for name, p in random_model().named_parameters():
        assert torch.equal(read(name), p)
    edit_weights(folder, lambda t: t.update({"final_layer.linear.bias": t["final_layer.linear.bias"].bfloat16()}))
    assert open_export(folder).read("final_layer.linear.bias").dtype == torch.float32


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder) and str(folder) in refusal(folder)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def test_missing_extra_and_misshaped_parameters_are_all_listed(folder):
    def change(tensors: dict) -> None:
        del tensors["blocks.2.mlp.fc1.bias"]
        tensors["blocks.1.attn.proj.bias"] = torch.zeros(5)
        tensors["final_layer.linear.bias"] = torch.zeros(3)

    edit_weights(folder, change)
    text = refusal(folder)
    assert "missing blocks.2.mlp.fc1.bias [128]" in text
    assert "extra blocks.1.attn.proj.bias [5]" in text
    assert "final_layer.linear.bias has shape [3] instead of [8]" in text
    assert text.count(";") == 2 and "model.safetensors" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda v: v.update(format="other/3"), "its format is 'other/3', this version reads 'entprune_ds/1'"),
        (lambda v: v.pop("format"), "its format is None"),
        (lambda v: v.pop("model"), "'model'"),
        (lambda v: v.update(model=[1]), "`model` must be a group of settings"),
        (lambda v: v["model"].update(dephth=3), "`model.dephth` is not a setting"),
        (lambda v: v["model"].update(depth="x"), "`model.depth` must be a whole number"),
    ],
)
def test_a_wrong_description_is_refused_by_name(folder, change, expected):
    edit(folder, change)
    assert expected in refusal(folder) and str(folder / "config.json") in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"format": '])
def test_a_damaged_description_is_refused_by_name(folder, content):
    (folder / "config.json").write_bytes(content)
    assert str(folder / "config.json") in refusal(folder)


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_damaged_weights_are_refused_by_name(folder, size):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    assert str(folder / "model.safetensors") in refusal(folder)
    assert starting_problems(CONFIG, DIFFUSION, folder) != []


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["model"].update(kept_blocks=[0, 99]),
        lambda v: v["model"].update(hidden_size=33),
        lambda v: v["model"].update(num_heads=5),
        lambda v: v["model"].update(mlp_ratio=10**400),
        lambda v: v["model"].update(hidden_size=2**20),  # terabytes: refused before anything is built
        lambda v: v["model"].update(depth=-1, kept_blocks=None),
    ],
)
def test_an_impossible_architecture_is_refused_by_name(folder, change):
    edit(folder, change)
    assert str(folder) in refusal(folder)


# ---------------------------------------------------------------- reports


def test_key_reports_are_empty_where_all_fits_and_sorted_otherwise():
    shapes = {"a": (1, 2), "b": (3,), "c": ()}
    assert key_report(shapes, dict(reversed(shapes.items()))) == []
    found = key_report(shapes, {"a": (2, 1), "d": (4,), "c": ()})
    assert found == ["a has shape [2, 1] instead of [1, 2]", "extra d [4]", "missing b [3]"]


def test_an_architecture_that_fits_has_no_problems(folder):
    assert starting_problems(CONFIG, DIFFUSION, folder) == []
    assert starting_problems(replace(CONFIG, weights="anything"), DIFFUSION, folder) == []
    assert starting_problems(replace(CONFIG, kept_blocks=(0, 3)), DIFFUSION, folder) == []


def test_starting_problems_list_both_values_of_every_difference(folder):
    found = starting_problems(replace(CONFIG, hidden_size=64, num_classes=10), DIFFUSION, folder)
    assert len(found) == 2
    assert f"`model.hidden_size` is 64, but `model.weights` ({folder}) has 32. Make them equal." in found
    [classes] = [text for text in found if "num_classes" in text]
    assert classes.startswith(f"`model.num_classes` is 10, but `model.weights` ({folder}) has 3. Make them equal.")
    assert classes.endswith(f"entprune-ds import src={folder} out=DIR model.num_classes=10")


@pytest.mark.parametrize(("kept", "missing"), [((0, 1), [1]), (None, [1]), ((1,), [1])])
def test_blocks_that_an_export_no_longer_has_are_named_with_those_it_has(folder, kept, missing):
    [text] = starting_problems(replace(CONFIG, kept_blocks=kept), DIFFUSION, folder)
    assert f"no longer has blocks {missing}. Set model.kept_blocks=[0, 2, 3]" in text


def test_an_unreadable_export_is_one_problem_of_the_setting(tmp_path):
    [text] = starting_problems(CONFIG, DIFFUSION, tmp_path)
    assert text.startswith("`model.weights`: ") and "config.json is missing" in text
