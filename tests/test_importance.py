"""Scores against brute force, planted truths, and what scoring must leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from entprune_ds import config_checks_prune
from entprune_ds.importance import ntk, zico
from entprune_ds.importance.criteria import CRITERIA, CRITERIA_NEED_SWEEP, removal_order
from entprune_ds.importance.moments import Moments, merge, moments_of, zero_moments
from entprune_ds.importance.ntk import condition_number, layer_gram, ntk_gram, ntk_score
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.scores import Score, Scores, left_out_terms, score_blocks
from entprune_ds.importance.sweep import leave_one_out
from entprune_ds.importance.sweep_statistics import GroupStatistics, SweepStatistics
from entprune_ds.importance.walk import backward_walk
from entprune_ds.importance.zico import zico_score
from tests.ranks import run_ranks
from tests.reference import gradients
from tests.reference.leave_one_out import brute_force_outputs, brute_force_scores
from tests.reference.scoring_job import projection, score_everything
from tests.reference.toys import CountingParts, ToyModel, draws, mean_squared, random_dit


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def toy_scores(model: ToyModel, groups: int, draws_per_group: int, seed: int = 0) -> Scores:
    """Scores of a toy on four channels of sigmas 1, 2, 3, 4; its target is its own full output."""
    kept, parts = [int(b) for b in model.blocks], ModuleParts(model)
    statistics = SweepStatistics(kept, groups, (4, 2, 2), torch.device("cpu"))
    for group in range(groups):
        sigma = torch.arange(1.0, 5.0, dtype=torch.float64).view(4, 1, 1)
        z_t = normal(draws_per_group, 4, 2, 2, seed=1000 * seed + group) * sigma
        outputs = leave_one_out(parts, kept, z_t, z_t[:, 0, 0, 0], torch.zeros(len(z_t), dtype=torch.int64))
        statistics.update(group, outputs, outputs[0], z_t[:, 0, 0, 0], mean_squared)
    return score_blocks(statistics.reduce(), kept)


# ---------------------------------------------------------------- moments


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0.0, 1e6, -1e9]))
def test_moments_of_any_split_merge_to_those_of_the_whole(sizes, offset):
    x = normal(sum(sizes), 3) + offset
    merged = zero_moments((3,))
    for part in x.split(sizes):
        merged = merge(merged, moments_of(part))
    assert merged.count == len(x)
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    tolerance = 1e-12 if offset == 0 else 1e-15 * abs(offset)  # the data themselves carry this rounding
    torch.testing.assert_close(merged.variance(), (x - offset).var(0, correction=0), rtol=tolerance, atol=tolerance)


def test_merging_identical_moments_keeps_mean_and_variance():
    one = moments_of(normal(50, 4) * 3 + 7)
    merged = merge(merge(one, one), merge(one, one))
    assert merged.count == 200
    torch.testing.assert_close(merged.mean, one.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.variance(), one.variance(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [0.1, 1e8 + 0.1, -1e300])
def test_a_constant_has_a_spread_of_exactly_zero(value):
    constant = torch.full((7, 2), value, dtype=torch.float64)
    assert torch.equal(merge(moments_of(constant), moments_of(constant[:3])).m2, torch.zeros(2, dtype=torch.float64))


# ---------------------------------------------------------------- sweep


@pytest.mark.parametrize("chunk", [None, 1, 5, 1000])
def test_sweep_equals_brute_force_leave_one_out(chunk):
    model = random_dit(kept_blocks=(1, 2, 10, 11), depth=13)
    z_t, t, labels, _ = draws(model, 6)
    outputs = leave_one_out(ModuleParts(model), [1, 2, 10, 11], z_t, t, labels, chunk)
    expected = brute_force_outputs(model, z_t, t, labels)
    assert outputs.shape == (5, 6, 1, 4, 4)
    assert max(difference(o, e) for o, e in zip(outputs, expected, strict=True)) <= 1e-10
    assert difference(outputs[1], expected[0]) > 1e-3  # the blocks do matter


def test_sweep_of_28_blocks_evaluates_406_and_obtains_each_once():
    parts = CountingParts(ToyModel(*[lambda x: x + 1] * 28))
    leave_one_out(parts, list(range(28)), normal(3, 1, 2, 2), normal(3), torch.zeros(3, dtype=torch.int64), chunk=10)
    assert parts.samples == 406 * 3 and parts.largest_call == 10
    assert parts.requests == list(range(28))


def test_single_precision_scores_move_little_with_the_micro_batch():
    model, kept = random_dit().float(), list(range(5))
    z_t, t, labels, target = draws(model, 64)
    scores = []
    for chunk in (None, 1):
        statistics = SweepStatistics(kept, 2, (1, 4, 4), torch.device("cpu"))
        for group, part in enumerate((slice(32), slice(32, 64))):
            outputs = leave_one_out(ModuleParts(model), kept, z_t[part], t[part].float(), labels[part], chunk)
            assert outputs.dtype == torch.float32
            statistics.update(group, outputs, target[part], t[part], mean_squared)
        scores.append(score_blocks(statistics.reduce(), kept))
    for b in kept:
        allowed = 1e-6 * scores[0]["ced_abs"][b].value + 1e-6 * 16
        assert abs(scores[0]["ced"][b].value - scores[1]["ced"][b].value) <= allowed


def test_a_rank_without_draws_of_a_batch_adds_nothing():
    model, kept = random_dit(depth=2), [0, 1]
    z_t, t, labels, target = draws(model, 0)
    statistics = SweepStatistics(kept, 2, (1, 4, 4), torch.device("cpu"))
    for chunk in (None, 5):
        outputs = leave_one_out(ModuleParts(model), kept, z_t, t, labels, chunk)
        assert outputs.shape == (3, 0, 1, 4, 4)
        statistics.update(1, outputs, target, t, mean_squared)
    with pytest.raises(ValueError, match=r"batches \[0, 1\] have no draws"):
        statistics.reduce()


def test_scores_and_standard_errors_equal_brute_force():
    model = random_dit()
    kept, parts = list(range(5)), ModuleParts(model)
    z_t, t, labels, target = draws(model, 40)
    groups = [list(range(i, i + 10)) for i in range(0, 40, 10)]
    statistics = SweepStatistics(kept, 4, (1, 4, 4), torch.device("cpu"))
    for number, group in enumerate(groups):
        for part in (group[:3], group[3:]):  # micro-batches
            outputs = leave_one_out(parts, kept, z_t[part], t[part], labels[part])
            statistics.update(number, outputs, target[part], t[part], mean_squared)
    scores = score_blocks(statistics.reduce(), kept)
    expected = brute_force_scores(brute_force_outputs(model, z_t, t, labels), target, groups)
    assert scores.keys() == expected.keys()
    for name, (values, errors) in expected.items():
        assert difference(torch.tensor([scores[name][b].value for b in kept], dtype=torch.float64), values) <= 1e-10
        assert (
            difference(torch.tensor([scores[name][b].standard_error for b in kept], dtype=torch.float64), errors)
            <= 1e-9
        )


def test_jackknife_error_is_that_of_repeated_draws():
    """The scatter of scores over fresh draws agrees with the standard error that each of them states."""
    model = ToyModel(lambda x: x + 2 * torch.tanh(x))
    repeats = [toy_scores(model, 8, 32, seed=1 + repeat) for repeat in range(60)]
    for name in ("signed_ced", "ced_abs", "loss", "mse"):
        observed = torch.tensor([scores[name][0].value for scores in repeats]).std().item()
        stated = sum(scores[name][0].standard_error for scores in repeats) / len(repeats)
        assert 0.7 < stated / observed < 1.4


# ---------------------------------------------------------------- planted truths


def test_planted_blocks_get_the_sign_and_size_that_they_must():
    permute, flip = torch.tensor([3, 2, 1, 0]), torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64)
    noisy, contracting = (lambda x: x + 5 * torch.sin(40 * x)), (lambda x: x / 2)
    model = ToyModel(lambda x: x, noisy, contracting, lambda x: x[..., permute], lambda x: x * flip, first_index=10)
    scores = toy_scores(model, 4, 64)
    for name in scores:  # 10: identity
        assert abs(scores[name][10].value) <= 1e-12
    assert scores["signed_ced"][11].value < -5 * scores["signed_ced"][11].standard_error  # 11: adds noise
    assert math.isclose(scores["signed_ced"][12].value, 16 * math.log(2), rel_tol=1e-12)  # 12: halves 16 elements
    assert scores["ced"][11].value == -scores["signed_ced"][11].value
    assert abs(scores["ced"][13].value) <= 1e-11 and scores["ced_abs"][13].value > 0.1  # 13: permutes channels
    assert abs(scores["ced_abs"][14].value) <= 1e-11  # 14: flips signs
    assert scores["mse"][14].value > 1 and scores["loss"][14].value > 1


def test_elements_without_spread_are_left_out_counted_and_limited():
    def groups(dead: int) -> list[GroupStatistics]:
        m2, zeros = torch.ones(2, 400, dtype=torch.float64) * 8, torch.zeros(2, dtype=torch.float64)
        m2[1, :dead] = 0
        return [GroupStatistics(Moments(8, torch.zeros_like(m2), m2), zeros, zeros)] * 2

    assert left_out_terms(groups(4), [7]) == {7: 4}
    assert score_blocks(groups(4), [7])["ced"][7].value == 0  # 1 %: the others have equal spread
    with pytest.raises(ValueError, match=r"block 7: 5"):
        score_blocks(groups(5), [7])
    assert set(score_blocks(groups(5), [7], entropy_needed=False)) == {"loss", "mse", "ld_pruner"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [([3], "when block 12 is dropped"), ([0, 1, 3], "because of block 11"), ([0, 1, 2, 3], "whichever of blocks")],
)
def test_an_output_that_is_not_finite_is_an_error_that_names_block_and_batch(bad, message):
    statistics = SweepStatistics([10, 11, 12], 5, (1, 2, 2), torch.device("cpu"))
    outputs = normal(4, 6, 1, 2, 2)
    outputs[bad, 2, 0, 1, 1] = math.nan
    statistics.update(4, outputs, outputs[0].nan_to_num(), torch.zeros(6), mean_squared)
    with pytest.raises(RuntimeError, match=rf"{message}.*calibration batch 4"):
        statistics.reduce()


# ---------------------------------------------------------------- order of removal


def scored(**values: float) -> dict:
    return {"loss": {int(k[1:]): Score(v, 0.0) for k, v in values.items()}}


def test_lowest_score_goes_first_and_ties_go_to_the_higher_index():
    assert removal_order("loss", scored(b0=1, b2=0, b5=0, b7=-1), [0, 2, 5, 7], target_depth=1) == [7, 5, 2, 0]


def test_a_score_that_is_missing_or_not_finite_removes_nothing():
    with pytest.raises(ValueError, match=r"blocks \[1, 2\] have no finite `loss`"):
        removal_order("loss", scored(b0=1, b1=math.nan), [0, 1, 2], target_depth=1)


def test_random_order_depends_on_the_seed_and_is_the_same_at_every_check():
    first = removal_order("random", {}, range(12), target_depth=4, seed=1, check=0)
    rest = [b for b in range(12) if b not in first[:5]]
    assert removal_order("random", {}, rest, target_depth=4, seed=1, check=3) == first[5:]
    assert removal_order("random", {}, range(12), target_depth=4, seed=2) != first
    assert sorted(first) == list(range(12))


@pytest.mark.parametrize("steps", [(14,), (1, 6, 7), (3, 3, 4, 4), (1,) * 14])
def test_every_other_reaches_the_published_set_however_many_checks_it_takes(steps):
    kept = list(range(28))
    for number in steps:
        kept = sorted(removal_order("every_other", {}, kept, target_depth=14)[number:])
    assert kept == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 27), min_size=1, max_size=28), st.integers(1, 28))
def test_every_other_orders_all_blocks_and_keeps_both_ends_to_the_last(blocks, target):
    kept = sorted(blocks)
    order = removal_order("every_other", {}, kept, target_depth=target)
    assert sorted(order) == kept
    assert order[-1] == kept[0] and (len(kept) == 1 or order[-2] == kept[-1])


def test_every_other_spreads_the_first_removals():
    order = removal_order("every_other", {}, range(12), target_depth=6)
    assert all(abs(a - b) > 2 for a in order[:3] for b in order[:3] if a != b)


def test_explicit_order_skips_what_is_gone_and_ends_with_what_is_not_listed():
    assert removal_order("explicit", {}, [0, 1, 3, 4], target_depth=1, explicit_order=[3, 2, 0]) == [3, 0, 4, 1]


def test_table_of_criteria_is_that_of_the_config():
    assert tuple(CRITERIA) == config_checks_prune.CRITERIA
    assert {*config_checks_prune.SWEEP_CRITERIA, "recovery_race"} == CRITERIA_NEED_SWEEP
    with pytest.raises(ValueError, match=r"criterion `speed` is not known"):
        removal_order("speed", {}, [0], target_depth=1)


# ---------------------------------------------------------------- NTK and ZiCo


def test_walk_sees_exactly_the_linear_layers_of_every_block_from_last_to_first():
    model = random_dit(kept_blocks=(1, 4))
    z_t, t, labels, _ = draws(model, 3)
    parts, seen = CountingParts(model), []
    for index, records in backward_walk(parts, [1, 4], z_t, t, labels, torch.ones_like):
        seen.append(index)
        covered = {id(p) for r in records.values() for p in r.module.parameters()}
        assert sum(p.numel() for b in [parts.block(index)] for p in b.parameters()) == sum(
            r.module.weight.numel() + r.module.bias.numel() for r in records.values()
        )
        assert len(covered) == 2 * len(records) == 10
        assert records["adaLN_modulation.1"].activation.shape == (3, 1, 16)
        assert records["mlp.fc1"].gradient.shape == (3, 4, 64)
    assert seen == [4, 1]


def test_ntk_gram_equals_per_sample_autograd():
    model = random_dit(kept_blocks=(1, 2, 10), depth=12)
    z_t, t, labels, _ = draws(model, 5)
    vector = projection(0, (1, 4, 4))
    gram = ntk_gram(ModuleParts(model), [1, 2, 10], z_t, t, labels, lambda p: vector.expand_as(p))
    assert difference(gram, gradients.ntk_gram(model, z_t, t, labels, vector)) <= 1e-12


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7])
def test_both_gram_formulas_agree_in_any_chunk(has_bias, tokens):
    a, g = normal(6, tokens, 5), normal(6, tokens, 9, seed=1)
    rows = torch.einsum("nto,nti->noi", g, a).flatten(1)
    expected = rows @ rows.T + (g.sum(1) @ g.sum(1).T if has_bias else 0)
    for formula in ("pairs", "gradients", None):
        for chunk in (1, 100, 10**6):
            assert difference(layer_gram(a, g, has_bias, formula, chunk), expected) <= 1e-12


def test_the_cheaper_gram_formula_is_taken(monkeypatch):
    taken: list[str] = []
    for name in ("_gram_of_pairs", "_gram_of_gradients"):
        monkeypatch.setattr(ntk, name, lambda a, g, chunk, name=name: (taken.append(name), a.new_zeros(1, 1))[1])
    layer_gram(normal(16, 256, 1), normal(16, 256, 1), has_bias=False)  # thin: explicit gradients
    layer_gram(normal(16, 1, 1152), normal(16, 1, 6912), has_bias=False)  # adaLN: pairs
    assert taken == ["_gram_of_gradients", "_gram_of_pairs"]


def test_condition_number_is_invalid_when_the_kernel_is_singular():
    rows = normal(6, 20)
    values = torch.linalg.svdvals(rows)
    assert math.isclose(condition_number(rows @ rows.T), (values[0] / values[-1]).item() ** 2, rel_tol=1e-9)
    deficient = normal(6, 4)
    assert condition_number(deficient @ deficient.T) is None
    assert condition_number(torch.tensor([1.0, 1e-16], dtype=torch.float64).diag()) is None  # positive by rounding
    assert condition_number(-torch.eye(3, dtype=torch.float64)) is None
    assert condition_number(torch.zeros(3, 3, dtype=torch.float64)) is None
    assert condition_number(torch.full((2, 2), math.nan, dtype=torch.float64)) is None


def test_ntk_median_needs_a_majority_of_valid_repeats():
    model = random_dit(depth=2)

    def draw(invalid: set[int]):
        def of_repeat(repeat: int):
            z_t, t, labels, _ = draws(model, 4, step=repeat)
            same = torch.zeros(4, dtype=torch.int64)  # all samples alike: a singular kernel
            return (z_t[same], t[same], labels[same]) if repeat in invalid else (z_t, t, labels)

        return of_repeat

    valid = ntk_score(ModuleParts(model), [0, 1], draw(set()), projection, 3)
    one_lost = ntk_score(ModuleParts(model), [0, 1], draw({1}), projection, 3)
    assert valid.median == sorted(valid.repeats)[1]
    assert one_lost.repeats == [valid.repeats[0], None, valid.repeats[2]]
    assert one_lost.median == (valid.repeats[0] + valid.repeats[2]) / 2
    assert ntk_score(ModuleParts(model), [0, 1], draw({0, 2}), projection, 3).median is None


@pytest.mark.parametrize("batches_per_walk", [None, 1, 3])
def test_zico_equals_brute_force(batches_per_walk):
    model = random_dit(depth=3)
    score = zico_score(
        ModuleParts(model), [0, 1, 2], lambda b: draws(model, 4, step=b), mean_squared, 7, batches_per_walk
    )
    layers = gradients.zico_layers(model, [draws(model, 4, step=b) for b in range(7)])
    assert len(layers) == 15 and score.skipped == 0
    assert math.isclose(score.total, sum(layers), rel_tol=1e-12)
    assert math.isclose(score.mean, sum(layers) / 15, rel_tol=1e-12)


def test_zico_keeps_its_digits_when_the_spread_is_far_below_the_mean():
    g = 1e3 + 1e-6 * normal(8, 5, 3)
    ratio, without_spread = zico._layer_ratio(list(g), 8, 8)
    assert without_spread == 0
    assert math.isclose(ratio, (g.abs().mean(0) / g.std(0, correction=0)).sum().item(), rel_tol=1e-6)


def test_zico_skips_and_counts_weights_without_spread():
    model = random_dit(depth=2)
    with torch.no_grad():
        model.blocks["0"].mlp.fc2.weight[:, 5] = 0  # hidden unit 5 gives nothing: its 16 input weights have no gradient
    score = zico_score(ModuleParts(model), [0, 1], lambda b: draws(model, 4, step=b), mean_squared, 5)
    layers = gradients.zico_layers(model, [draws(model, 4, step=b) for b in range(5)])
    assert score.skipped == 16
    assert math.isclose(score.total, sum(layers), rel_tol=1e-12)
    same = zico_score(ModuleParts(model), [0, 1], lambda b: draws(model, 4), mean_squared, 5)
    assert same.mean is None and same.skipped == sum(
        m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear)
    )


# ---------------------------------------------------------------- ranks, and what must stay as it is


def test_two_ranks_score_as_one_process_does_and_agree_to_the_bit():
    first, second = run_ranks("tests.reference.scoring_job:score_everything", world_size=2, timeout=280)
    alone = score_everything()
    assert first == second  # JSON keeps every bit; the same requests in the same order, the same error

    def numbers(result: dict) -> list[float]:
        scores = [v for by_block in result["scores"].values() for s in by_block.values() for v in s.values()]
        return scores + result["ntk"] + result["zico"]

    assert numbers(first) == pytest.approx(numbers(alone), rel=1e-10, abs=0)
    assert alone["problem"] == first["problem"]
    assert "when block 2 is dropped, in calibration batch 2" in first["problem"]


def test_scoring_leaves_the_model_its_gradients_its_hooks_and_the_global_rng_alone():
    model = random_dit(depth=3).train()
    fired: list[str] = []
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, 3.0)
        p.register_hook(lambda g, name=name: fired.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    weights, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    parts, kept = ModuleParts(model), [0, 1, 2]
    z_t, t, labels, target = draws(model, 4)
    statistics = SweepStatistics(kept, 2, (1, 4, 4), torch.device("cpu"))
    for group in range(2):
        statistics.update(group, leave_one_out(parts, kept, z_t, t, labels), target, t, mean_squared)
    removal_order("random", score_blocks(statistics.reduce(), kept), kept, target_depth=1)
    ntk_score(parts, kept, lambda r: (z_t, t, labels), projection, 1)
    zico_score(parts, kept, lambda b: draws(model, 4, step=b), mean_squared, 2)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not fired and all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_live_parameters_that_require_gradients_get_none_from_the_walk():
    """A sharded engine hands out its live blocks: no gradient may reach their parameters."""
    model, fired = random_dit(depth=2), []

    class LiveParts(ModuleParts):
        def block(self, index: int) -> nn.Module:
            return model.blocks[str(index)]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    z_t, t, labels, _ = draws(model, 3)
    for _ in backward_walk(LiveParts(model), [0, 1], z_t, t, labels, torch.ones_like):
        pass
    assert not fired and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_parts_are_in_evaluation_mode_frozen_and_in_the_asked_precision():
    model = random_dit(depth=2).float().train()
    parts = ModuleParts(model, torch.float64)
    block = parts.block(1)
    assert not block.training and all(p.dtype == torch.float64 and not p.requires_grad for p in block.parameters())
    x, _ = parts.embed(torch.zeros(1, 1, 4, 4, dtype=torch.float64), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert x.dtype == torch.float64 and parts.head(x, x[:, 0]).dtype == torch.float64
    with pytest.raises(ValueError, match=r"block 9 is not in the model, which has 0, 1"):
        parts.block(9)
