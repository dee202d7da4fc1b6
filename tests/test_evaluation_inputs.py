"""`evaluate` with extractors and references of all kinds: what goes together, what is refused, what is written."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cleanfid.inception_pytorch as pytorch_inception
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from entprune_ds.cli.evaluate import main as evaluate
from entprune_ds.cli.evaluate_data import model_problem
from entprune_ds.cli.sample import main as sample
from entprune_ds.data.shards import write_shards
from entprune_ds.evaluation import fetch, references
from entprune_ds.evaluation.extractor import Extracted, load_own
from entprune_ds.evaluation.figures import lacking
from entprune_ds.evaluation.inception import load_inception, load_pytorch_inception
from entprune_ds.evaluation.npz import member_names, open_member
from tests.ranks import run_ranks
from tests.reference.inception import save_small_inception
from tests.test_sampling import random_model

SETTINGS = [
    "sample.num_samples=31", "sample.batch_size=8", "sample.num_steps=2", "evaluate.extractor=inception",
    "evaluate.latency_batches=[1]", "evaluate.latency_repeats=1", "evaluate.batch_size=9",
]  # fmt: skip
OWN = """
import numpy as np
from entprune_ds.evaluation.extractor import Extracted, ImageExtractor

def extract(images):
    return Extracted(images.reshape(len(images), -1, 3).mean(axis=1) / 255.0)

EXTRACTOR = ImageExtractor(name="mean colours", extract=extract)
"""


class Tuple16(torch.nn.Module):
    """Features (n,16) and logits (n,2) of images (n,3,H,W), as a user's torchscript file may give them."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.flatten(1)[:, :16] / 255, x.mean(dim=[2, 3])[:, :2]


class Dictionary(torch.nn.Module):
    """What many exported networks return."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": x.flatten(1)}


class Three(torch.nn.Module):
    """One tensor too many."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return x, x, x


class Fixed(torch.nn.Module):
    """Images of 16 x 16 only, as a network with a learned position for every patch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(16 * 16 * 3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


class Coarse(torch.nn.Module):
    """Colours in bfloat16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.mean(dim=[2, 3]) / 255).to(torch.bfloat16)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> dict[str, str]:
    """A model of 8x8 colour images, its samples, real pictures, and a small Inception."""
    folder = tmp_path_factory.mktemp("bench")
    model = random_model(folder / "model", input_size=8, in_channels=3)
    pictures = folder / "real"
    pictures.mkdir()
    for number, image in enumerate(np.rint(load_digits().images[:40] / 16 * 255).astype(np.uint8)):
        Image.fromarray(np.stack([image, image.T, 255 - image], axis=2)).save(pictures / f"{number:02d}.png")
    network = save_small_inception(folder / "inception-2015-12-05.pt")
    samples = folder / "samples.npz"
    assert sample([f"weights={model}", f"out={samples}", *SETTINGS[:3]]) == 0
    return {"model": str(model), "real": str(pictures), "net": str(network), "samples": str(samples)}


def words(bench: dict[str, str], out: Path, *more: str) -> list[str]:
    """Command line of an evaluation of the samples against the pictures."""
    own = [f"weights={bench['model']}", f"evaluate.inception={bench['net']}", f"evaluate.reference={bench['real']}"]
    return [*own, f"evaluate.samples={bench['samples']}", f"out={out}", *SETTINGS, *more]


def refused(capsys, command: list[str]) -> str:
    """What a refused evaluation says, after a look that nothing was written."""
    capsys.readouterr()
    out = next(Path(word.removeprefix("out=")) for word in command if word.startswith("out="))
    assert evaluate(command) == 2 and not out.exists() and not list(out.parent.glob("samples_*"))
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error, error
    return error


