"""Samples, features, FID, KID and latency: exact where mathematics says so, on real digits elsewhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from entprune_ds.cli import evaluate
from entprune_ds.evaluation import features, latency
from entprune_ds.evaluation.fid import class_accuracy, evaluate_samples, fid, kid
from entprune_ds.evaluation.generate import generate, make_labels
from entprune_ds.evaluation.images import from_uint8, save_grid, to_uint8
from entprune_ds.evaluation.npz import save_npz
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.source import Source
from entprune_ds.interop.tensors import parameter_shapes
from entprune_ds.models.dit import initial_tensor
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def digits():
    """Train images, train labels, validation images, validation labels: 1500 / 297, stratified."""
    data = load_digits()
    images = np.rint(data.images[..., None] / 16 * 255).astype(np.uint8)
    train, val = train_test_split(np.arange(1797), test_size=297, random_state=0, stratify=data.target)
    return images[train], data.target[train], images[val], data.target[val]


@pytest.fixture(scope="module")
def extractor(digits):
    return features.train_digit_extractor(*digits, seed=0)


# ---------------------------------------------------------------- generate


def _sample(noise, labels, noise_at):
    return torch.tanh(noise + noise_at(0) - 0.5 * noise_at(1) + labels[:, None, None, None])


def test_samples_do_not_depend_on_batch_size_or_ranks():
    labels = make_labels("uniform", 23, 10, seed=3)
    draw = dict(shape=(2, 4, 4), seed=5)
    done = []
    whole = generate(_sample, labels, batch_size=23, on_batch=done.append, **draw)
    assert whole.shape == (23, 4, 4, 2) and whole.dtype == np.uint8 and done == [23]
    for batch_size in (1, 4, 100):
        np.testing.assert_array_equal(generate(_sample, labels, batch_size=batch_size, **draw), whole)
    for rank in range(2):
        part = generate(_sample, labels[rank::2], batch_size=4, slots=range(rank, 23, 2), **draw)
        np.testing.assert_array_equal(part, whole[rank::2])
    assert not np.array_equal(generate(_sample, labels, batch_size=23, shape=(2, 4, 4), seed=6), whole)


def test_samples_may_differ_in_shape_from_the_noise_and_carry_no_gradient():
    weight = torch.ones((), requires_grad=True)
    grown = []

    def decode(noise, labels, noise_at):
        images = (noise * weight).repeat(1, 3, 2, 2).tanh()
        grown.append(images.requires_grad)
        return images

    images = generate(decode, torch.zeros(3, dtype=torch.int64), shape=(1, 4, 4), seed=0, batch_size=2)
    assert images.shape == (3, 8, 8, 3) and grown == [False, False]


def test_generate_refuses_bad_arguments_and_diverged_samples():
    labels = torch.zeros(4, dtype=torch.int64)
    good = dict(shape=(1, 2, 2), seed=0, batch_size=2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        generate(lambda z, y, noise_at: z * float("nan"), labels, **good)
    with pytest.raises(ValueError, match=r"must return \(2,C,H,W\)"):
        generate(lambda z, y, noise_at: z[:1], labels, **good)
    with pytest.raises(ValueError, match="non-empty"):
        generate(_sample, labels[:0], **good)
    with pytest.raises(ValueError, match="int64"):
        generate(_sample, labels.float(), **good)
    with pytest.raises(ValueError, match="batch_size"):
        generate(_sample, labels, **(good | {"batch_size": 0}))
    with pytest.raises(ValueError, match=r"one index per label \(4\), got 3"):
        generate(_sample, labels, slots=[0, 1, 2], **good)


def test_labels_are_uniform_draws_or_balanced():
    assert make_labels("balanced", 7, 3, seed=9).tolist() == [0, 1, 2, 0, 1, 2, 0]
    uniform = make_labels("uniform", 2000, 10, seed=1)
    assert uniform.dtype == torch.int64
    counts = torch.bincount(uniform, minlength=10)
    assert len(counts) == 10 and counts.min() > 140 and counts.max() < 260 and len(set(counts.tolist())) > 1
    assert torch.equal(make_labels("uniform", 100, 10, seed=1), uniform[:100])
    assert not torch.equal(make_labels("uniform", 100, 10, seed=2), uniform[:100])
    with pytest.raises(ValueError, match="uniform or balanced"):
        make_labels("random", 3, 10, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        make_labels("uniform", 0, 10, seed=0)


# ---------------------------------------------------------------- images


def test_every_uint8_value_survives_the_round_trip():
    values = np.arange(256, dtype=np.uint8).reshape(2, 16, 4, 2)
    tensor = from_uint8(values)
    assert tensor.shape == (2, 2, 16, 4) and tensor.min() == -1 and tensor.max() == 1
    np.testing.assert_array_equal(to_uint8(tensor), values)
    np.testing.assert_array_equal(to_uint8(tensor.bfloat16().double()), to_uint8(tensor.bfloat16()))


def test_to_uint8_clamps_and_rounds_halves_to_even():
    values = torch.tensor([-7.0, -1.0, 0.0, 1 / 127.5, 0.99, 1.0, 3.0])[None, None, None]
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 128, 254, 255, 255]
    assert to_uint8(torch.full((1, 1, 1, 1), 0.5 / 127.5 * 3)).item() == 129


def test_a_failed_write_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "samples.npz"
    images, labels = np.zeros((3, 4, 4, 1), np.uint8), np.zeros(3, np.int64)
    save_npz(images, labels, path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("entprune_ds.atomic.os.fsync", full)
    with pytest.raises(ValueError, match=r"samples\.npz cannot be written: No space left on device"):
        save_npz(images + 1, labels, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="cannot be written"):
        save_grid(images, path / "grid.png")


def test_grid_enlarges_tiny_images_without_new_grey_values(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (3 * 50 + 2, 3 * 50 + 2, 3)  # 8 px x 6, a border of 2
    np.testing.assert_array_equal(grid[52:100:6, 52:100:6, 0], images[4, :, :, 0])
    assert set(np.unique(grid)) <= set(np.unique(images)) | {128}
    save_grid(np.zeros((1, 64, 64, 3), np.uint8), tmp_path / "grid.png")
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape[0] in (64, 68)
    with pytest.raises(ValueError, match="at least 1"):
        save_grid(images, tmp_path / "grid.png", columns=0)


# ---------------------------------------------------------------- extractor


def test_extractor_recognises_unseen_digits(digits, extractor):
    assert extractor.test_accuracy >= 0.98
    assert class_accuracy(extractor, digits[2], digits[3]) == extractor.test_accuracy
    got = extractor.features(digits[0])
    assert got.shape == (1500, 64) and got.dtype == np.float64 and got.min() == 0
    assert got.var(axis=0, ddof=1).mean() == pytest.approx(features.FEATURE_VARIANCE, rel=1e-5)
    assert (got * extractor.kid_scale).var(axis=0, ddof=1).mean() == pytest.approx(1, rel=1e-5)


def test_training_twice_gives_identical_bytes_and_leaves_global_state_alone(digits, extractor):
    torch.manual_seed(1234)
    before, numpy_before, threads = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        again = features.train_digit_extractor(*digits, seed=0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for name, tensor in extractor.net.state_dict().items():
        assert tensor.numpy().tobytes() == again.net.state_dict()[name].numpy().tobytes(), name
    assert again.name == extractor.name and not again.net.training
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpy_before)


def test_cached_extractor_is_loaded_and_a_damaged_one_replaced(digits, extractor, tmp_path, monkeypatch):
    calls = []

    def train(*args):
        calls.append(args)
        return extractor

    monkeypatch.setattr(features, "train_digit_extractor", train)
    first = features.load_or_train(*digits, tmp_path / "cache")
    second = features.load_or_train(*digits, tmp_path / "cache")
    assert len(calls) == 1 and (second.name, second.test_accuracy) == (first.name, first.test_accuracy)
    np.testing.assert_array_equal(second.features(digits[2]), extractor.features(digits[2]))
    (path,) = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    for damaged in (content[:1000], content[:-1] + bytes([content[-1] ^ 1]), b""):
        calls.clear()
        path.write_bytes(damaged)
        features.load_or_train(*digits, tmp_path / "cache")
        assert len(calls) == 1 and path.read_bytes() == bytes(content)
    changed = digits[0].copy()
    changed[0, 0, 0, 0] ^= 1
    features.load_or_train(changed, *digits[1:], tmp_path / "cache")
    features.load_or_train(*digits, tmp_path / "cache", seed=1)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    features.load_or_train(*digits, path / "no_folder")  # not kept, but the figures go on


def test_extractor_refuses_other_images_and_labels(digits, extractor):
    train, labels, val, val_labels = digits
    with pytest.raises(ValueError, match=r"must be digits, uint8 \(N,8,8,1\)"):
        extractor.features(np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="must be digits"):
        features.train_digit_extractor(train / 255, labels, val, val_labels)
    with pytest.raises(ValueError, match="1500 integer labels"):
        features.train_digit_extractor(train, labels[:-1], val, val_labels)
    with pytest.raises(ValueError, match=r"0\.\.9, got 0\.\.10"):
        features.train_digit_extractor(train, labels + (labels == 9), val, val_labels)
    with pytest.raises(ValueError, match="64 training images or more, got 20"):
        features.train_digit_extractor(train[:20], labels[:20], val, val_labels)


# ---------------------------------------------------------------- FID and KID


def _with_moments(rng, count, mean, covariance):
    """Features (count,D) whose sample mean and covariance are exactly these, up to rounding."""
    raw = rng.normal(size=(count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    values, vectors = np.linalg.eigh(covariance)
    return white @ (vectors * np.sqrt(values.clip(0))).T + mean


def _slow_fid(a, b):
    """Frechet distance by symmetric eigenvalues: Tr (S1 S2)^(1/2) = sum of roots of eig(R S2 R), R = S1^(1/2)."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross


