"""The import and export commands, and model.weights of every format in the commands that take it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from entprune_ds.cli import drawing, export, import_, sample
from entprune_ds.config import DiffusionConfig
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.source import Source
from entprune_ds.interop.tensors import parameter_shapes
from entprune_ds.interop.weights import open_weights, starting_problems
from entprune_ds.models.dit import initial_tensor
from tests.ranks import run_ranks
from tests.reference.official import OfficialDiT, random_official
from tests.test_interop import edit_weights
from tests.test_training import words as training_words
from tests.tiny import MODEL

SIZES = dict(width=32, heads=2, size=8, channels=1, classes=10, sit=True)
STATED = ["model.process=sit", "model.num_heads=2"]


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A tiny official SiT of 4 blocks for 8x8 digits."""
    path = tmp_path_factory.mktemp("official") / "tiny.pt"
    torch.save(random_official(depth=4, **SIZES).state_dict(), path)
    return path


@pytest.fixture
def ours(official, tmp_path) -> Path:
    """That model imported, without block 1."""
    words = [f"src={official}", f"out={tmp_path / 'ours'}", *STATED, "model.kept_blocks=[0,2,3]", "license=mit"]
    assert import_.main(words) == 0
    return tmp_path / "ours"


def refused(capsys, command, *words: str) -> str:
    """The errors of a refused command."""
    assert command.main(list(words)) == 2
    return capsys.readouterr().err


def test_import_says_what_it_did_and_stores_it(official, tmp_path, capsys):
    ours = tmp_path / "ours"
    assert import_.main([f"src={official}", f"out={ours}", *STATED, "model.kept_blocks=[0,2,3]", "license=mit"]) == 0
    text = capsys.readouterr().out
    assert "Dropped blocks [1]: depth 3 of originally 4." in text and "sit, depth 3 of 4, patch 2, width 32" in text
    facts = json.loads((ours / "config.json").read_text())
    assert facts["kept_blocks"] == [0, 2, 3] and facts["source_license"] == "mit"
    assert facts["source"] == "official file tiny.pt" and facts["commit"] and len(facts["config_digest"]) == 64


def test_samples_are_the_same_from_every_format(ours, tmp_path):
    for form, out in (("official", "small.pt"), ("diffusers", "folder"), ("entprune", "again")):
        assert export.main([f"src={ours}", f"out={tmp_path / out}", f"format={form}"]) == 0
    drawn = []
    for weights in ("ours", "small.pt", "folder", "again", "ours/model.safetensors"):
        out = tmp_path / f"{weights.replace('/', '_')}.npz"
        assert (
            sample.main([f"weights={tmp_path / weights}", f"out={out}", "sample.num_samples=4", "sample.num_steps=2"])
            == 0
        )
        drawn.append(np.load(out)["arr_0"])
        protocol = json.loads(out.with_name(f"{out.stem}_protocol.json").read_text())
        assert protocol["kept_blocks"] == [0, 2, 3]
    assert drawn[0].std() > 0 and all(np.array_equal(drawn[0], other) for other in drawn)


def test_export_drops_blocks_by_original_index(ours, tmp_path, capsys):
    out = tmp_path / "one.pt"
    assert export.main([f"src={ours}", f"out={out}", "format=official", "model.kept_blocks=[3]"]) == 0
    assert "Dropped blocks [0, 2]" in capsys.readouterr().out and open_weights(out).model.blocks == (3,)
    OfficialDiT(depth=1, **SIZES).load_state_dict(torch.load(out, weights_only=True), strict=True)
    text = refused(capsys, export, f"src={ours}", f"out={out}", "format=official", "model.kept_blocks=[1]")
    assert "the source has blocks [0, 2, 3]" in text


def test_a_training_starts_from_an_official_file_and_its_exports_carry_the_licence(official, ours, digits, tmp_path):
    small = tmp_path / "small.pt"
    assert export.main([f"src={ours}", f"out={small}", "format=official"]) == 0
    more = [f"model.weights={small}", "model.learn_sigma=true", "model.kept_blocks=[0,3]", "train.num_steps=1"]
    more += ["prune.target_depth=null", "prune.end_step=null", "train.learning_rate=1e-30", "train.ema_decay=0.5"]
    run_ranks("tests.workers.training:train", 1, runs=[training_words(digits, tmp_path, "run", *more)])
    assert export.main([f"run={tmp_path / 'run'}", "format=official", "weights=raw"]) == 0
    found, start = open_weights(tmp_path / "run" / "model.pt"), open_weights(small)
    assert found.facts["source_license"] == "mit" and found.facts["step"] == 1 and found.model.blocks == (0, 3)
    assert all(torch.equal(found.read(name), start.read(name)) for name in found.shapes)


def spoil(path: Path, out: Path) -> Path:
    """The official file with 3 NaN and 1 infinite value, in two tensors."""
    state = torch.load(path, weights_only=True)
    state["blocks.1.mlp.fc2.weight"].view(-1)[[0, 5, -1]] = float("nan")
    state["blocks.2.attn.proj.bias"][0] = float("inf")
    torch.save(state, out)
    return out


SPOILED = "holds 4 NaN or infinite values, in 2 tensors: blocks.1.mlp.fc2.weight (3), blocks.2.attn.proj.bias (1). "


