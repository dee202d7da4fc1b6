"""The VAE: the package's numbers, latents scaled, what is stored with samples, and clear refusals."""

from __future__ import annotations

import builtins
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from entprune_ds.cli import sample
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.vae import WEIGHTS, load_vae
from tests.test_diffusers import TINY, random_source, tiny_vae


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny random AutoencoderKL."""
    return tiny_vae(tmp_path / "vae")


def test_encode_gives_the_moments_and_decode_undoes_the_scale(folder):
    vae, package = load_vae(str(folder), batch_size=2), AutoencoderKL.from_pretrained(folder).eval()
    pixels = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = vae.encode(pixels)
    with torch.no_grad():
        posterior = package.encode(pixels).latent_dist
        assert moments.shape == (5, 8, 8, 8) and moments.dtype == torch.float32
        torch.testing.assert_close(moments[:, :4], posterior.mean)
        torch.testing.assert_close(moments[:, 4:], posterior.logvar)
        expected = package.decode(posterior.mean).sample
    torch.testing.assert_close(vae.decode(moments[:, :4] * 0.18215), expected, rtol=1e-4, atol=1e-5)
    assert vae.decode(moments[:, :4]).requires_grad is False and expected.shape == (5, 3, 16, 16)


def test_a_folder_is_recorded_by_name_and_digest(folder):
    vae = load_vae(str(folder))
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert vae.protocol == {"vae": "vae", "vae_revision": f"sha256:{digest}", "vae_scaling_factor": 0.18215}


def test_sample_decodes_with_the_vae_and_stores_it_in_the_protocol(folder, tmp_path):
    write_export(tmp_path / "model", random_source(replace(TINY, process="sit", learn_sigma=False)))
    out = tmp_path / "out.npz"
    words = [f"weights={tmp_path / 'model'}", f"out={out}", "sample.num_samples=3", "sample.num_steps=2"]
    assert sample.main([*words, f"sample.vae={folder}"]) == 0
    assert np.load(out)["arr_0"].shape == (3, 16, 16, 3)
    protocol = json.loads((tmp_path / "out_protocol.json").read_text())
    assert protocol["vae"] == "vae" and protocol["vae_revision"].startswith("sha256:")
    assert protocol["vae_scaling_factor"] == 0.18215


def test_other_channels_are_refused(folder):
    with pytest.raises(ValueError, match="decodes 4 channels, the model makes 1"):
        load_vae(str(folder)).decode(torch.zeros(1, 1, 8, 8))


def test_weights_that_do_not_fit_are_listed_not_replaced_by_random_ones(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors | {"odd": torch.zeros(1)}, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing decoder.conv_in.bias; unexpected odd"):
        load_vae(str(folder))


def test_pickled_half_written_and_shifted_vaes_are_refused(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"shift_factor": 0.1}))
    with pytest.raises(ValueError, match="also shifts its latents"):
        load_vae(str(folder))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_vae(str(folder))
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read"):
        load_vae(str(folder))


def test_names_that_cannot_be_found_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Download it on a machine with a network and give its folder"):
        load_vae("nobody/has-this-vae")
    for name in (str(tmp_path / "nowhere"), "./vae", "vae"):
        with pytest.raises(ValueError, match="neither a folder nor a hub name"):
            load_vae(name)


def test_a_missing_extra_is_named(folder, monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name.startswith("diffusers"):
            raise ImportError("No module named 'diffusers'")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'entprune_ds\[vae\]'"):
        load_vae(str(folder))
