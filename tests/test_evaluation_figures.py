"""Distributed statistics, the Frechet distance, and the other figures, against clean-fid and brute force."""

from __future__ import annotations

import cleanfid.fid
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from sklearn.datasets import load_digits

from entprune_ds.evaluation.frechet import frechet_distance, square_root
from entprune_ds.evaluation.scores import inception_score, precision_recall
from entprune_ds.evaluation.statistics import Moments, moments_of
from tests.ranks import run_ranks
from tests.reference.inception import save_small_inception
from tests.workers.evaluation import measured

DIGITS = np.rint(load_digits().images / 16 * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two folders of PNG files: 41 and 53 digits in three colours."""
    found = []
    for name, chosen in (("a", slice(0, 41)), ("b", slice(200, 253))):
        folder = tmp_path_factory.mktemp(name)
        for number, image in enumerate(DIGITS[chosen]):
            pixels = np.stack([image, 255 - image, image.T], axis=2) // (1 + (name == "b"))
            Image.fromarray(np.tile(pixels, (2, 2, 1))).save(folder / f"{number:03d}.png")
        found.append(str(folder))
    return found


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    return str(save_small_inception(tmp_path_factory.mktemp("net") / "inception-2015-12-05.pt"))


def by_clean_fid(folders: list[str], network: str, mode: str) -> dict:
    """What clean-fid's own functions make of the same images and network."""
    net = torch.jit.load(network).eval()

    def features(x: torch.Tensor) -> torch.Tensor:
        if mode == "legacy_tensorflow":
            return net(x, return_features=True).double()
        return net.layers((x - 128) / 128).flatten(1).double()  # numpy takes the mean of float32 in float32

    keys = dict(num_workers=0, batch_size=16, device=torch.device("cpu"), mode=mode, verbose=False)
    a, b = (cleanfid.fid.get_folder_features(folder, features, **keys) for folder in folders)
    np.random.seed(5)
    return {"fid": cleanfid.fid.fid_from_feats(a, b), "kid": cleanfid.fid.kernel_distance(b, a), "first": a[:, 0]}


@pytest.mark.parametrize("mode, ranks", [("clean", 1), ("clean", 2), ("clean", 4), ("legacy_tensorflow", 1)])
def test_fid_and_kid_equal_clean_fids_on_any_number_of_ranks(folders, network, mode, ranks):
    expected = by_clean_fid(folders, network, mode)
    images = dict(folders=folders, network=network, mode=mode)
    alone = [measured(**images)] if ranks == 1 else []
    first, *others = alone or run_ranks("tests.workers.evaluation:measured", ranks, **images)
    print(f"{mode}, {ranks} ranks: FID {first['fid']:.9f}, clean-fid {expected['fid']:.9f}")
    assert first["fid"] == pytest.approx(expected["fid"], rel=1e-6) and first["fid"] > 0.1
    assert first["kid"] == pytest.approx(expected["kid"], rel=1e-5)  # the features have six digits
    np.testing.assert_allclose(first["first"], expected["first"], rtol=1e-4, atol=1e-5)
    assert all(other["fid"] == first["fid"] and other["digests"] == first["digests"] for other in others)


def random_covariance(rng, width, rank):
    raw = rng.normal(size=(width, rank)) * np.geomspace(1, 1e-3, rank)
    return raw @ raw.T


def test_the_square_root_is_scipys_and_the_distance_clean_fids():
    rng = np.random.default_rng(0)
    a, b = (Moments(9, rng.normal(size=20), random_covariance(rng, 20, 40)) for _ in range(2))
    root = scipy.linalg.sqrtm(a.covariance)
    np.testing.assert_allclose(square_root(a.covariance), root, rtol=1e-7, atol=1e-9)
    expected = cleanfid.fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_the_distance_is_real_and_exact_where_covariances_are_singular():
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.normal(size=(64, 64)))[0]
    for rank_a, rank_b in ((64, 3), (10, 10), (1, 64), (0, 5)):
        low, high = np.zeros(64), np.zeros(64)
        low[:rank_a], high[-rank_b:] = rng.uniform(1, 9, rank_a), rng.uniform(1, 9, rank_b)
        a, b = (Moments(99, np.zeros(64), turn @ np.diag(v) @ turn.T) for v in (low, high))
        exact = ((np.sqrt(low) - np.sqrt(high)) ** 2).sum()  # they commute
        assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-9)
        assert frechet_distance(a, a) < 1e-9 and frechet_distance(b, a) == pytest.approx(exact, rel=1e-9)
    few = moments_of(rng.normal(size=(5, 64)))  # of 5 examples: rank 4, with eigenvalues that rounding makes negative
    assert np.isrealobj(square_root(few.covariance)) and frechet_distance(few, few) < 1e-9
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(few, Moments(9, np.full(64, np.nan), few.covariance))
    with pytest.raises(ValueError, match="one width, got 64 and 2"):
        frechet_distance(few, Moments(9, np.zeros(2), np.eye(2)))


def test_precision_and_recall_are_those_of_brute_force():
    rng = np.random.default_rng(2)
    real, drawn = rng.normal(size=(60, 4)), rng.normal(size=(50, 4)) * 0.7 + 0.4

    def share(points, centres):
        inside = 0
        for p in points:
            for c in centres:
                others = sorted(np.linalg.norm(c - o) for o in centres)
                if np.linalg.norm(p - c) <= others[3]:  # others[0] is c itself
                    inside += 1
                    break
        return inside / len(points)

    precision, recall = precision_recall(real, drawn)
    assert (precision, recall) == (share(drawn, real), share(real, drawn)) and recall < precision < 1
    assert precision_recall(real, real) == (1.0, 1.0) and precision_recall(real, real + 99) == (0.0, 0.0)
    with pytest.raises(ValueError, match="4 images or more on both sides, got 3 and 50"):
        precision_recall(real[:3], drawn)


def test_the_inception_score_is_the_number_of_classes_at_most():
    logits = np.eye(10)[np.arange(1000) % 10] * 1000.0
    assert inception_score(logits) == pytest.approx(10)
    assert inception_score(np.zeros((100, 10))) == pytest.approx(1)
    mixed = np.random.default_rng(3).normal(size=(6000, 10))
    p = np.exp(mixed) / np.exp(mixed).sum(1, keepdims=True)
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:5000], p[5000:])]
    assert inception_score(mixed) == pytest.approx(np.mean(parts), rel=1e-12)
