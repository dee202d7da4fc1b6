"""Entropy estimators on outputs of known entropy, and the traps of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entprune_ds.config import load_config
from entprune_ds.importance import entropy
from entprune_ds.importance.basis import fit_basis
from entprune_ds.importance.class_draws import draws_of_classes
from entprune_ds.importance.entropy_cells import Cells, EntropyGroups, EntropyStatistics
from entprune_ds.importance.entropy_draws import DrawEstimator, knn, low_rank
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.moments import moments_of
from tests.ranks import run_ranks
from tests.workers.entropy import score_with_every_estimator, toy_check

LOG2 = math.log(2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signed(m, block: int = 0) -> float:
    return measure_sweep(m, entropy_needed=True)["signed_ced"][block].value


# ---------------------------------------------------------------- known differences, pooled


@pytest.mark.parametrize("estimator", entropy.FORMS)
def test_gaussian_estimators_measure_a_known_difference(estimator):
    mixed = signed(toy_check(lambda x: x / 2, estimator=estimator, batch_size=256))
    assert mixed == pytest.approx(16 * LOG2, rel=1e-9)


def test_pooled_estimators_see_the_spread_between_elements():
    x = normal(500, 2, 3, 3) + 10 * torch.arange(9.0, dtype=torch.float64).view(3, 3)
    moments = moments_of(x.unsqueeze(1))
    expected = 9 * x.transpose(0, 1).flatten(1).std(1, correction=0).log()
    torch.testing.assert_close(entropy.per_channel(moments)[0], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy.scalar(moments)[0, 0], 18 * x.std(correction=0).log(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("basis", ["pca", "random"])
def test_low_rank_sees_correlation_that_single_sigmas_do_not(basis):
    """Dropping a rotation of unequal sigmas by 45 degrees leaves the entropy; each channel's own sigma changes."""
    turn = torch.tensor([[1.0, 1, 0, 0], [-1, 1, 0, 0], [0, 0, 1, 1], [0, 0, -1, 1]], dtype=torch.float64) / 2**0.5
    sigma = torch.tensor([1.0, 10, 1, 10], dtype=torch.float64).view(4, 1, 1)
    shear = torch.tensor([[1.0, 1, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0.5]], dtype=torch.float64)
    kinds = dict(source=lambda z, t, y: sigma * z, batch_size=256)
    m = toy_check(lambda x: x @ turn, lambda x: x @ shear, estimator="low_rank", rank=16, basis=basis, **kinds)
    found = measure_sweep(m, entropy_needed=True)
    assert abs(found["signed_ced"][0].value) < 1e-9 and found["ced_abs"][0].value > 1
    assert found["signed_ced"][1].value == pytest.approx(8 * LOG2, rel=1e-9)
    blind = measure_sweep(toy_check(lambda x: x @ turn, **kinds))
    assert blind["signed_ced"][0].value < -5


def test_knn_is_right_on_directions_of_very_different_scales():
    """8 directions of sigma 1 to 1000, half of them doubled: 4 log 2 = 2.77, as in whitened directions."""
    sigma = torch.tensor([1.0, 1000], dtype=torch.float64).view(2, 1, 1)
    half = torch.tensor([0.5, 1], dtype=torch.float64)
    m = toy_check(
        lambda x: x * half, shape=(2, 2, 2), source=lambda z, t, y: sigma * z, estimator="knn", batch_size=256
    )
    assert signed(m) == pytest.approx(4 * LOG2, rel=0.1)
    raw = normal(2, 1024, 8)[:1] * torch.tensor([1.0] * 4 + [1000] * 4)
    stretched = raw * torch.tensor([2.0] * 4 + [1] * 4)
    assert knn(torch.cat([raw, stretched])).item() < 0.5 * 4 * LOG2  # without whitening


def test_knn_sees_a_shape_that_no_gaussian_estimator_does():
    """A block parts a Gaussian in two of sigma 1/4, of equal variance in all: dropping it adds log 2 per element."""

    def part(x: Tensor) -> Tensor:
        half_normal = torch.special.ndtri(2 * torch.special.ndtr(x.abs()) - 1)
        return x.sign() * (1 - 0.25**2) ** 0.5 + 0.25 * half_normal

    settings = dict(shape=(2, 1, 1), draws=2048, batch_size=256)
    assert signed(toy_check(part, estimator="knn", knn_dim=2, **settings)) == pytest.approx(2 * LOG2, rel=0.1)
    assert abs(signed(toy_check(part, **settings))) < 0.1 * 2 * LOG2