def test_nan_and_infinite_values_are_neither_imported_nor_exported(official, tmp_path, capsys):
    bad, out = spoil(official, tmp_path / "bad.pt"), tmp_path / "out"
    text = refused(capsys, import_, f"src={bad}", f"out={out}", *STATED)
    assert f"{bad} {SPOILED}" in text and "take an intact copy" in text and not out.exists()
    assert import_.main([f"src={bad}", f"out={out}", *STATED, "model.kept_blocks=[0,3]"]) == 0  # without those blocks
    assert import_.main([f"src={official}", f"out={out}", *STATED]) == 0

    def change(tensors: dict) -> None:
        tensors["blocks.1.mlp.fc2.weight"].view(-1)[[0, 5, -1]] = float("nan")
        tensors["blocks.2.attn.proj.bias"][0] = float("-inf")

    edit_weights(out, change)
    for form, name in (("official", "x.pt"), ("diffusers", "x"), ("entprune", "y")):
        words = [f"src={out}", f"out={tmp_path / name}", f"format={form}"]
        assert SPOILED in refused(capsys, export, *words) and not (tmp_path / name).exists()


def test_a_training_does_not_start_from_nan_and_all_ranks_say_the_same(tmp_path):
    shapes, facts = parameter_shapes(MODEL), {"weights": "raw", "step": 1}
    write_export(tmp_path / "good", Source(MODEL, lambda name: initial_tensor(name, shapes[name], 0), facts))
    shutil.copytree(tmp_path / "good", tmp_path / "bad")

    def change(tensors: dict) -> None:
        for name in ("blocks.3.mlp.fc1.weight", "x_embedder.proj.bias"):
            tensors[name].view(-1)[[0, -1]] = float("nan")

    edit_weights(tmp_path / "bad", change)
    good, bad, nowhere = (str(tmp_path / name) for name in ("good", "bad", "nowhere"))
    cases = [(1, [good, good]), (0, [bad, bad]), (1, [bad, bad]), (3, [bad, bad]), (1, [good, nowhere])]
    first, second = run_ranks("tests.workers.training:starts", 2, cases=cases)
    assert first == second and first[0] == ""
    found = "4 NaN or infinite values, in 2 tensors: x_embedder.proj.bias (2), blocks.3.mlp.fc1.weight (2). "
    assert all(text.startswith(f"`model.weights` ({bad}) holds {found}") for text in first[1:4])
    assert "nowhere is not an exported model" in first[4]  # a folder that one machine does not see


def test_settings_that_differ_from_the_weights_are_listed(official):
    wanted = open_weights(official, given={"process": "sit", "num_heads": 2}).model
    assert starting_problems(wanted, DiffusionConfig(), official) == []
    assert (
        starting_problems(replace(wanted, compile=True, activation_checkpointing=True), DiffusionConfig(), official)
        == []
    )
    [text] = starting_problems(replace(wanted, num_classes=4), DiffusionConfig(), official)
    assert "has 10" in text and f"import src={official} out=DIR model.num_classes=4" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["`src` is missing", "`out` is missing"]),
        (["src=a", "out=b", "speed=3"], ["`speed` is not a setting of import"]),
        (["src=a.pt", "out=b"], ["a.pt does not exist"]),
        (["src=nowhere", "out=b"], ["nowhere is not an exported model", "it does not exist"]),
        (
            ["src=a", "out=b", "weights=best", "seed=x"],
            ["`weights` must be ema or raw", "`seed` must be a whole number"],
        ),
        (["src=a", "out=b", "model.dephth=3"], ["`model.dephth` is not a setting"]),
        (["src=a", "out=b", "model.depth=many"], ["`model.depth` must be a whole number"]),
    ],
)
def test_import_refuses_by_name(words, expected, capsys):
    text = refused(capsys, import_, *words)
    assert all(part in text for part in expected) and text.count("error: ") >= 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "`run` is missing"),
        (["src=a"], "`out` is missing"),
        (["src=a", "out=b", "run=c"], "`run` is missing"),
        (["src=a", "out=b", "format=onnx"], "`format` must be one of entprune, official, diffusers, got onnx"),
        (["src=a", "out=b", "format=official"], "must end in .pt"),
        (["src=a", "out=b", "vae=c"], "goes with format=diffusers only"),
        (["src=a", "out=b", "model.depth=3"], "`model.depth` cannot be changed by export"),
        (["src=a", "out=b"], "a is not an exported model"),
    ],
)
def test_export_refuses_by_name(words, expected, capsys):
    assert expected in refused(capsys, export, *words)


def test_an_output_that_cannot_be_written_is_refused(official, ours, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(capsys, import_, f"src={official}", f"out={tmp_path / 'file' / 'x'}", *STATED)
    for form, name in (("official", "x.pt"), ("diffusers", "x"), ("entprune", "x")):
        words = [f"src={ours}", f"out={tmp_path / 'file' / name}", f"format={form}"]
        assert "cannot write" in refused(capsys, export, *words)


def test_an_output_that_cannot_be_written_is_refused_before_any_sampling(ours, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drawing, "open_drawer", lambda *_: pytest.fail("it has begun to sample"))
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000000.png").write_text("")
    model = [f"weights={ours}", "sample.num_samples=4"]
    assert "is a file" in refused(capsys, sample, *model, f"out={tmp_path / 'file' / 'x.npz'}")
    for name in ("file", "full"):
        assert "exists already" in refused(capsys, sample, *model, f"out={tmp_path / name}")


def test_latents_are_not_sampled_as_if_they_were_images(tmp_path, capsys):
    torch.save(random_official(depth=2, **(SIZES | {"channels": 4})).state_dict(), tmp_path / "latent.pt")
    words = [f"weights={tmp_path / 'latent.pt'}", f"out={tmp_path / 'x.npz'}", *STATED, "model.in_channels=4"]
    assert "`sample.vae` is missing" in refused(capsys, sample, *words, "model.hidden_size=32")