def test_fid_of_a_set_with_itself_is_zero(digits, extractor):
    real = extractor.features(digits[2])
    noise = np.random.default_rng(0).normal(size=(100, 16))
    for values in (real, noise):
        assert abs(fid(values, values)) <= 1e-6
        assert abs(fid(values, values[::-1].copy())) <= 1e-6


def test_fid_of_known_gaussians_is_the_closed_form():
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    mean, low, high = np.arange(8.0), rng.uniform(0.5, 2, 8), rng.uniform(0.5, 9, 8)
    a = _with_moments(rng, 40, np.zeros(8), turn @ np.diag(low) @ turn.T)
    b = _with_moments(rng, 90, mean, turn @ np.diag(high) @ turn.T)
    # covariances that commute: |mu|^2 + sum (sigma_1 - sigma_2)^2
    assert fid(a, b) == pytest.approx(140 + ((low**0.5 - high**0.5) ** 2).sum(), rel=1e-9)
    other = _with_moments(rng, 90, mean, np.diag(high))
    assert fid(a, other) == pytest.approx(_slow_fid(a, other), rel=1e-9)
    assert fid(a, other) == pytest.approx(fid(other, a), rel=1e-9)


def test_fid_stands_features_that_never_fire_and_collapsed_samples(digits, extractor):
    real = extractor.features(digits[0])
    dead = real.copy()
    dead[:, :20] = 0
    assert fid(dead[:700], dead[700:]) == pytest.approx(_slow_fid(dead[:700], dead[700:]), abs=1e-3)
    collapsed = np.repeat(real[:1], 100, axis=0)
    assert fid(collapsed, real) == pytest.approx(_slow_fid(collapsed, real), rel=1e-6)


