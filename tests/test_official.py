"""Official .pt files: what goes in comes out, the official code loads it, and every fault is one sentence."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from entprune_ds.export import import_model, write_model
from entprune_ds.interop.diffusers_export import write_diffusers
from entprune_ds.interop.official import open_official, write_official
from entprune_ds.interop.source import Source, keep_blocks, loaded_model
from entprune_ds.interop.weights import open_weights
from entprune_ds.models.registry import model_config
from tests.reference.official import OfficialDiT, random_official

TINY = dict(width=32, heads=2, size=8, channels=2, classes=5)
GIVEN = {"process": "dit", "num_heads": 2}


def inputs(process: str = "dit", channels: int = 4, size: int = 32, classes: int = 1000) -> tuple[torch.Tensor, ...]:
    """Three examples: z_t, timesteps or t, labels with the null label among them."""
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(3, channels, size, size, generator=generator)
    t = torch.tensor([999, 250, 3]) if process == "dit" else torch.tensor([0.02, 0.5, 0.97])
    return z_t, t, torch.tensor([0, classes - 1, classes])


def output(source: Source, *given: torch.Tensor) -> torch.Tensor:
    """Output of our model."""
    return loaded_model(source)(*given)


def saved(tmp_path: Path, content: object) -> Path:
    """A .pt file."""
    torch.save(content, tmp_path / "official.pt")
    return tmp_path / "official.pt"


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    """State dict of a tiny official model of 3 blocks."""
    return random_official(depth=3, **TINY).state_dict()


def refusal(path: Path, weights: str | None = None, **given: object) -> str:
    """The message with which a file is refused."""
    with pytest.raises(ValueError) as error:
        open_official(path, weights, GIVEN | given)
    return str(error.value)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("process", ["dit", "sit"])
def test_round_trip_of_a_small_model_through_every_format(process, tmp_path):
    original = random_official(depth=12, sit=process == "sit")
    path = saved(tmp_path, original.state_dict())
    full = import_model(path, tmp_path / "ours", given={"process": process}, source_license="cc-by-nc-4.0")
    name = "DiT-S/2" if process == "dit" else "SiT-S/2"
    assert full.model == model_config(name, kept_blocks=None)
    given = inputs(process)
    with torch.no_grad():
        torch.testing.assert_close(output(full, *given), original(*given), rtol=1e-5, atol=2e-5)

        kept = (0, 2, 3, 7, 11)
        pruned = keep_blocks(open_weights(tmp_path / "ours"), kept)
        expected = output(pruned, *given)
        write_model(pruned, tmp_path / "small.pt", "official")
        write_model(pruned, tmp_path / "diffusers", "diffusers")
        for again in (tmp_path / "small.pt", tmp_path / "diffusers", tmp_path / "diffusers" / "transformer"):
            found = open_weights(again)
            assert found.model == replace(full.model, kept_blocks=kept)
            assert found.facts["source_license"] == "cc-by-nc-4.0" and found.facts["weights"] == "plain"
            assert torch.equal(output(found, *given), expected), again

        small = OfficialDiT(depth=5, sit=process == "sit")  # the official code, with only its depth changed
        small.load_state_dict(torch.load(tmp_path / "small.pt", weights_only=True), strict=True)
        original.blocks = torch.nn.ModuleList([original.blocks[i] for i in kept])
        assert torch.equal(small(*given), original(*given))


def test_a_pruned_file_carries_its_provenance_and_without_it_counts_from_zero(tiny, tmp_path):
    source = keep_blocks(open_official(saved(tmp_path, tiny), given=GIVEN), (0, 2))
    out, values, notes = write_official(tmp_path / "pruned.pt", replace(source, facts=source.facts | {"commit": "abc"}))
    beside = json.loads((tmp_path / "pruned.json").read_text())
    assert beside == json.loads(json.dumps(values)) and beside["kept_blocks"] == [0, 2] and beside["commit"] == "abc"
    assert beside["source_license"] == "not stated" and len(beside["config_digest"]) == 64
    assert "depth=2" in notes[0]
    state = torch.load(out, weights_only=True)
    assert [k for k in state if "attn.qkv.weight" in k] == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]
    assert torch.equal(state["blocks.1.attn.qkv.weight"], tiny["blocks.2.attn.qkv.weight"])
    assert state.keys() == {k for k in tiny if not k.startswith("blocks.2.")}
    assert (
        out.stat().st_size < 1.1 * sum(4 * v.numel() for v in state.values()) + 20_000
    )  # no tensor drags its file along
    assert open_weights(out).model.blocks == (0, 2)
    (tmp_path / "pruned.json").unlink()
    assert open_official(out, given=GIVEN).model.blocks == (0, 1)


def test_a_description_of_other_weights_or_blocks_is_not_believed(tiny, tmp_path):
    source = open_official(saved(tmp_path, tiny), given=GIVEN)
    write_official(tmp_path / "a.pt", keep_blocks(source, (0, 2)))
    write_official(tmp_path / "b.pt", keep_blocks(source, (1, 2)))
    (tmp_path / "b.pt").replace(tmp_path / "a.pt")  # a.json still says blocks 0 and 2
    assert open_official(tmp_path / "a.pt", given=GIVEN).model.blocks == (0, 1)
    (tmp_path / "a.json").write_text('{"my": "notes"}')
    assert open_official(tmp_path / "a.pt", given=GIVEN).model.blocks == (0, 1)


def test_a_training_checkpoint_gives_ema_or_raw_and_says_what_it_is(tiny, tmp_path):
    raw = {k: v + 1 if k != "pos_embed" else v for k, v in tiny.items()}
    arguments = argparse.Namespace(
        model="SiT-XL/2", path_type="GVP", prediction="velocity", loss_weight=None, data_path="/home/x", global_seed=0
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict()
    path = saved(tmp_path, {"model": raw, "ema": tiny, "opt": optimizer, "args": arguments})
    ema = open_official(path, given={"num_heads": 2})
    assert ema.model.process == "sit" and ema.facts["weights"] == "ema"
    assert ema.facts["trained_with"] == {"model": "SiT-XL/2", "path_type": "GVP", "prediction": "velocity"}
    assert "diffusion.path=gvp" in " ".join(ema.notes) and "/home/x" not in json.dumps(ema.facts)
    name = "blocks.1.mlp.fc1.bias"
    assert torch.equal(ema.read(name), tiny[name])
    assert torch.equal(open_official(path, "raw", {"num_heads": 2}).read(name), raw[name])
    assert "was trained as SiT-XL/2, but `model.process` is dit" in refusal(path)
    del raw["pos_embed"]
    only = saved(tmp_path, {"model": raw, "args": None})
    assert "holds no ema weights. Choose weights=raw" in refusal(only, "ema")
    plain = saved(tmp_path, tiny)
    assert "one set of weights" in refusal(plain, "ema")


def test_a_safetensors_file_with_the_same_names_is_the_same_model(tiny, tmp_path):
    save_file(tiny, tmp_path / "official.safetensors")
    found = open_weights(tmp_path / "official.safetensors", given=GIVEN)
    assert found.model == open_official(saved(tmp_path, tiny), given=GIVEN).model
    assert all(torch.equal(found.read(name), tiny[name]) for name in found.shapes)
    without = {k: v for k, v in tiny.items() if k != "pos_embed"}
    save_file(without, tmp_path / "official.safetensors")
    assert "Give model.input_size" in refusal(tmp_path / "official.safetensors")
    assert open_official(tmp_path / "official.safetensors", given=GIVEN | {"input_size": 8}).model.input_size == 8


def test_half_precision_weights_become_single_precision(tiny, tmp_path):
    path = saved(tmp_path, {k: v.half() if k != "pos_embed" else v for k, v in tiny.items()})
    found = open_official(path, given=GIVEN).read("blocks.0.mlp.fc1.weight")
    assert found.dtype == torch.float32 and torch.equal(found, tiny["blocks.0.mlp.fc1.weight"].half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["pt", "safetensors", "saved again in fp32"])
def test_positions_rounded_to_16_bits_are_the_fixed_ones_and_others_are_not(tiny, tmp_path, dtype, form):
    state = {k: v.to(dtype) for k, v in tiny.items()}
    learned = state | {"pos_embed": (tiny["pos_embed"] + 3 * torch.finfo(dtype).eps).to(dtype)}
    for content, good in ((state, True), (learned, False)):
        again = {k: v.float() for k, v in content.items()} if form == "saved again in fp32" else content
        path = saved(tmp_path, again)
        if form == "safetensors":
            path = path.with_suffix(".safetensors")
            save_file(again, path)
        if good:
            read = open_official(path, given=GIVEN).read
            assert torch.equal(read("x_embedder.proj.weight"), state["x_embedder.proj.weight"].float())
        else:
            assert "pos_embed differs from the fixed sin-cos positions" in refusal(path)


def test_positions_in_single_precision_are_held_to_the_formula(tiny, tmp_path):
    noise = torch.rand(tiny["pos_embed"].shape, generator=torch.Generator().manual_seed(0)) * 4e-4
    text = refusal(saved(tmp_path, tiny | {"pos_embed": tiny["pos_embed"] + noise}))  # fp16 would be as far off
    assert "pos_embed differs" in text


# ---------------------------------------------------------------- changes on the way


def test_another_class_count_makes_the_label_table_anew_and_keeps_the_null_label(tiny, tmp_path):
    path, table = saved(tmp_path, tiny), "y_embedder.embedding_table.weight"
    found = import_model(path, tmp_path / "a", given=GIVEN | {"num_classes": 3}, seed=7)
    again = import_model(path, tmp_path / "b", given=GIVEN | {"num_classes": 3}, seed=7)
    assert "label table was made anew for 3 classes instead of 5 (random, seed 7)" in " ".join(found.notes)
    weights = open_weights(tmp_path / "a")
    assert weights.model.num_classes == 3 and weights.read(table).shape == (4, 32)
    assert torch.equal(weights.read(table), again.read(table))
    assert torch.equal(weights.read(table)[3], tiny[table][5])
    assert not torch.equal(weights.read(table)[0], tiny[table][0]) and 0.005 < weights.read(table)[:3].std() < 0.04
    other = import_model(path, tmp_path / "c", given=GIVEN | {"num_classes": 3}, seed=8)
    assert not torch.equal(other.read(table), found.read(table))
    assert weights.facts["label_table"] == "new for 3 classes, seed 7"


def test_blocks_dropped_on_import_keep_their_original_numbers(tiny, tmp_path):
    import_model(saved(tmp_path, tiny), tmp_path / "ours", given=GIVEN | {"kept_blocks": (1, 2)})
    found = open_weights(tmp_path / "ours")
    assert (found.model.depth, found.model.blocks) == (3, (1, 2))
    assert torch.equal(found.read("blocks.2.mlp.fc2.weight"), tiny["blocks.2.mlp.fc2.weight"])
    with pytest.raises(ValueError, match=r"got \[0, 2\]; the source has blocks \[1, 2\]"):
        keep_blocks(found, (0, 2))


def test_weights_of_diffusers_formulas_say_how_far_the_official_code_is_off(tiny, tmp_path):
    given = GIVEN | {"frequency_shift": 1.0, "norm_eps": 1e-5}
    source = open_official(saved(tmp_path, tiny), given=given)
    _, values, notes = write_official(tmp_path / "x.pt", source)
    z_t, t, labels = inputs(channels=2, size=8, classes=5)
    with torch.no_grad():
        off = OfficialDiT(depth=3, **TINY)
        off.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
        really = (off(z_t, t, labels) - output(source, z_t, t, labels)).abs().max()
    assert really > 0 and 0.2 < values["deviation"]["max_abs_difference"] / float(really) < 5  # on other inputs
    assert "frequency_shift 0 instead of 1, norm_eps 1e-06 instead of 1e-05" in notes[1]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_prefix_of_a_wrapper_is_taken_off_with_a_note(tiny, tmp_path, prefix):
    wrapped = {prefix + k: v for k, v in tiny.items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    for path in (saved(tmp_path, wrapped), tmp_path / "wrapped.safetensors"):
        found, parts = open_official(path, given=GIVEN), prefix.split(".")[:-1]
        assert len(found.notes) == len(parts)
        assert all(f"began with `{part}.`" in note for part, note in zip(parts, found.notes, strict=True))
        assert all(torch.equal(found.read(name), tiny[name]) for name in found.shapes)
    mixture = saved(tmp_path, {"model": wrapped, "ema": tiny, "args": None})
    assert open_official(mixture, given=GIVEN).notes == () and open_official(mixture, "raw", GIVEN).notes != ()


def test_a_prefix_on_some_of_the_names_is_refused_with_the_others(tiny, tmp_path):
    mixed = {k if k.startswith("final_layer.linear") else "module." + k: v for k, v in tiny.items()}
    text = refusal(saved(tmp_path, mixed))
    assert f"{len(tiny) - 2} of {len(tiny)} names begin with `module.`, the others do not: " in text
    assert "final_layer.linear.bias, final_layer.linear.weight. Save" in text


# ---------------------------------------------------------------- what the file cannot say


def test_process_and_unpublished_heads_must_be_stated(tiny, tmp_path):
    path = saved(tmp_path, tiny)
    with pytest.raises(ValueError) as error:
        open_official(path)
    assert "model.process=dit or model.process=sit" in str(error.value) and "model.num_heads=N" in str(error.value)
    assumed = open_official(path, assumed=model_config("DiT-S/2", num_heads=4))
    assert (assumed.model.process, assumed.model.num_heads) == ("dit", 4)
    assert "taken from model.num_heads=4" in assumed.notes[0] and "taken from model.process=dit" in assumed.notes[1]


def test_another_input_size_is_refused_with_a_remedy(tiny, tmp_path):
    text = refusal(saved(tmp_path, tiny), input_size=16)
    assert (
        "`model.input_size` is 16" in text and "has 8" in text and "not interpolated: use latents of that size" in text
    )


def test_a_setting_that_the_shapes_contradict_is_refused(tiny, tmp_path):
    text = refusal(saved(tmp_path, tiny), hidden_size=64, depth=4)
    assert "`model.hidden_size` is 64" in text and "has 32" in text and "`model.depth` is 4" in text


# ---------------------------------------------------------------- bad files


def test_missing_extra_and_misshaped_keys_are_all_listed(tiny, tmp_path):
    state = dict(tiny)
    del state["blocks.1.mlp.fc1.bias"]
    state["blocks.0.attn.q_norm.weight"] = torch.zeros(16)
    state["final_layer.linear.bias"] = torch.zeros(3)
    text = refusal(saved(tmp_path, state))
    assert "missing blocks.1.mlp.fc1.bias [128]" in text and "extra blocks.0.attn.q_norm.weight [16]" in text
    assert "final_layer.linear.bias has shape [3] instead of [16]" in text and text.count(";") == 2


def test_another_kind_of_model_is_refused_by_its_names(tmp_path):
    text = refusal(saved(tmp_path, {"conv_in.weight": torch.zeros(3, 3)}))
    assert "is no DiT or SiT of the official code" in text and "conv_in.weight" in text


def test_an_absurd_architecture_is_refused_before_anything_is_built(tiny, tmp_path):
    state = tiny | {"blocks.99999999999.mlp.fc1.weight": torch.zeros(128, 32)}
    assert "`model.depth` must be at most" in refusal(saved(tmp_path, state))
    wide = tiny | {"x_embedder.proj.weight": torch.zeros(0, 2, 2, 2)}
    assert "no DiT or SiT" in refusal(saved(tmp_path, wide))


def test_learned_positions_are_refused(tiny, tmp_path):
    text = refusal(saved(tmp_path, tiny | {"pos_embed": tiny["pos_embed"] + 0.01}))
    assert "pos_embed differs from the fixed sin-cos positions by up to 0.01" in text
    assert "differs" in refusal(saved(tmp_path, tiny | {"pos_embed": tiny["pos_embed"] * float("nan")}))


class Foreign:
    """An object that a plain state dict does not hold."""


@pytest.mark.parametrize("where", ["a value", "the args"])
def test_pickles_of_other_objects_are_refused_and_never_built(tiny, tmp_path, where):
    content = tiny | {"x": Foreign()} if where == "a value" else {"model": tiny, "args": Foreign()}
    text = refusal(saved(tmp_path, content))
    assert "not unpickled" in text and "Foreign" in text


@pytest.mark.parametrize(
    "value", [3, "text", torch.arange(3), torch.eye(3).to_sparse(), torch.zeros(4, 4).t()[1:], None]
)
def test_entries_that_are_no_plain_tensors_are_named(tiny, tmp_path, value):
    assert "not plain floating-point tensors: odd" in refusal(saved(tmp_path, tiny | {"odd": value}))


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3)])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content):
    assert "not a state dict" in refusal(saved(tmp_path, content))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_half_written_files_are_refused_by_name(tiny, tmp_path, share):
    path = saved(tmp_path, tiny)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    text = refusal(path)
    assert str(path) in text and any(why in text for why in ("damaged", "is empty"))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700000000\n"
MISTAKEN = {
    b"": ("is empty (0 bytes)", "Copy it again from its source"),
    LFS: ("is a git-lfs pointer of 75 bytes", "Run `git lfs pull`"),
    b"\n <!DOCTYPE html><html><title>Sign in</title>": ("is an HTML or XML page", "Open its address in a browser"),
    b"<Error><Code>AccessDenied</Code></Error>": ("is an HTML or XML page", "download the file again"),
    b'{"error": "Repository not found"}': (
        'is a text file (\'{"error": "Repository not found"}\'',
        "Download it again",
    ),
    b"\x1f\x8b\x08\x00rest": ("is a compressed file", "Unpack it first"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", MISTAKEN)
def test_a_file_that_is_something_else_is_called_what_it_is(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    text = refusal(path)
    assert all(part in text for part in (str(path), *MISTAKEN[content])), text


def test_files_of_another_format_under_the_wrong_name_are_called_what_they_are(tiny, tmp_path):
    torch.save(tiny, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    text = refusal(tmp_path / "old.pt")
    assert "has the format of torch before 1.6" in text and "Save it again: python -c " in text
    command = text.split("python -c ")[1].strip('"')
    subprocess.run([sys.executable, "-c", command], check=True, timeout=60)
    read = open_official(tmp_path / "old.pt", given=GIVEN).read
    assert torch.equal(read("final_layer.linear.bias"), tiny["final_layer.linear.bias"])
    saved(tmp_path, tiny).rename(tmp_path / "a.safetensors")
    assert "is a .pt (zip) file. Rename it to end in .pt." in refusal(tmp_path / "a.safetensors")
    save_file(tiny, tmp_path / "b.pt")
    assert "is a safetensors file. Rename it to end in .safetensors." in refusal(tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes(b"\x80\x04\x95 a pickle of something else")
    assert "it does not begin as a .pt file does" in refusal(tmp_path / "b.pt")


def test_a_failed_export_leaves_the_older_file(tiny, tmp_path, monkeypatch):
    source = open_official(saved(tmp_path, tiny), given=GIVEN)
    write_official(tmp_path / "x.pt", source)
    before = (tmp_path / "x.pt").read_bytes()

    def broken(_: object, path: Path) -> None:
        path.write_bytes(before[:1000])
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space left"):
        write_official(tmp_path / "x.pt", source)
    assert (tmp_path / "x.pt").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if "writing" in p.name]


def test_what_diffusers_cannot_hold_is_refused(tiny, tmp_path):
    source = open_official(saved(tmp_path, tiny), given=GIVEN)
    wide = replace(source, model=replace(source.model, mlp_ratio=2.0))
    with pytest.raises(ValueError, match="mlp_ratio 4 only"):
        write_diffusers(tmp_path / "d", wide)
    assert not (tmp_path / "d").exists()
