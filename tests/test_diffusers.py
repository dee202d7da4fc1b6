"""diffusers folders: the package computes what we compute, reads what we write, and we refuse what we cannot hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from entprune_ds.export import import_model, write_model
from entprune_ds.interop.diffusers import WEIGHTS, open_diffusers
from entprune_ds.interop.diffusers_export import write_diffusers
from entprune_ds.interop.source import Source, keep_blocks, loaded_model
from entprune_ds.interop.weights import open_weights
from entprune_ds.models.dit import DiT
from entprune_ds.models.registry import model_config
from tests.tiny import MODEL

TINY = replace(
    MODEL, process="dit", learn_sigma=True, in_channels=4, input_size=8, kept_blocks=(0, 2, 3), num_classes=1000
)
FACTS = {"weights": "ema", "step": 5, "source_license": "mit"}


def random_source(config=TINY, seed: int = 0) -> Source:
    """A model with every weight random."""
    model, generator = DiT(config), torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(p.shape, generator=generator) * 0.08 for n, p in model.named_parameters()}
    return Source(config, weights.__getitem__, FACTS)


def package_model(folder: Path) -> DiTTransformer2DModel:
    """The package's model; every key must fit."""
    model, report = DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def package_folder(folder: Path, seed: int = 0, shared: bool = True, **changes: object) -> Path:
    """A folder that the package itself wrote, of a model whose blocks share their embedders (as converted ones do)."""
    values = dict(
        num_layers=3, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8
    )
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**(values | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.08)
    if shared:
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(folder)
    return folder


def inputs(channels: int = 4, size: int = 8) -> dict[str, torch.Tensor]:
    """Three examples, the null label among them."""
    z_t = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": z_t, "timestep": torch.tensor([999, 250, 3]), "class_labels": torch.tensor([0, 7, 1000])}


def outputs(source: Source, package: DiTTransformer2DModel, **given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and the package's."""
    with torch.no_grad():
        return loaded_model(source)(*given.values()), package(**given).sample


def refusal(folder: Path, **given: object) -> str:
    """The message with which a folder is refused."""
    with pytest.raises(ValueError) as error:
        open_diffusers(folder, given)
    return str(error.value)


# ---------------------------------------------------------------- the package agrees


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-2])
def test_with_equal_shift_and_eps_the_outputs_agree(norm_eps, tmp_path):
    config = replace(TINY, frequency_shift=1.0, norm_eps=norm_eps)
    source = random_source(config)
    write_diffusers(tmp_path, source)
    ours, theirs = outputs(source, package_model(tmp_path / "transformer"), **inputs())
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_norm_eps_reaches_the_norm_before_the_mlp_alone(tmp_path):
    model = package_model(package_folder(tmp_path, norm_eps=0.25))
    block = model.transformer_blocks[1]
    assert (block.norm1.norm.eps, block.norm3.eps, model.norm_out.eps) == (1e-6, 0.25, 1e-6)
    found = open_diffusers(tmp_path)
    assert found.model.norm_eps == 0.25 and found.model.frequency_shift == 1
    ours, theirs = outputs(found, model, **inputs())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    official = replace(found, model=replace(found.model, norm_eps=1e-6))
    assert (outputs(official, model, **inputs())[0] - theirs).abs().max() > 1e-2


def test_a_small_published_size_of_the_package_agrees(tmp_path):
    config = model_config("DiT-S/2", depth=2, frequency_shift=1.0)
    source = random_source(config)
    write_diffusers(tmp_path, source)
    ours, theirs = outputs(source, package_model(tmp_path / "transformer"), **inputs(size=32))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_deviation_of_an_officially_trained_model_is_measured_printed_and_stored(tmp_path):
    source = random_source()
    _, values, notes = write_diffusers(tmp_path, source)
    ours, theirs = outputs(source, package_model(tmp_path / "transformer"), **inputs())
    really, found = float((ours - theirs).abs().max()), values["deviation"]
    assert really > 0.01 and 0.3 < found["max_abs_difference"] / really < 3  # on other inputs
    assert found["spread"] == pytest.approx(float(ours.std()), rel=0.5)
    assert "frequency_shift 1 instead of 0" in notes[1] and f"{found['max_abs_difference']:.3g}" in notes[1]
    assert json.loads((tmp_path / "transformer" / "entprune_ds.json").read_text())["deviation"] == found
    _, values, notes = write_diffusers(tmp_path / "same", random_source(replace(TINY, frequency_shift=1.0)))
    assert "deviation" not in values and not [n for n in notes if "instead of" in n]


# ---------------------------------------------------------------- there and back


def test_a_folder_of_the_package_comes_back_with_only_num_layers_changed(tmp_path):
    folder = package_folder(tmp_path / "source", num_layers=4, num_embeds_ada_norm=9)
    source = keep_blocks(open_weights(folder), (0, 2))
    write_model(source, tmp_path / "out", "diffusers")
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    before.pop("_diffusers_version")
    assert after == before | {"num_layers": 2}
    old, new = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    assert new.keys() == {k for k in old if ".2." not in k[:21] and ".3." not in k[:21]}
    for name, tensor in new.items():
        assert torch.equal(tensor, old[name.replace("transformer_blocks.1.", "transformer_blocks.2.")]), name