def test_kid_of_whole_sets_is_the_unbiased_mmd_with_the_cubic_kernel():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(30, 5)), rng.normal(size=(30, 5)) + 0.3
    same, cross = 0.0, 0.0
    for i in range(30):
        for j in range(30):
            if i != j:
                same += (a[i] @ a[j] / 5 + 1) ** 3 + (b[i] @ b[j] / 5 + 1) ** 3
            cross += (a[i] @ b[j] / 5 + 1) ** 3
    assert kid(a, b) == pytest.approx(same / (30 * 29) - 2 * cross / 30**2, rel=1e-9)


def test_kid_is_reproducible_and_leaves_numpys_generator_alone():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(60, 5)), rng.normal(size=(45, 5)) + 0.3  # subsets of 45 are drawn from 60
    np.random.seed(77)
    expected = np.random.get_state()[1].copy(), np.random.random()
    np.random.seed(77)
    value = kid(a, b)
    assert np.array_equal(np.random.get_state()[1], expected[0]) and np.random.random() == expected[1]
    assert kid(a, b) == value  # from another global state


def test_figures_of_real_digits_lie_at_the_floor_and_those_of_noise_far_above(digits, extractor):
    train, _, val, labels = digits
    references = {"whole": train[:400], "validation": val}
    good = evaluate_samples(val, labels, references, extractor)
    assert list(good) == ["fid", "kid", "fid_validation", "kid_validation", "class_accuracy", "num_samples"]
    assert good["class_accuracy"] == extractor.test_accuracy and good["num_samples"] == 297
    assert abs(good["fid_validation"]) <= 1e-6 and 2 < good["fid"] < 40
    assert good["kid"] == kid(*(extractor.features(x) * extractor.kid_scale for x in (val, train[:400])))
    noise = np.random.default_rng(0).integers(0, 256, val.shape, dtype=np.uint8)
    bad = evaluate_samples(noise, labels, references, extractor)
    assert bad["fid"] > 20 * good["fid"] and bad["kid"] > 1 and bad["class_accuracy"] < 0.3