def test_knn_takes_hard_edges_for_softer_than_they_are():
    """A known limit: of a square's entropy below a Gaussian's, about a tenth is missed, beyond the scatter of draws."""
    truth, found = math.log(2 * math.pi * math.e / 12), []
    for seed in range(10):
        x = normal(1024, 2, seed=seed)
        square = 12**0.5 * (torch.special.ndtr(x) - 0.5)
        found.append(knn(torch.stack([square, x])).item())
    assert -0.2 < sum(found) / 10 / truth - 1 < -0.05


# ---------------------------------------------------------------- within timesteps and classes


def early_and_late(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Channel 0 tells whether t is past the middle."""
    return torch.cat([0.01 * z[:, :1] + (t > 0.5).double().view(-1, 1, 1, 1), z[:, 1:]], dim=1)


def shrink_early_more(x: Tensor) -> Tensor:
    """Half of channel 1 where t is late, a quarter where it is early."""
    return torch.stack([x[..., 0], x[..., 1] * torch.where(x[..., 0] > 0.5, 0.5, 0.25)], dim=-1)


@pytest.mark.parametrize("estimator", ["per_element", "per_channel", "low_rank", "knn"])
def test_entropy_within_timesteps_is_the_mean_over_buckets(estimator):
    settings = dict(shape=(2, 1, 1), source=early_and_late, draws=2048, estimator=estimator, rank=2, knn_dim=2)
    within = signed(toy_check(shrink_early_more, timestep_buckets=2, **settings))
    assert within == pytest.approx(1.5 * LOG2, rel=0.1)
    if estimator != "knn":
        pooled = signed(toy_check(shrink_early_more, **settings))
        assert pooled == pytest.approx(-math.log((0.5**2 + 0.25**2) / 2) / 2, rel=0.1)


def test_absolute_differences_do_not_cancel_between_timesteps():
    def opposite(x: Tensor) -> Tensor:
        return torch.stack([x[..., 0], x[..., 1] * torch.where(x[..., 0] > 0.5, 0.5, 2.0)], dim=-1)

    m = toy_check(opposite, shape=(2, 1, 1), source=early_and_late, draws=2048, timestep_buckets=2)
    found = measure_sweep(m)
    assert abs(found["signed_ced"][0].value) < 1e-9
    assert found["ced_abs"][0].value == pytest.approx(LOG2, rel=1e-9)


def far_classes(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return z + 100 * labels.view(-1, 1, 1, 1)


def halve_within_class(x: Tensor) -> Tensor:
    centre = 100 * torch.round(x / 100)
    return centre + (x - centre) / 2


@pytest.mark.parametrize("estimator", ["per_element", "scalar", "low_rank", "knn"])
def test_entropy_within_classes_leaves_out_the_spread_between_them(estimator):
    settings = dict(shape=(1, 2, 1), source=far_classes, estimator=estimator, rank=2, knn_dim=2)
    within = signed(toy_check(halve_within_class, within_class=(0, 2), **settings))
    assert within == pytest.approx(2 * LOG2, rel=0.1)
    if estimator == "per_element":
        assert abs(signed(toy_check(halve_within_class, **settings))) < 0.01


def test_draws_of_classes_come_in_turn_and_a_class_that_does_not_come_is_an_error():
    m = toy_check(lambda x: x, source=far_classes, within_class=(2, 0))
    batches = draws_of_classes(m, "calibration", 5)
    first, second = next(batches), next(batches)
    assert first.labels.tolist() == [2, 0, 2, 0, 2] and second.labels.tolist() == [0, 2, 0, 2, 0]
    assert torch.equal((first.z_t.mean((1, 2, 3)) / 100).round().long(), first.labels)
    assert len({z.sum().item() for z in (*first.z_t, *second.z_t)}) == 10  # each draw once
    with pytest.raises(RuntimeError, match=r"classes \[7\] of `score.within_class` among 10,000.*Nothing was removed"):
        next(draws_of_classes(toy_check(lambda x: x, within_class=(1, 7)), "calibration", 512))


def test_cells_are_class_by_class_and_bucket_by_bucket():
    cells = Cells(2, (7, 3), span=1000.0)
    t, labels = torch.tensor([0, 499, 500, 999, 999]), torch.tensor([7, 3, 3, 7, 5])
    assert cells.of(t, labels).tolist() == [0, 2, 3, 1, -1]
    assert cells.describe(3) == "class 3, t in [500, 1000]"
    assert Cells(4).of(torch.tensor([0.0, 0.24, 0.99, 1.0]), labels[:4]).tolist() == [0, 0, 3, 3]


def test_a_cell_with_too_few_draws_is_named():
    m = toy_check(lambda x: x, source=lambda z, t, y: z, draws=64, batch_size=32, timestep_buckets=2)
    early = m.draw
    object.__setattr__(m, "draw", lambda purpose, count: early(purpose, count)._replace(t=torch.full((count,), 0.1)))
    with pytest.raises(
        RuntimeError, match=r"at least 16 draws.*t in \[0.5, 1\]: 0.*`score.draws`.*Nothing was removed"
    ):
        measure_sweep(m)


# ---------------------------------------------------------------- traps


def test_plug_in_log_det_is_far_off_where_the_diagonal_and_few_directions_are_not():
    """method.md: at d = 512 the log det is off by -158 at n = 1024 and by -27 at n = 5120, the diagonal by about 1."""

    def log_det(x: Tensor) -> float:
        return torch.linalg.slogdet(torch.cov(x.T)).logabsdet.item()

    few, many = normal(1024, 512), normal(5120, 512)
    assert -165 < log_det(few) < -150 and -32 < log_det(many) < -22
    diagonal = 2 * entropy.per_element(moments_of(few.view(1024, 1, 512, 1, 1))).sum().item()
    assert abs(diagonal) < 3
    assert abs(log_det(few[:, :32])) < 3  # n = 32 d


def test_log_det_bias_cancels_between_two_models_even_with_independent_draws():
    """The reason why low_rank needs no correction: the bias of n draws does not depend on the covariance."""
    mixing = normal(32, 32, seed=5) / 32**0.5
    truth = torch.linalg.slogdet(mixing).logabsdet.item()
    found = torch.stack(
        [
            low_rank(torch.stack([normal(320, 32, seed=s), normal(320, 32, seed=s + 99) @ mixing])).sum()
            for s in range(8)
        ]
    )
    assert found.mean().item() == pytest.approx(truth, rel=0.1)


def test_shrinkage_keeps_a_collapsed_direction_finite():
    draws = normal(2, 400, 4)
    draws[1, :, 0] = 0
    assert not torch.isfinite(low_rank(draws)).all()
    assert torch.isfinite(low_rank(draws, shrinkage=0.01)).all()


def test_duplicates_and_collapses_have_no_spread_for_knn():
    draws = normal(2, 100, 2)
    draws[1] = 3.0
    assert not torch.isfinite(knn(draws)).any()
    assert torch.isnan(knn(normal(2, 3, 2), k=3)).all()


def test_the_nearest_neighbours_are_those_of_brute_force_whatever_the_rows_at_once(monkeypatch):
    from entprune_ds.importance import entropy_draws

    points = normal(1, 50, 3)[0]
    expected = torch.stack([(points - p).norm(dim=1).sort().values[4] for p in points])
    for rows in (7, 1000):
        monkeypatch.setattr(entropy_draws, "ROWS", rows)
        torch.testing.assert_close(entropy_draws._nearest(points, 4), expected, rtol=1e-12, atol=0)


def test_the_basis_is_white_for_the_full_model_and_holds_its_largest_directions():
    sigma = torch.tensor([0.1, 3, 1, 10], dtype=torch.float64).view(4, 1, 1)
    m = toy_check(lambda x: x, shape=(4, 2, 2), source=lambda z, t, y: sigma * z, batch_size=512)
    basis = fit_basis(m, 8, 100)
    assert basis.shape == (16, 8)
    weight = basis.abs().view(4, 4, 8).amax((1, 2))
    assert (weight[[0, 2]] < 0.2 * weight[[1, 3]].min()).all()  # elements of channels 1 and 3
    x = toy_check(lambda x: x, source=lambda z, t, y: sigma * z, seed=7).draw("new", 20000).z_t.flatten(1)
    torch.testing.assert_close(torch.cov((x @ basis).T), torch.eye(8, dtype=torch.float64), rtol=0, atol=0.35)


def test_a_model_without_spread_has_no_entropy_but_its_other_scores():
    m = toy_check(lambda x: 0 * x, estimator="low_rank", rank=4)
    assert "ced" not in measure_sweep(m) and "loss" in measure_sweep(m)
    with pytest.raises(RuntimeError, match=r"check 0: more than 1% of the 1 entropy terms have no spread"):
        measure_sweep(toy_check(lambda x: 0 * x, estimator="knn", knn_dim=4), entropy_needed=True)


@pytest.mark.parametrize(
    "few", [dict(draws=2, batch_size=1), dict(draws=64, batch_size=32, estimator="knn", knn_dim=2, knn_k=40)]
)
def test_an_error_of_0_for_want_of_draws_is_no_certainty(few):
    with pytest.raises(RuntimeError, match=r"says nothing once a group of draws is left out.*Raise `score.draws`"):
        measure_sweep(toy_check(lambda x: x / 2, **few), entropy_needed=True)
    assert "ced" not in measure_sweep(toy_check(lambda x: x / 2, **few))


def test_a_number_that_is_not_finite_is_named_while_the_basis_is_fitted():
    m = toy_check(lambda x: x, lambda x: x / 0, estimator="knn")
    with pytest.raises(RuntimeError, match=r"check 0: the output of block 1 is NaN or infinite"):
        measure_sweep(m)


def test_an_entropy_of_one_term_has_no_absolute_form_of_its_own():
    for estimator in ("knn", "scalar"):
        found = measure_sweep(toy_check(lambda x: x / 2, estimator=estimator, knn_dim=2))
        assert "ced" in found and "ced_abs" not in found


@pytest.mark.parametrize("estimator", ["per_element", "low_rank", "knn"])
def test_a_block_that_does_nothing_scores_zero_and_one_that_adds_noise_is_negative(estimator):
    m = toy_check(
        lambda x: x, lambda x: x + 5 * torch.sin(40 * x), lambda x: x / 2, estimator=estimator, rank=8, knn_dim=4
    )
    found = measure_sweep(m)
    assert abs(found["ced"][0].value) < 1e-9
    assert found["signed_ced"][1].value < -5 * found["signed_ced"][1].standard_error < 0
    assert found["signed_ced"][2].value > 0


def test_permuted_outputs_keep_their_entropy_and_flipped_signs_every_term():
    order, sign = torch.tensor([3, 2, 1, 0]), torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64)
    sigma = torch.arange(1.0, 5.0, dtype=torch.float64).view(4, 1, 1)
    for estimator in ("per_element", "per_channel"):
        m = toy_check(
            lambda x: x[..., order], lambda x: x * sign, source=lambda z, t, y: sigma * z, estimator=estimator
        )
        found = measure_sweep(m)
        assert found["ced"][0].value < 1e-9 and found["ced_abs"][0].value > 1
        assert found["ced"][1].value < 1e-9 and found["ced_abs"][1].value < 1e-9
        assert found["mse"][1].value > 1 and found["loss"][1].value != 0


# ---------------------------------------------------------------- streaming, ranks, errors


def test_any_split_of_a_group_gives_the_same_entropies():
    outputs, t, labels = normal(3, 60, 2, 2, 2), torch.rand(60), torch.randint(0, 3, (60,))
    cells = Cells(2, (0, 1))
    for estimator in (
        entropy.MomentEstimator(entropy.per_element),
        DrawEstimator(low_rank, normal(8, 3)),
        DrawEstimator(knn, normal(8, 3)),
    ):
        whole, parts = EntropyStatistics(estimator, cells), EntropyStatistics(estimator, cells)
        for group, part in enumerate((slice(0, 30), slice(30, 60))):
            whole.update(group, outputs[:, part], t[part], labels[part])
            for micro in (slice(part.start, part.start + 7), slice(part.start + 7, part.stop), slice(0, 0)):
                parts.update(group, outputs[:, micro], t[micro], labels[micro])
        found = [EntropyGroups(estimator, cells, s.reduce()).differences()[0] for s in (whole, parts)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["low_rank", "knn"])
def test_standard_errors_are_those_of_repeated_draws(estimator):
    settings = dict(shape=(2, 1, 1), draws=256, batch_size=32, estimator=estimator, rank=2, knn_dim=2)
    found = [
        measure_sweep(toy_check(lambda x: x + 2 * torch.tanh(x), seed=s, **settings))["signed_ced"][0]
        for s in range(60)
    ]
    observed = torch.tensor([score.value for score in found]).std().item()
    assert 0.7 < sum(score.standard_error for score in found) / 60 / observed < 1.4


def test_two_ranks_score_with_every_estimator_as_one_process_does():
    first, second = run_ranks("tests.workers.entropy:score_with_every_estimator", world_size=2)
    alone = score_with_every_estimator()
    assert first == second and first.keys() == alone.keys()
    assert {name: first[name]["ced"]["0"]["draws"] for name in first} == {
        n: alone[n]["ced"]["0"]["draws"] for n in alone
    }
    for name, scores in alone.items():
        for criterion, by_block in scores.items():
            for block, score in by_block.items():
                found = first[name][criterion][block]
                for key in ("value", "standard_error"):
                    assert found[key] == pytest.approx(score[key], rel=1e-10, abs=1e-10), (name, criterion, block)


# ---------------------------------------------------------------- settings

REFUSED = """
score.estimator=kde                                             -> scalar, low_rank, knn, got kde
score.basis=dct                                                 -> pca, random
score.until=never                                               -> draws, resolved
score.timestep_buckets=0                                        -> at least 1
score.rank=0                                                    -> at least 1
score.knn_dim=0                                                 -> at least 1
score.knn_k=0                                                   -> at least 1
score.knn_k=17 score.estimator=knn score.draws=64 score.batch_size=32 score.knn_dim=2 -> at most 16, a quarter
score.shrinkage=1                                               -> in [0, 1)
score.confidence=1                                              -> in [0, 1)
score.within_class=[1000]                                       -> different classes below 1000
score.within_class=[3,3]                                        -> different classes below 1000
score.knn_dim=4096 score.estimator=knn                          -> at most 9 for 1024 draws in 1 cells
score.knn_dim=10 score.estimator=knn                            -> at most 9 for 1024 draws
score.knn_dim=8 score.estimator=knn score.timestep_buckets=4    -> at most 7 for 1024 draws in 4 cells
score.rank=103 score.estimator=low_rank                         -> at most 102 for 1024 draws
score.rank=32 score.estimator=low_rank score.timestep_buckets=4 -> at most 25 for 1024 draws in 4 cells
score.draws=1024 score.timestep_buckets=33                      -> at least 1056 for 32 draws in each
score.draws=64 score.batch_size=32 score.within_class=[0,1,2]   -> at least 96 for 32 draws in each
score.max_draws=512 score.until=resolved                        -> at least `score.draws` (1024), got 512
score.until=resolved prune.criterion=random                     -> random does not depend. Set score.until=draws
prune.criterion=ced_abs score.estimator=knn                     -> nothing can cancel
prune.criterion=ced_abs score.estimator=scalar                  -> nothing can cancel
score.rank=20 score.estimator=low_rank model.input_size=4 model.in_channels=1 -> at most the 16 elements
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_an_estimator_cannot_do_is_refused_before_anything_starts(line):
    words, _, expected = line.partition(" -> ")
    with pytest.raises(ValueError) as error:
        load_config(words.split())
    [problem] = str(error.value).strip().splitlines()
    assert expected in problem and f"`{words.split('=')[0]}`" in problem


def test_the_borders_of_what_an_estimator_can_do_are_accepted():
    for words in (
        "score.estimator=knn score.knn_dim=9",
        "score.estimator=low_rank score.rank=102",
        "score.timestep_buckets=32",
        "score.within_class=[0,5,7] score.timestep_buckets=2",
        "score.until=resolved score.max_draws=1024 prune.criterion=loss",
        "score.estimator=knn score.timestep_buckets=2 prune.criterion=ced_abs score.confidence=0",
    ):
        load_config(words.split())