def test_a_pipeline_folder_gives_the_transformer_and_its_licence(tmp_path):
    package_folder(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    (tmp_path / "pipe" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    source = import_model(tmp_path / "pipe", tmp_path / "ours", given={})
    assert source.facts["source_license"] == "cc-by-nc-4.0" and source.facts["source"] == "diffusers folder pipe"
    assert source.model.process == "dit" and source.model.num_heads == 2 and len(source.model.blocks) == 3


def test_official_weights_that_were_only_converted_can_be_told_so(tmp_path):
    found = open_diffusers(package_folder(tmp_path), {"frequency_shift": 0.0, "norm_eps": 1e-6})
    assert (found.model.frequency_shift, found.model.norm_eps) == (0, 1e-6)


def test_a_fine_tuned_export_is_read_as_diffusers_computes_it(tmp_path):
    write_diffusers(tmp_path, random_source())
    assert open_weights(tmp_path).model == TINY  # untouched: what it was trained with
    folder = tmp_path / "transformer"
    package = package_model(folder)
    with torch.no_grad():
        package.proj_out_2.bias += 1
    package.save_pretrained(folder)
    assert open_weights(tmp_path).model.frequency_shift == 1 and open_weights(tmp_path).model.blocks == (0, 1, 2)


# ---------------------------------------------------------------- pipelines


def tiny_vae(folder: Path, channels: int = 4) -> Path:
    """A random AutoencoderKL that doubles the side."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, sample_size=16,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_dit_is_a_pipeline_that_draws_images(tmp_path):
    notes = write_model(random_source(), tmp_path / "out", "diffusers", vae=tiny_vae(tmp_path / "vae"))
    pipe = DiTPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(pipe.scheduler, DDIMScheduler) and not [n for n in notes if "guidance" in n]
    scheduler = pipe.scheduler.config
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.num_train_timesteps) == (1e-4, 0.02, 1000)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1, 2], guidance_scale=1.5, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)


def test_without_a_vae_or_with_other_classes_the_export_says_what_to_do(tmp_path):
    notes = " ".join(write_model(random_source(replace(TINY, num_classes=3)), tmp_path / "out", "diffusers"))
    assert "It has no VAE" in notes and "takes label 1000 for guidance, but this model's null label is 3" in notes
    with pytest.raises(ValueError, match="is not the folder of a VAE"):
        write_model(random_source(), tmp_path / "other", "diffusers", vae=tmp_path / "nowhere")


def test_a_sit_is_a_transformer_only(tmp_path):
    source = random_source(replace(TINY, process="sit", frequency_shift=1.0))
    notes = " ".join(write_model(source, tmp_path, "diffusers"))
    assert "transformer only" in notes and [p.name for p in tmp_path.iterdir()] == ["transformer"]
    given = inputs() | {"timestep": torch.tensor([0.05, 0.5, 0.9])}
    ours, theirs = outputs(source, package_model(tmp_path / "transformer"), **given)
    torch.testing.assert_close(ours, theirs[:, :4], rtol=0, atol=1e-5)
    assert open_weights(tmp_path).model == source.model


# ---------------------------------------------------------------- bad folders


def test_embedders_that_differ_between_blocks_are_refused(tmp_path):
    text = refusal(package_folder(tmp_path, shared=False))
    assert "embedders of blocks [1, 2] differ from those of block 0" in text


def test_missing_extra_and_misshaped_keys_are_all_listed(tmp_path):
    package_folder(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["transformer_blocks.1.attn1.to_k.bias"]
    tensors |= {"transformer_blocks.0.attn2.to_q.bias": torch.zeros(2), "proj_out_2.bias": torch.zeros(3)}
    save_file(tensors, tmp_path / WEIGHTS)
    text = refusal(tmp_path)
    assert "missing transformer_blocks.1.attn1.to_k.bias [32]" in text and text.count(";") == 2
    assert "extra transformer_blocks.0.attn2.to_q.bias [2]" in text
    assert "proj_out_2.bias has shape [3] instead of [32]" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"_class_name": "UNet2DModel"}, "holds a UNet2DModel, not a DiTTransformer2DModel"),
        ({"norm_type": "ada_norm_single"}, "another model than a DiT"),
        ({"num_layers": "three"}, "`model.depth` must be a whole number"),
        ({"patch_size": 2.5}, "`model.patch_size` must be a whole number"),
        ({"num_attention_heads": None}, "lacks a setting or has one of another kind"),
        ({"patch_size": 3}, "impossible architecture"),
        ({"out_channels": 4}, "impossible architecture"),
        ({"num_layers": 4}, "has num_layers 4, but diffusion_pytorch_model.safetensors holds 3 blocks"),
        ({"num_layers": 2}, "has num_layers 2, but diffusion_pytorch_model.safetensors holds 3 blocks"),
    ],
)
def test_other_models_and_impossible_settings_are_refused(change, expected, tmp_path):
    package_folder(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert expected in refusal(tmp_path) and str(tmp_path) in refusal(tmp_path)


def test_a_depth_that_differs_from_the_stored_blocks_is_refused_with_both(tmp_path):
    write_diffusers(tmp_path / "export", random_source())
    folder = tmp_path / "export" / "transformer"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 5}))
    assert "has num_layers 5, but diffusion_pytorch_model.safetensors holds 3 blocks" in refusal(tmp_path / "export")
    beside = (folder / "entprune_ds.json").read_text()
    package_folder(folder, num_layers=2)  # weights of another depth saved over it, the description left
    assert (folder / "entprune_ds.json").read_text() == beside
    text = refusal(tmp_path / "export")
    assert "has num_layers 2, but entprune_ds.json beside it has kept_blocks [0, 2, 3]: 3 blocks" in text
    (folder / "entprune_ds.json").unlink()
    assert open_diffusers(tmp_path / "export").model.blocks == (0, 1)


def test_pickled_damaged_and_half_written_folders_are_refused(tmp_path):
    package_folder(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert "it is damaged" in refusal(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")
    assert "only safetensors in one file are read" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(tmp_path)


def test_another_input_size_is_refused_with_a_remedy(tmp_path):
    text = refusal(package_folder(tmp_path), input_size=16)
    assert "`model.input_size` is 16" in text and "has 8" in text and "not interpolated" in text
