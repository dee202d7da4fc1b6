"""Units, modes, memory and criteria of the one sweep, against brute force and planted truths."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from entprune_ds.config import Config, ModelConfig, ScoreConfig, problems_of
from entprune_ds.config_checks_prune import SWEEP_CRITERIA
from entprune_ds.importance import greedy
from entprune_ds.importance.criteria import removal_order
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.scores import Score, Scores, scores_as_json
from entprune_ds.importance.stack_memory import KeptStreams, stack_problem
from entprune_ds.importance.sweep import stream_change, sweep
from entprune_ds.preflight import training_problems
from tests.ranks import run_ranks
from tests.reference.greedy import greedy_order, own_changes
from tests.reference.leave_one_out import brute_force_outputs, brute_force_scores
from tests.reference.toys import CountingParts, ToyModel, draws, random_dit
from tests.workers.sweep import check, greedy_with_branches, ranked

Function = Callable[[Tensor], Tensor]


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


def without_branch(model: nn.Module, index: int, branch: str) -> nn.Module:
    """The model with the gate of a branch at 0 for every conditioning."""
    model, gate = copy.deepcopy(model), {"attention": 2, "mlp": 5}[branch]
    linear = model.blocks[str(index)].adaLN_modulation[1]
    with torch.no_grad():
        for tensor in (linear.weight, linear.bias):
            tensor.chunk(6)[gate].zero_()
    return model


# ---------------------------------------------------------------- branches


def test_the_two_branches_one_after_the_other_are_the_block_to_the_bit():
    block = random_dit().float().blocks["2"]
    x, c = torch.randn(3, 4, 16), torch.randn(3, 16)
    first = block(x, c, without="mlp")
    assert torch.equal(block(first, c, without="attention"), block(x, c))
    assert not torch.allclose(first, x) and not torch.allclose(block(x, c, without="attention"), x)


@pytest.mark.parametrize("chunk", [None, 4])
def test_branches_left_out_equal_brute_force(chunk):
    model = random_dit(kept_blocks=(1, 3, 10), depth=12)
    z_t, t, labels, _ = draws(model, 6)
    found = sweep(ModuleParts(model), [1, 3, 10], z_t, t, labels, ("block", "attention", "mlp"), chunk)
    whole = brute_force_outputs(model, z_t, t, labels)
    assert found.outputs.shape[0] == 10 and found.changes.shape == (9, 2, 6)
    assert difference(found.outputs[0], whole[0]) <= 1e-10
    with torch.no_grad():
        for place, index in enumerate([1, 3, 10]):
            expected = [whole[1 + place]]
            expected += [without_branch(model, index, branch)(z_t, t, labels) for branch in ("attention", "mlp")]
            for unit, output in enumerate(expected):
                assert difference(found.outputs[1 + 3 * place + unit], output) <= 1e-10
                assert difference(output, whole[0]) > 1e-3  # the branch does matter


def test_branch_scores_stand_beside_those_of_the_blocks_and_leave_them_as_they_are():
    model = random_dit()
    columns = draws(model, 24)
    alone = measure_sweep(check(ModuleParts(model), list(range(5)), columns, "loss", 6))
    both = measure_sweep(check(ModuleParts(model), list(range(5)), columns, "loss", 6, unit="mlp"))
    assert {name for name in both if "/" not in name} == set(alone)
    assert {name for name in both if "/" in name} == {f"{name}/mlp" for name in alone}
    for name, by_block in alone.items():
        for b, score in by_block.items():
            assert math.isclose(both[name][b].value, score.value, rel_tol=1e-10)
    groups = [list(range(i, i + 6)) for i in range(0, 24, 6)]
    z_t, t, labels, target = columns
    with torch.no_grad():
        outputs = [model(z_t, t, labels), *(without_branch(model, i, "mlp")(z_t, t, labels) for i in range(5))]
    for name, (values, errors) in brute_force_scores(torch.stack(outputs), target, groups).items():
        for b, score in both[f"{name}/mlp"].items():
            assert math.isclose(score.value, values[b], rel_tol=1e-9)
            assert math.isclose(score.standard_error, errors[b], rel_tol=1e-8)


# ---------------------------------------------------------------- scores of the clean stream


def test_flux_lite_and_shortgpt_with_their_standard_errors_equal_brute_force():
    model = random_dit()
    z_t, t, labels, _ = columns = draws(model, 24)
    scores = measure_sweep(check(ModuleParts(model), list(range(5)), columns, "shortgpt", 6))
    expected = own_changes(model, z_t, t, labels)
    groups = [own_changes(model, *(c[i : i + 6] for c in (z_t, t, labels))) for i in range(0, 24, 6)]
    for name in ("flux_lite", "shortgpt"):
        rest = torch.stack([(sum(g[name] for g in groups) - own[name]) / 3 for own in groups])
        for b in range(5):
            assert math.isclose(scores[name][b].value, expected[name][b], rel_tol=1e-10)
            assert math.isclose(scores[name][b].standard_error, rest[:, b].std(correction=0) * 3**0.5, rel_tol=1e-9)


def test_a_stream_does_not_differ_from_itself_not_even_where_it_is_zero():
    x = torch.randn(4, 5, 3)
    x[1, 2] = 0
    assert stream_change(x, x.clone(), chunk=3).abs().max() == 0
    turned = stream_change(x, -x, chunk=3)
    assert turned[1, 0] == pytest.approx(2) and turned[0, 0] == pytest.approx(4 * x[0].double().square().mean().item())


# ---------------------------------------------------------------- planted truths


def symmetric(count: int, seed: int = 0) -> Tensor:
    """z_t (N,4,2,2) f64 of sigmas 1e-4, 2, 3, 4, one half the mirror of the other: every mean is exactly 0."""
    half = torch.randn(count // 2, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    half = half * torch.tensor([1e-4, 2, 3, 4], dtype=torch.float64).view(4, 1, 1)
    return torch.stack([half, -half], 1).flatten(0, 1)


def toy_scores(*functions: Function, target: Function | None = None) -> Scores:
    """Scores of a toy; its target is its own full output, or a function of the stream."""
    model, z_t = ToyModel(*functions), symmetric(256)
    wanted = functions if target is None else (target,)
    y = z_t.flatten(2).transpose(1, 2)
    for function in wanted:
        y = function(y)
    columns = (z_t, z_t[:, 0, 0, 0], torch.zeros(len(z_t), dtype=torch.int64), y.transpose(1, 2).unflatten(2, (2, 2)))
    return measure_sweep(check(ModuleParts(model), list(range(len(functions))), columns, "ced", 64))


def channels(*factors: float, shift: tuple[float, ...] = (0, 0, 0, 0)) -> Function:
    """A block that scales and shifts the four channels."""
    scale, offset = torch.tensor(factors, dtype=torch.float64), torch.tensor(shift, dtype=torch.float64)
    return lambda x: x * scale + offset


def test_an_identity_block_scores_0_on_every_leave_one_out_criterion():
    scores = toy_scores(channels(2, 1, 1, 3), lambda x: x, lambda x: x + torch.sin(40 * x))
    assert set(scores) == {*SWEEP_CRITERIA, "signed_ced"}
    for name, by_block in scores.items():
        assert by_block[1].value == 0, name
        assert all(abs(by_block[b].value) > 1e-3 for b in (0, 2)), name


def test_dropping_noise_is_negative_and_dropping_a_contraction_positive():
    scores = toy_scores(lambda x: x + 5 * torch.sin(40 * x), lambda x: x / 2)["signed_ced"]
    assert scores[0].value < -5 * scores[0].standard_error
    assert scores[1].value == pytest.approx(16 * math.log(2))


def test_flipped_signs_are_caught_by_the_deviation_and_the_loss_alone_of_what_looks_at_the_output():
    scores = toy_scores(channels(-1, 1, -1, 1), lambda x: x)
    for name in ("ced", "ced_abs", "signed_ced", "ld_pruner"):
        assert abs(scores[name][0].value) <= 1e-12
    assert scores["mse"][0].value > 1 and scores["loss"][0].value > 1


MARK = channels(1, 1, 1, 1, shift=(0.01, 0, 0, 0))
"""A step far below the others, that channel 0 (sigma 1e-4) carries to a block that looks for it."""


def marked(x: Tensor) -> Tensor:
    return x[..., :1] > 0.005


def flip_what_is_marked(x: Tensor) -> Tensor:
    """Takes the mark away and turns the sign."""
    return torch.where(marked(x), -(x - torch.tensor([0.01, 0, 0, 0], dtype=x.dtype)), x)


def forget_length(x: Tensor) -> Tensor:
    """Channels 1 to 3 at length 1 and their sum in channel 0; times -3 what is marked."""
    rest = x[..., 1:] / x[..., 1:].norm(dim=-1, keepdim=True)
    return torch.cat([rest.sum(-1, keepdim=True), rest], -1) * torch.where(marked(x), -3.0, 1.0)


SMALL = channels(1, 1, 1, 1.01)
ALONE: dict[str, tuple[list[Function], Function | None]] = {
    # block 0 changes everything, but the target is what the model makes of it without; 1 matters to the loss
    "loss": ([channels(2, 3, 0.5, 2, shift=(0, 5, 0, 0)), SMALL], SMALL),
    # block 0 does nearly nothing; what 1 marks, 2 flips: no spread, no mean and no norm of the output tells
    "mse": ([channels(1, 0.98, 0.97, 0.99), MARK, flip_what_is_marked], lambda x: 0 * x),
    # block 0 flips, and doubles a spread that is tiny; 1 moves the mean of the output
    "ld_pruner": ([channels(2, -1, -1, -1), channels(1, 1, 1, 1, shift=(0, 0, 0, 0.5))], None),
    # block 0 takes the smallest step, of which 2 makes much; the long step of 1 is straight, and 2 forgets it
    "flux_lite": ([MARK, channels(1.5, 1.5, 1.5, 1.5), forget_length], None),
    # block 0 takes a long step straight on; 1 a short one aside
    "shortgpt": ([channels(3, 3, 3, 3), channels(1, 1, 1, 1, shift=(0.1, 0, 0, 0))], None),
    # block 0 exchanges spreads, which cancels in the sum; 1 changes every one by little
    "ced": ([lambda x: x.flip(-1), channels(1.01, 1.01, 1.01, 1.01)], None),
    # block 0 flips and moves the mean, and leaves every spread; 1 shifts spread from one channel to another
    "ced_abs": ([channels(1.001, -1.001, -1.001, -1.001, shift=(0, 1, 0, 0)), channels(1, 1.05, 1 / 1.05, 1)], None),
}


@pytest.mark.parametrize("right", SWEEP_CRITERIA)
def test_every_sweep_criterion_has_a_case_that_it_alone_ranks_right(right):
    functions, target = ALONE[right]
    scores = toy_scores(*functions, target=target)
    first = {name: removal_order(name, scores, range(len(functions)), target_depth=1)[0] for name in SWEEP_CRITERIA}
    assert [name for name, block in first.items() if block == 0] == [right], scores


# ---------------------------------------------------------------- greedy


def rank_by(criterion: str) -> greedy.Order:
    return lambda scores, kept: removal_order(criterion, scores, kept, target_depth=1)


def stacked(depth: int, first: int = 0) -> int:
    """Block evaluations per draw of a sweep that starts before block `first`."""
    return sum(range(first + 1, depth + 1))


@pytest.mark.parametrize("criterion", SWEEP_CRITERIA)
def test_greedy_equals_brute_force_greedy_and_computes_no_stream_twice(criterion):
    model, kept = random_dit(seed=3, kept_blocks=(0, 2, 3, 5, 8, 9), depth=10), [0, 2, 3, 5, 8, 9]
    columns, parts = draws(model, 12), CountingParts(model)
    m = check(parts, kept, columns, criterion, 6, mode="greedy")
    scores, order = ranked(m, 4)
    expected, rounds = greedy_order(model, criterion, columns, 4)
    assert order == expected
    recorded = json.loads(json.dumps(scores_as_json(scores)))  # what decisions.jsonl holds is enough
    plain = {n: {int(b): Score(**v) for b, v in by_block.items()} for n, by_block in recorded.items()}
    assert greedy.greedy_order(plain, criterion, tuple(kept), rank_by(criterion)) == order
    left = list(kept)
    for number, values in enumerate(rounds):
        found = scores[criterion if number == 0 else f"{criterion}/greedy{number}"]
        assert list(found) == left
        assert difference(torch.tensor([s.value for s in found.values()], dtype=torch.float64), values) <= 1e-10
        left.remove(order[number])
    left, evaluations, gathers = list(kept), stacked(6), 6
    for block in order[:3]:
        place = left.index(block)
        left.remove(block)
        evaluations, gathers = evaluations + stacked(len(left), place), gathers + len(left) - place
    assert parts.samples == 12 * evaluations < 12 * (stacked(6) + stacked(5) + stacked(4) + stacked(3))
    assert len(parts.requests) == 2 * gathers


def test_greedy_keeps_no_more_streams_than_the_memory_holds_and_finds_the_same():
    model = random_dit(depth=6)
    columns, orders, samples = draws(model, 256), [], []
    for limit in (1, 8192):
        parts = CountingParts(model)
        m = check(parts, list(range(6)), columns, "loss", 128, mode="greedy", stack_memory=limit)
        orders.append(ranked(m, 4)[1])
        samples.append(parts.samples)
    kept = KeptStreams(check(parts, list(range(6)), columns, "loss", 128, stack_memory=1).config, 1, 6)
    assert (kept.free_rows, kept.stride) == (9, 3)  # of 16 rows of 64 KiB the stack takes 7; 2 batches of 4 rows fit
    offered, changes = torch.zeros(4, 128, 4, 16, dtype=torch.float64), torch.zeros(3, 2, 128)
    for batch in range(3):  # one more than the settings say
        kept.of(batch).offer([0, 1, 2], offered, changes)
    assert [kept.of(batch).take(range(6)) is None for batch in range(3)] == [False, False, True]
    assert kept.of(0).take([0, 1, 3, 4, 5]) is None and kept.rows == 4  # block 2 is gone
    assert orders[0] == orders[1] == greedy_order(model, "loss", columns, 4)[0]
    left, evaluations = list(range(6)), stacked(6)
    for block in orders[0][:3]:
        start = left.index(block) // 3 * 3
        left.remove(block)
        evaluations += stacked(len(left), start)
    assert samples[1] < samples[0] == 256 * evaluations


def test_greedy_that_removes_one_block_ranks_as_one_scoring_does():
    model = random_dit()
    found = [
        ranked(check(ModuleParts(model), list(range(5)), draws(model, 12), "ced", 6, mode=mode), 1)
        for mode in ("once", "greedy")
    ]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    """What two ranks find: a ranking, and a small run of the bench."""
    words = ["--width", "32", "--depth", "4", "--draws", "4", "--check-draws", "32", "--batch", "8", "--micro", "4"]
    return run_ranks("tests.workers.sweep:everything", world_size=2, words=[*words, "--repeats", "1"])


def test_two_ranks_rank_greedily_with_branches_as_one_process_does(two_ranks):
    first, second = (rank["ranking"] for rank in two_ranks)
    alone = greedy_with_branches()
    assert first == second and first["order"] == alone["order"]
    assert {"mse/attention", "mse/greedy1", "mse/greedy2", "flux_lite", "shortgpt/attention"} <= set(first["scores"])
    assert first["scores"].keys() == alone["scores"].keys()
    for name, by_block in alone["scores"].items():
        for block, score in by_block.items():
            found = first["scores"][name][block]
            assert found.pop("same_as") == score.pop("same_as")
            assert found == pytest.approx(score, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("criterion", ["random", "every_other", "explicit"])
def test_greedy_is_refused_where_no_sweep_decides(criterion):
    config = Config(score=ScoreConfig(mode="greedy"))
    assert not problems_of(config)
    [problem] = problems_of(replace(config, prune=replace(config.prune, criterion=criterion)))
    assert "`score.mode=greedy`" in problem and criterion in problem


# ---------------------------------------------------------------- memory, and bad numbers


def test_a_stack_over_the_limit_is_refused_with_the_batch_that_fits():
    model = ModelConfig(depth=28, hidden_size=1152, input_size=32)
    config = Config(model=model, score=ScoreConfig(draws=1024, batch_size=128, stack_memory=1000))
    needed = 29 * 128 * 256 * 1152 * 4 / 2**20
    problem = stack_problem(config, 1, 28)
    assert problem and f"29 variants of 128 draws on 1 ranks take {needed:.0f} MiB" in problem
    assert "Set `score.batch_size` to 16, or raise" in problem
    assert stack_problem(replace(config, score=replace(config.score, batch_size=16)), 1, 28) is None
    assert stack_problem(replace(config, score=replace(config.score, batch_size=32)), 1, 28) is not None
    assert stack_problem(config, 8, 28) is None  # 16 draws a rank
    with_branch = replace(config, score=replace(config.score, unit="mlp"))
    assert "57 variants" in (stack_problem(with_branch, 8, 28) or "")
    assert "Raise `score.stack_memory`" in (stack_problem(with_branch, 1, 2000) or "")
    prune = replace(config.prune, target_depth=14, start_step=1)
    assert problem in training_problems(replace(config, prune=prune), data_needed=False)  # before any rank starts


def test_a_check_whose_stack_does_not_fit_removes_nothing():
    model = random_dit(depth=6)
    m = check(ModuleParts(model), list(range(6)), draws(model, 1024), "loss", 512, stack_memory=1)
    with pytest.raises(RuntimeError, match=r"Set `score.batch_size` to 256, or raise"):
        measure_sweep(m)


@pytest.mark.parametrize(("spoilt", "message"), [((2,), "because of block 2"), ((1, 3), "activations at block 1 are")])
def test_activations_that_are_not_finite_name_the_block_and_the_batch(spoilt, message):
    model = random_dit()
    columns = draws(model, 24)
    with torch.no_grad():
        for index in spoilt:
            model.blocks[str(index)].mlp.fc2.bias += math.inf
    m = check(ModuleParts(model), list(range(5)), columns, "loss", 6, unit="attention")
    with pytest.raises(RuntimeError, match=rf"{message}.*calibration batch 0"):
        measure_sweep(m)


# ---------------------------------------------------------------- what it costs


def test_the_bench_counts_what_runs_and_finds_no_difference(two_ranks):
    found, other = (rank["bench"] for rank in two_ranks)
    assert found["block_evaluations"] == other["block_evaluations"] == 10 and found["gathers"] == 4
    assert found["block_evaluations_brute_force"] == found["gathers_brute_force"] == 16
    assert found["max_relative_difference"] <= 1e-10
    parts = found["check_in_steps"]
    assert parts["total"] == pytest.approx(sum(parts[name] for name in ("sweep", "ntk", "zico", "agreeing")))
    assert min(parts.values()) > 0 and found["share_of_100k_steps"] == pytest.approx(parts["total"] * 4 / 1e5)
    assert min(found[name] for name in ("time_ratio", "time_ratio_cpu", "ced_over_floor", "floor_in_steps")) > 0
    assert parts["sweep"] / found["floor_in_steps"] == pytest.approx(found["ced_over_floor"])