def test_too_few_images_and_mismatches_are_refused(digits, extractor):
    train, _, val, labels = digits
    with pytest.raises(ValueError, match=r"65 samples or more are needed for 64 features, got 64.*num_samples"):
        evaluate_samples(val[:64], labels[:64], {"whole": train}, extractor)
    assert fid(extractor.features(val[:65]), extractor.features(val)) > 0
    with pytest.raises(ValueError, match="65 reference images or more"):
        evaluate_samples(val, labels, {"whole": train[:64]}, extractor)
    with pytest.raises(ValueError, match="must contain `whole`"):
        evaluate_samples(val, labels, {"validation": val}, extractor)
    with pytest.raises(ValueError, match=r"reference `whole`.*of one size"):
        evaluate_samples(val, labels, {"whole": np.zeros((99, 16, 16, 1), np.uint8)}, extractor)
    with pytest.raises(ValueError, match="samples must be a non-empty uint8"):
        evaluate_samples(val.astype(float), labels, {"whole": train}, extractor)
    with pytest.raises(ValueError, match="297 integers"):
        evaluate_samples(val, labels[:-1], {"whole": train}, extractor)
    with pytest.raises(ValueError, match=r"0\.\.9, the extractor's classes"):
        class_accuracy(extractor, val, labels + 1)
    with pytest.raises(ValueError, match="NaN"):
        fid(np.full((99, 4), np.nan), np.zeros((99, 4)))
    with pytest.raises(ValueError, match=r"\(N,D\) and \(M,D\)"):
        kid(np.zeros((99, 4)), np.zeros((99, 5)))


