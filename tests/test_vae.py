"""The VAE: the package's numbers, latents scaled, what is stored with samples, and clear refusals."""

from __future__ import annotations

import builtins
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from entprune_ds.cli import sample
from entprune_ds.data.shards import write_shards
from entprune_ds.evaluation.images import save_grid
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.vae import WEIGHTS, load_vae
from tests.ranks import run_ranks
from tests.test_diffusers import TINY, random_source, tiny_vae
from tests.test_training import TINY as TINY_RUN


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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of a model hub that a download needs: every repository holds the files of `folder`."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.folder / self.path.split("?")[0].rsplit("/", 1)[-1]
        content = path.read_bytes() if path.is_file() and "/resolve/" in self.path else b""
        self.send_response(200 if content else 404)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{path.name}"', "Content-Length": str(len(content))}
        for key, value in (headers | ({} if content else {"X-Error-Code": "EntryNotFound"})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content if body else b"")

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def hub_at(monkeypatch, tmp_path) -> Callable[[int], None]:
    """A function that makes a port of this machine the model hub, with an empty cache of downloads."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)

    def use(port: int) -> None:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    return use


def test_a_vae_of_the_hub_is_downloaded_once_and_needs_no_network_after(folder, hub_at):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub_at(server.server_address[1])
    first = load_vae("someone/tiny-vae")
    assert (first.name, first.revision) == ("someone/tiny-vae", COMMIT)
    moments = load_vae(str(folder)).encode(torch.ones(1, 3, 16, 16))
    assert torch.equal(first.encode(torch.ones(1, 3, 16, 16)), moments)
    server.shutdown()
    server.server_close()
    again = load_vae("someone/tiny-vae")  # nobody answers
    assert again.revision == COMMIT and torch.equal(again.encode(torch.ones(1, 3, 16, 16)), moments)


@pytest.mark.parametrize("kind", ["nobody answers", "connections hang"])
def test_a_hub_that_cannot_be_reached_is_said_at_once(hub_at, monkeypatch, kind):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "connections hang":
            listener.listen()
        hub_at(listener.getsockname()[1])
        start = time.monotonic()
        with pytest.raises(ValueError) as error:
            load_vae("someone/tiny-vae")
    assert time.monotonic() - start < 6  # the client's own six attempts take 25 s and more
    assert "cannot be loaded (the hub cannot be reached: " in str(error.value)
    assert "Download it on a machine with a network and give its folder." in str(error.value)


def test_a_vae_whose_weights_are_a_pointer_is_called_that(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3000\n")
    with pytest.raises(ValueError, match=r"is a git-lfs pointer .* Run `git lfs pull`"):
        load_vae(str(folder))


def test_a_missing_extra_is_named(folder, monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name.startswith("diffusers"):
            raise ImportError("No module named 'diffusers'")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'entprune_ds\[vae\]'"):
        load_vae(str(folder))


def test_a_run_of_latents_decodes_its_sample_grids_and_says_how_to_get_them(folder, tmp_path):
    """The final grid is what `sample` draws from the exported model; a VAE that does not fit costs grids only."""
    generator = torch.Generator().manual_seed(0)
    latents = ((f"{i:03d}", torch.randn(4, 8, 8, generator=generator).numpy(), i % 10, {}) for i in range(64))
    write_shards(latents, tmp_path / "data", 8, {"source": "noise"}, num_classes=10)
    own = ["model.in_channels=4", "train.num_steps=2", "train.validate_every=0", "prune.target_depth=null"]
    common = [*TINY_RUN, *own, f"data.shards={tmp_path}/data", f"run.root={tmp_path}", "monitor.sample_every=1"]
    wrong = tiny_vae(tmp_path / "wrong", channels=3)
    runs = [[*common, f"run.name={name}", *more] for name, more in (
        ("decoded", [f"sample.vae={folder}"]), ("bare", []), ("wrong", [f"sample.vae={wrong}"]),
    )]  # fmt: skip
    said = run_ranks("tests.workers.training:train_and_hear", 2, runs=runs)
    assert [[status for status, _ in rank] for rank in said] == [[0, 0, 0]] * 2
    decoded, bare, other = (text for _, text in said[0])
    grids = ["step_00000001_training.png", "step_00000002_final.png", "step_00000002_training.png"]
    assert sorted(p.name for p in (tmp_path / "decoded" / "samples").iterdir()) == grids
    assert "no sample grids" not in decoded and not list((tmp_path / "bare").glob("samples/*"))
    assert bare.count("no sample grids: the model makes latents of 4 channels") == 1 and "sample.vae=FOLDER" in bare
    assert other.count("decodes 3 channels, the model makes 4") == 3 and not list(tmp_path.glob("wrong/samples/*"))

    out, settings = tmp_path / "s.npz", ["sample.num_samples=4", "sample.labels=balanced"]
    assert sample.main([f"run={tmp_path}/decoded", f"out={out}", *settings]) == 0
    save_grid(np.load(out)["arr_0"], tmp_path / "expected.png")
    drawn, expected = (
        np.asarray(Image.open(p)).astype(int)
        for p in (tmp_path / "decoded" / "samples" / grids[1], tmp_path / "expected.png")
    )
    assert drawn.shape == expected.shape and np.abs(drawn - expected).max() <= 1 and expected.std() > 5