def test_figures_carry_what_they_depend_on_and_ranks_change_nothing(bench, tmp_path, capsys):
    out, stored = tmp_path / "one.json", tmp_path / "stats.npz"
    drawing = [word for word in words(bench, out) if not word.startswith(("evaluate.samples", "out="))]
    table = ["evaluate.latency_table=true", "evaluate.latency_depths=[2,1]", "evaluate.latency_precisions=[fp32,bf16]"]
    assert evaluate(words(bench, out, f"evaluate.save_reference={stored}", *table)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    one = json.loads(out.read_text())
    two = tmp_path / "two" / "two.json"
    two.parent.mkdir()
    assert run_ranks("tests.workers.sampling:run", 2, commands=[["evaluate", *drawing, f"out={two}"]]) == [[0], [0]]
    second = json.loads(two.read_text())
    assert [p.name for p in two.parent.iterdir()] == ["two.json"]  # what was drawn on the way is gone
    for key in ("fid", "kid", "inception_score", "precision", "recall"):
        assert second["pruned"][key] == pytest.approx(one["pruned"][key], rel=1e-6, abs=1e-9), key
    assert second["pruned"]["images_digest"] == one["pruned"]["images_digest"]
    protocol = one["protocol"]
    wanted = {
        "num_samples": 31, "labels": "uniform", "cfg_scale": 1.0, "sampler": "euler", "num_steps": 2, "weights": "ema",
        "vae": "none (pixels)", "tf32": False, "seed": 0, "resize_mode": "legacy_tensorflow", "kid_seed": 0,
    }  # fmt: skip
    assert {key: protocol[key] for key in wanted} == wanted and len(protocol["extractor_digest"]) == 16
    for key, value in wanted.items():
        assert f"{key} {value}" in shown or key == "num_samples", key
    assert "31 samples, 40 images" in shown and "not measured: sfid: 2024 samples or more" in shown
    assert protocol["not_measured"] == {"sfid": "2024 samples or more are needed, got 31"}
    rows = one["latency_table"]
    assert [(r["depth"], r["precision"]) for r in rows] == [(2, "fp32"), (2, "bf16"), (1, "fp32"), (1, "bf16")]
    assert rows[0]["speedup"] == 1 and rows[0]["parameters"] > rows[2]["parameters"] and rows[0]["macs"] > 0
    lines = (tmp_path / "one_latency.md").read_text().splitlines()
    assert len(lines) == 4 + len(rows) and lines[4].startswith(f"| 2 | {rows[0]['parameters']:,} |")

    about = json.loads(str(open_member(stored, "about")))
    assert about["count"] == 40 and about["resolution"] == [8, 8, 3] and len(about["digest"]) == 16
    assert {"mu", "sigma", "mu_s", "sigma_s", "features"} <= set(member_names(stored))
    again = tmp_path / "again.json"
    assert evaluate(words(bench, again, f"evaluate.reference={stored}")) == 0
    found = json.loads(again.read_text())
    for key in ("fid", "kid", "precision", "recall"):
        assert found["pruned"][key] == pytest.approx(one["pruned"][key], rel=1e-9), key
    assert found["protocol"]["reference_about"] == about


def test_figures_do_not_depend_on_whether_the_reference_was_saved(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "KEPT", 25)  # below the 40 pictures
    stored, found = tmp_path / "stats.npz", {}
    assert evaluate(words(bench, tmp_path / "pictures.json", f"evaluate.save_reference={stored}")) == 0
    assert evaluate(words(bench, tmp_path / "file.json", f"evaluate.reference={stored}")) == 0
    for name in ("pictures", "file"):
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
        about = found[name]["protocol"]["reference_about"]
        assert (about["count"], about["features"]) == (40, 25)
    for key in ("fid", "kid", "precision", "recall"):
        assert found["file"]["pruned"][key] == pytest.approx(found["pictures"]["pruned"][key], rel=1e-9), key
    with_images = tmp_path / "images.npz"
    images = np.stack([np.asarray(Image.open(p)) for p in sorted(Path(bench["real"]).iterdir())])
    np.savez(with_images, arr_0=images, mu=np.zeros(16), sigma=np.eye(16), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    assert evaluate(words(bench, tmp_path / "images.json", f"evaluate.reference={with_images}")) == 0
    by_images = json.loads((tmp_path / "images.json").read_text())
    assert by_images["protocol"]["reference_about"]["features"] == 25
    for key in ("kid", "precision", "recall"):
        assert by_images["pruned"][key] == pytest.approx(found["pictures"]["pruned"][key], rel=1e-9), key


def test_references_that_do_not_fit_are_refused_before_work_starts(bench, tmp_path, capsys):
    stored, out = tmp_path / "stats.npz", tmp_path / "out.json"
    assert evaluate(words(bench, tmp_path / "x.json", f"evaluate.save_reference={stored}", "evaluate.mode=clean")) == 0
    other = save_small_inception(tmp_path / "other.pt", seed=1)
    wide = save_small_inception(tmp_path / "wide.pt", width=40)
    reference = f"evaluate.reference={stored}"
    clean = [reference, "evaluate.mode=clean"]
    assert "was made with resize_mode clean" in refused(capsys, words(bench, out, reference))
    assert "extractor_digest" in refused(capsys, words(bench, out, *clean, f"evaluate.inception={other}"))
    assert "holds 16 features" in refused(capsys, words(bench, out, *clean, f"evaluate.inception={wide}"))
    assert "too few for 40 features" in refused(capsys, words(bench, out, f"evaluate.inception={wide}"))
    small = random_model(tmp_path / "small", input_size=4, in_channels=3)
    drawn = [f"weights={small}", "evaluate.samples="]
    error = refused(capsys, words(bench, out, *clean, *drawn))
    assert "are [4, 4, 3], the real images [8, 8, 3]" in error and "of one size" in error
    few = ["evaluate.samples=", "sample.num_samples=16"]
    assert "fid: 17 samples or more are needed for 16 features, got 16" in refused(capsys, words(bench, out, *few))
    for path, message in (
        ("absent.npz", "does not exist"), ("bad.npz", "cannot be read as an npz"), ("odd.npz", "must hold mu"),
    ):  # fmt: skip
        (tmp_path / "bad.npz").write_bytes(b"PK")
        np.savez(tmp_path / "odd.npz", x=np.zeros(3))
        assert message in refused(capsys, words(bench, out, f"evaluate.reference={tmp_path / path}"))
    adm = tmp_path / "adm.npz"
    np.savez(adm, mu=np.zeros(16), sigma=np.eye(16), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    error = refused(capsys, words(bench, out, f"evaluate.reference={adm}", "evaluate.mode=clean"))
    assert "Set evaluate.mode=legacy_tensorflow" in error
    error = refused(capsys, words(bench, out, f"evaluate.reference={adm}", "evaluate.metrics=[kid]"))
    assert "kid: the reference holds neither features nor images" in error
    assert evaluate(words(bench, out, f"evaluate.reference={adm}")) == 0
    found = json.loads(out.read_text())
    assert set(found["protocol"]["not_measured"]) == {"kid", "precision_recall", "sfid"} and "fid" in found["pruned"]
    images = np.stack([np.asarray(Image.open(p)) for p in sorted(Path(bench["real"]).iterdir())])
    np.savez(adm, arr_0=images, mu=np.zeros(16), sigma=np.eye(16))
    assert evaluate(words(bench, out, f"evaluate.reference={adm}")) == 0
    assert {"kid", "precision", "recall"} <= set(json.loads(out.read_text())["pruned"])


def shards_of(bench: dict[str, str], folder: Path, names: list[str]) -> Path:
    """The real pictures as shards of pixels, of so many named classes."""
    pictures = [np.asarray(Image.open(p)).transpose(2, 0, 1) for p in sorted(Path(bench["real"]).iterdir())]
    examples = [(f"{i:04d}", np.ascontiguousarray(x), i % len(names), {}) for i, x in enumerate(pictures)]
    write_shards(examples, folder, 16, {"source": "pictures"}, num_classes=len(names), kind="pixels")
    (folder / "classes.json").write_text(json.dumps(names))
    return folder


def test_a_reference_of_another_data_set_is_refused(bench, tmp_path, capsys):
    birds, out = shards_of(bench, tmp_path / "birds", ["crow", "gull", "owl"]), tmp_path / "out.json"
    stored = tmp_path / "birds.npz"
    from_shards = [*words(bench, out), "evaluate.reference=", f"data.shards={birds}"]
    assert evaluate([*from_shards, f"evaluate.save_reference={stored}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    about = json.loads(str(open_member(stored, "about")))
    assert (about["num_classes"], about["count"], about["images"]) == (3, 40, str(birds))
    assert f"images {birds}, count 40, num_classes 3, class_names {about['class_names']}" in shown
    out.unlink()
    by_file = [*words(bench, out), f"evaluate.reference={stored}"]
    more = shards_of(bench, tmp_path / "more", ["a", "b", "c", "d"])
    other = shards_of(bench, tmp_path / "other", ["crow", "gull", "rose"])
    error = refused(capsys, [*by_file, f"data.shards={more}"])
    assert f"{stored} was made from {birds}, images of 3 classes, but `data.shards` ({more}) has 4. Give" in error
    error = refused(capsys, [*by_file, f"data.shards={other}"])
    assert f"{stored} was made from {birds}, but the classes of `data.shards` ({other}) have other names. Give" in error
    five = random_model(tmp_path / "five", input_size=8, in_channels=3, num_classes=5)
    for command in (by_file, from_shards):
        error = refused(capsys, [*command, f"weights={five}", "evaluate.samples="])
        assert f"the real images ({birds}) are of 3 classes, {five} draws 5. Give" in error
    (other / "classes.json").unlink()  # shards without names, and shards that are gone, may be the same data set
    for shards in (birds, other, tmp_path / "gone"):
        assert evaluate([*by_file, f"data.shards={shards}"]) == 0
    assert model_problem({}, 5, five) is None and model_problem({"num_classes": 3}, 1, five) is None


def test_statistics_that_name_no_network_are_taken_for_what_they_may_be(bench, tmp_path, capsys):
    out, plain, adm = tmp_path / "out.json", tmp_path / "birds_clean_custom.npz", tmp_path / "adm.npz"
    np.savez(plain, mu=np.zeros(16), sigma=np.eye(16))
    np.savez(adm, mu=np.zeros(16), sigma=np.eye(16), mu_s=np.zeros(2023), sigma_s=np.eye(2023))
    assert evaluate(words(bench, out, f"evaluate.reference={plain}", "evaluate.mode=clean")) == 0
    protocol = json.loads(out.read_text())["protocol"]
    assert protocol["resize_mode"] == "clean"
    about = protocol["reference_about"]
    assert [about[key] for key in ("count", "extractor", "resize_mode")] == ["not recorded"] * 3
    out.unlink()
    own = tmp_path / "own.pt"
    torch.jit.script(Tuple16()).save(str(own))
    for path in (plain, adm):
        error = refused(capsys, words(bench, out, f"evaluate.reference={path}", f"evaluate.extractor={own}"))
        assert f"{path} does not say which network made it" in error and "evaluate.save_reference" in error


def test_samples_of_another_model_are_refused(bench, tmp_path, capsys):
    other = random_model(tmp_path / "other", seed=1, input_size=8, in_channels=3)  # the same blocks and step
    error = refused(capsys, words(bench, tmp_path / "out.json", f"weights={other}"))
    assert f"was drawn from {bench['model']} with weights" in error and f"{other} holds weights" in error
    fewer = random_model(tmp_path / "fewer", kept=(1,), input_size=8, in_channels=3)
    error = refused(capsys, words(bench, tmp_path / "out.json", f"weights={fewer}"))
    assert "was drawn from blocks [0, 2] at step 7" in error
    moved = shutil.copytree(bench["model"], tmp_path / "moved")
    base = [f"evaluate.baseline={bench['model']}", f"evaluate.baseline_samples={bench['samples']}"]
    assert evaluate(words(bench, tmp_path / "out.json", f"weights={moved}", *base)) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [found[side]["model"] for side in ("base", "pruned")] == [bench["model"], str(moved)]
    drawn = json.loads(Path(bench["samples"]).with_name("samples_protocol.json").read_text())
    assert {found[side]["weights_digest"] for side in ("base", "pruned")} == {drawn["weights_digest"]}


def test_wrong_networks_and_settings_are_refused(bench, tmp_path, capsys):
    out, text = tmp_path / "out.json", tmp_path / "net.pt"
    text.write_text("no network")
    assert "is not the Inception network" in refused(capsys, words(bench, out, f"evaluate.inception={text}"))
    torch.jit.script(torch.nn.Sequential(torch.nn.Flatten())).save(str(text))
    assert "is not the Inception network" in refused(capsys, words(bench, out, f"evaluate.inception={text}"))
    absent = refused(capsys, words(bench, out, f"evaluate.inception={tmp_path / 'absent.pt'}"))
    assert "absent.pt does not exist" in absent
    for setting, message in (
        ("evaluate.mode=best", "one of clean, legacy_pytorch, legacy_tensorflow"),
        ("evaluate.metrics=[fid,foo]", "some of fid, kid, sfid, is, precision_recall, got foo"),
        ("evaluate.extractor=vgg", "must be digits, inception, or a .py or .pt file"),
        ("evaluate.neighbours=0", "above 0"),
        ("evaluate.latency_depths=[0]", "above 0"),
        ("evaluate.latency_compile=[]", "must not be empty"),
        ("evaluate.latency_table=true evaluate.latency_depths=[9]", "more than the 2 blocks"),
        ("evaluate.samples=nowhere.npz", "nowhere.npz or its nowhere_protocol.json is missing"),
    ):
        assert message in refused(capsys, words(bench, out, *setting.split()))
    own = tmp_path / "own.py"
    for code, message in (("1 / 0", "ZeroDivisionError"), ("EXTRACTOR = 3", "must define EXTRACTOR")):
        own.write_text(code)
        assert message in refused(capsys, words(bench, out, f"evaluate.extractor={own}"))
    for call, message in (("Extracted(1 / 0 * ", "(ZeroDivisionError: division by zero, "), ("(", "got ndarray")):
        own.write_text(OWN.replace("return Extracted(", f"return {call}"))
        assert message in refused(capsys, words(bench, out, f"evaluate.extractor={own}"))
    blocked = words(bench, tmp_path)
    assert evaluate(blocked) == 2 and "is in the way" in capsys.readouterr().err
    samples = tmp_path / "s.npz"
    samples.write_bytes(Path(bench["samples"]).read_bytes())
    for text, message in (("{", "cannot be read"), ("{}", "is not the protocol"), ('{"step": 7}', "not the protocol")):
        (tmp_path / "s_protocol.json").write_text(text)
        assert message in refused(capsys, words(bench, out, f"evaluate.samples={samples}"))


def test_sets_too_small_for_the_neighbours_are_known_before_anything_is_drawn(bench, tmp_path, capsys):
    out, own = tmp_path / "out.json", tmp_path / "own.py"
    own.write_text(OWN)
    drawing = [f"evaluate.extractor={own}", "evaluate.samples=", "sample.num_samples=10", "evaluate.neighbours=20"]
    why = "21 samples and reference images or more are needed for 20 neighbours, got 10 and 40"
    asked = refused(capsys, words(bench, out, *drawing, "evaluate.metrics=[fid,precision_recall]"))
    assert f"`evaluate.metrics`: precision_recall: {why}." in asked
    assert evaluate(words(bench, out, *drawing)) == 0
    found = json.loads(out.read_text())
    assert found["protocol"]["not_measured"]["precision_recall"] == why and found["pruned"]["fid"] > 0
    few = lacking(Extracted(np.zeros((1, 3))), 5, 1, None, 3, "e")
    assert "2 samples and reference images or more are needed, got 5 and 1" in few["kid"]
    assert "4 samples and reference images or more" in few["precision_recall"] and "fid" not in few
    none = lacking(Extracted(np.zeros((1, 3))), 5, 0, None, 3, "e")
    assert none["kid"] == none["precision_recall"] == "the reference holds neither features nor images"
    assert not {"kid", "precision_recall"} & set(lacking(Extracted(np.zeros((1, 3))), 5, 4, None, 3, "e"))


def test_extractors_of_ones_own(bench, tmp_path):
    out, own = tmp_path / "out.json", tmp_path / "own.py"
    own.write_text(OWN)
    assert evaluate(words(bench, out, f"evaluate.extractor={own}")) == 0
    by_python = json.loads(out.read_text())
    assert by_python["protocol"]["extractor"] == "mean colours"
    assert set(by_python["protocol"]["not_measured"]) == {"sfid", "is"}

    class Colours(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=[2, 3]) / 255

    script = tmp_path / "own.pt"
    torch.jit.script(Colours()).save(str(script))
    assert evaluate(words(bench, out, f"evaluate.extractor={script}")) == 0
    by_script = json.loads(out.read_text())
    assert by_script["pruned"]["fid"] == pytest.approx(by_python["pruned"]["fid"], rel=1e-4)
    assert by_script["pruned"]["fid"] > 0


def test_torchscript_that_gives_something_else_is_refused_in_one_line(bench, tmp_path, capsys):
    out, own = tmp_path / "out.json", tmp_path / "own.pt"
    form = f"`evaluate.extractor`: {own} must return features (n,D), or a tuple (features, logits), got"
    for net, message in (
        (Dictionary(), f"{form} dict. Correct it"), (Three(), f"{form} a tuple of 3. Correct it"),
        (Fixed(), f"`evaluate.extractor`: {own} fails on images [1, 8, 8, 3] (RuntimeError: "),
    ):  # fmt: skip
        torch.jit.script(net).save(str(own))
        error = refused(capsys, words(bench, out, f"evaluate.extractor={own}"))
        assert message in error and error.strip().count("\n") == 0, error
    torch.jit.script(Coarse()).save(str(own))
    found = load_own(own).extract(np.full((2, 8, 8, 3), 51, np.uint8))
    assert found.features.dtype == np.float32 and found.logits is None
    np.testing.assert_allclose(found.features, 0.2, rtol=2**-8)
    torch.jit.script(Tuple16()).save(str(own))
    both = load_own(own).extract(np.full((2, 8, 8, 3), 51, np.uint8))
    assert both.features.shape == (2, 16) and both.logits is not None and both.logits.tolist() == [[51, 51]] * 2


def test_the_built_in_extractor_on_two_ranks(digits, tmp_path, capsys):
    model, out = random_model(tmp_path / "model", input_size=8, num_classes=10), tmp_path / "out.json"
    command = [f"weights={model}", f"data.shards={digits}/train", f"out={out}", *SETTINGS[1:3], *SETTINGS[4:]]
    assert "65 samples or more are needed for 64 features, got 64" in refused(
        capsys, [*command, "sample.num_samples=64"]
    )
    command = ["evaluate", *command, "sample.num_samples=70"]
    assert run_ranks("tests.workers.sampling:run", 2, commands=[command]) == [[0], [0]]
    found = json.loads(out.read_text())
    keys = {
        "fid",
        "kid",
        "fid_validation",
        "kid_validation",
        "class_accuracy",
        "inception_score",
        "precision",
        "recall",
    }
    assert keys <= set(found["pruned"]) and found["pruned"]["fid"] > found["pruned"]["fid_validation"] / 2 > 0
    assert (
        found["protocol"]["extractor"].startswith("digits_cnn64") and found["protocol"]["resize_mode"] == "none (8x8)"
    )
    assert "1797 images, of which 297 validation" in found["protocol"]["reference"]


# ---------------------------------------------------------------- weights of Inception


@contextmanager
def served(content: bytes, status: int = 200, length: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """A server that takes its time; its address, and what was asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            time.sleep(0.5)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/net.pt", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_weights_are_downloaded_once_per_node_and_a_failure_is_told_once(tmp_path):
    target = tmp_path / "net.pt"
    with served(b"weights" * 1000) as (url, asked):
        assert run_ranks("tests.workers.evaluation:fetched", 3, url=url, path=str(target)) == [""] * 3
        assert target.read_bytes() == b"weights" * 1000 and len(asked) == 1
    missing = tmp_path / "missing.pt"
    with served(b"", status=404) as (url, asked):
        errors = run_ranks("tests.workers.evaluation:fetched", 3, url=url, path=str(missing))
        assert len(asked) == 1 and len(set(errors)) == 1 and "cannot be downloaded" in errors[0]
    with served(b"half", length=8) as (url, asked), pytest.raises(OSError, match="only 4 of 8 bytes"):
        fetch.fetch(url, missing)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["missing.pt.lock", "net.pt", "net.pt.lock"]


def test_a_network_that_cannot_be_reached_is_one_quick_error_with_the_remedy(bench, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setitem(fetch.URLS, "clean", f"http://127.0.0.1:{taken.getsockname()[1]}/inception.pt")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        begin = time.monotonic()
        error = refused(capsys, words(bench, tmp_path / "out.json", "evaluate.inception=", "evaluate.mode=clean"))
    assert time.monotonic() - begin < 30 and error.count("error: ") == 1
    assert "cannot be downloaded" in error and "give it as evaluate.inception=FILE" in error


@torch.no_grad()
def test_the_walk_over_the_layers_is_what_the_file_computes(tmp_path):
    path = save_small_inception(tmp_path / "net.pt")
    net = torch.jit.load(path)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    found = load_inception(path, "legacy_tensorflow").extract(images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    np.testing.assert_allclose(found.features, net(x, return_features=True), rtol=1e-4, atol=1e-5)
    p = np.exp(found.logits) / np.exp(found.logits).sum(1, keepdims=True)
    np.testing.assert_allclose(p, net(x, no_output_bias=True), rtol=1e-4, atol=1e-6)
    assert found.spatial.shape == (3, 17 * 17 * 7)
    inside = load_inception(path, "clean").extract(np.full((1, 299, 299, 3), 200, np.uint8))
    y = net.layers.conv((torch.full((1, 3, 299, 299), 200.0) - 128) / 128)
    spatial = net.layers.mixed_6.conv(net.layers.mixed_5(y))[0, :7]
    np.testing.assert_allclose(inside.spatial[0].reshape(17, 17, 7), spatial.permute(1, 2, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_pytorch_fids_network_takes_given_weights(tmp_path):
    net = pytorch_inception._inception_v3(num_classes=1008, aux_logits=False, pretrained=False)
    for name, module in (
        ("5b", pytorch_inception.FIDInceptionA(192, pool_features=32)),
        ("5c", pytorch_inception.FIDInceptionA(256, pool_features=64)),
        ("5d", pytorch_inception.FIDInceptionA(288, pool_features=64)),
        ("6b", pytorch_inception.FIDInceptionC(768, channels_7x7=128)),
        ("6c", pytorch_inception.FIDInceptionC(768, channels_7x7=160)),
        ("6d", pytorch_inception.FIDInceptionC(768, channels_7x7=160)),
        ("6e", pytorch_inception.FIDInceptionC(768, channels_7x7=192)),
        ("7b", pytorch_inception.FIDInceptionE_1(1280)),
        ("7c", pytorch_inception.FIDInceptionE_2(2048)),
    ):
        setattr(net, f"Mixed_{name}", module)
    path = tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    first, second = (load_pytorch_inception(net.state_dict(), path) for _ in range(2))
    features = first.extract(images).features
    assert features.shape == (2, 2048) and (features == second.extract(images).features).all()
    with pytest.raises(ValueError, match="is not the Inception network"):
        load_pytorch_inception({"x": torch.zeros(1)}, path)