def test_importing_the_figures_opens_no_connection():
    code = (
        "import socket, urllib.request\n"
        "def refuse(*a, **k): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = socket.create_connection = urllib.request.urlopen = refuse\n"
        "import entprune_ds.evaluation.fid\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- latency


class _Clock:
    """A clock that only models move; the machine slows down by 1 % with every reading."""

    def __init__(self):
        self.now, self.load, self.calls = 0.0, 1.0, []

    def read(self):
        self.load *= 1.01
        return self.now

    def model(self, name, seconds):
        def forward(z_t, t, labels):
            assert (
                torch.is_inference_mode_enabled() and z_t.shape[1:] == (1, 4, 4) and len(z_t) == len(t) == len(labels)
            )
            self.now += seconds * len(z_t) * self.load
            self.calls.append(name)

        return forward


MEASURE = dict(shape=(1, 4, 4), num_classes=10, device="cpu", warmup=2)


def _turns(calls):
    return [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]


def test_models_take_alternating_turns_and_speedup_pairs_them(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock.read)
    models = {"base": clock.model("base", 0.004), "pruned": clock.model("pruned", 0.001)}
    result = latency.measure_latency(models, batch_sizes=[1, 8], repeats=5, **MEASURE)
    # calibration, then turns b p | p b | b p | p b | b p per batch size; equal neighbours merge in the list
    assert _turns(clock.calls) == ["base", "pruned"] * 8 and set(result["base"]) == {1, 8}
    for batch in (1, 8):
        one = result["base"][batch]
        assert len(one["repeats_ms"]) == 5 and one["median_ms"] == np.median(one["repeats_ms"])
        assert min(one["repeats_ms"]) < one["p10_ms"] < one["median_ms"] < one["p90_ms"] < max(one["repeats_ms"])
    # neighbours differ by 2 % of load; the ratio of first to last would be off by 20 %
    assert latency.speedup(result, "base", "pruned")[8] == pytest.approx(4, rel=0.03)
    assert latency.speedup(result, "pruned", "base")[8] == pytest.approx(0.25, rel=0.03)


def test_pieces_last_at_least_20_ms_and_times_are_per_pass(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    result = latency.measure_latency({"one": clock.model("one", 0.003)}, batch_sizes=[1], repeats=3, **MEASURE)
    assert result["one"][1]["repeats_ms"] == pytest.approx([3.0] * 3)
    # warm-up 2, calibration 1 + 2 + 4 + 8 passes (24 ms is the first piece above 20 ms), 3 repeats of 8
    assert len(clock.calls) == 2 + 15 + 3 * 8


def test_speedup_is_the_median_of_paired_ratios():
    result = {"base": {1: {"repeats_ms": [10.0, 20.0, 90.0]}}, "pruned": {1: {"repeats_ms": [1.0, 10.0, 30.0]}}}
    assert latency.speedup(result, "base", "pruned") == {1: 3.0}  # the ratio of medians would be 2


def test_the_spread_of_the_speedup_is_the_interquartile_range_of_the_paired_ratios():
    ratios = [5.0, 1.0, 2.0, 4.0, 3.0]
    result = {"base": {8: {"repeats_ms": [7 * r for r in ratios]}}, "pruned": {8: {"repeats_ms": [7.0] * 5}}}
    assert latency.speedup_spread(result, "base", "pruned") == {8: {"q25": 2.0, "q75": 4.0}}
    assert latency.speedup_spread(result, "pruned", "base")[8]["q75"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"'big' was not measured\. Measured: base, pruned"):
        latency.speedup_spread(result, "base", "big")


def test_evaluate_stores_and_prints_the_speedup_with_its_spread(tmp_path, capsys):
    config = tiny_config()
    config = replace(config, evaluate=replace(config.evaluate, latency_batches=(1, 2), latency_repeats=4))
    shapes, weights = parameter_shapes(config.model), {}
    for name, kept in (("base", (0, 1, 2, 3)), ("pruned", (2,))):
        model, facts = replace(config.model, kept_blocks=kept), {"weights": "raw", "step": 1}
        source = Source(model, lambda n: initial_tensor(n, shapes[n], 0), facts)
        weights[name] = write_export(tmp_path / name, source)
    figures = {"depth": 4, "parameters": 9, "fid": 1.0, "fid_validation": 1.0, "kid": 0.0, "class_accuracy": 1.0}
    result = {name: dict(figures) for name in weights}
    result |= evaluate.latency(config, weights, result)
    assert set(result["speedup"]) == set(result["speedup_iqr"]) == {"1", "2"}
    for batch, ratio in result["speedup"].items():
        assert result["speedup_iqr"][batch]["q25"] <= ratio <= result["speedup_iqr"][batch]["q75"]
    protocol = {"num_samples": 1, "reference": "r", "extractor": "e", "extractor_test_accuracy": 1.0}
    measured = {"speedup": {"1": 1.5, "2": 1.875}, "speedup_iqr": {b: {"q25": 1.25, "q75": 2.0} for b in "12"}}
    evaluate.show(result | measured | {"protocol": protocol})
    text = " ".join(capsys.readouterr().out.split())
    assert "1.50x (1.25 to 2.00) at batch 1, 1.88x (1.25 to 2.00) at batch 2" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA events cannot be tested")
def test_a_gpu_is_timed_to_the_end_of_its_work():
    def model(count):
        return lambda z_t, t, labels: [z_t[0, 0] @ z_t[0, 0] for _ in range(count)]

    models = {"base": model(8), "pruned": model(1)}
    gpu = MEASURE | dict(device="cuda", shape=(1, 2048, 2048))
    result = latency.measure_latency(models, batch_sizes=[1], repeats=5, **gpu)
    assert 4 < latency.speedup(result, "base", "pruned")[1] < 12


def test_eight_times_the_work_is_slower_and_modules_keep_their_modes():
    class Work(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers, self.drop = nn.Sequential(*[nn.Linear(256, 256) for _ in range(layers)]), nn.Dropout(0.5)
            self.seen = set()

        def forward(self, z_t, t, labels):
            self.seen.add((self.training, self.drop.training))
            return self.drop(self.layers(z_t.flatten(1)))

    base, pruned = Work(16), Work(2)
    base.drop.eval()
    sizes = MEASURE | dict(shape=(1, 16, 16))
    result = latency.measure_latency({"base": base, "pruned": pruned}, batch_sizes=[64], repeats=5, **sizes)
    assert 2 < latency.speedup(result, "base", "pruned")[64] < 40
    assert base.seen == pruned.seen == {(False, False)}
    assert base.training and pruned.drop.training and not base.drop.training


def test_latency_refuses_what_cannot_be_measured():
    good = dict(batch_sizes=[1], repeats=1) | MEASURE
    models = {"one": lambda z_t, t, labels: z_t}
    with pytest.raises(ValueError, match="needs a model"):
        latency.measure_latency({}, **good)
    for bad in (dict(batch_sizes=[]), dict(batch_sizes=[4, 0]), dict(repeats=0), dict(warmup=0)):
        with pytest.raises(ValueError, match="at least 1"):
            latency.measure_latency(models, **(good | bad))
    with pytest.raises(ValueError, match=r"'big' was not measured\. Measured: one"):
        latency.speedup(latency.measure_latency(models, **good), "big", "one")
