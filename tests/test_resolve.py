"""Which blocks the draws tell apart, how many draws that takes, and where it is recorded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from entprune_ds.config import Config, PruneConfig, ScoreConfig, problems_of
from entprune_ds.config_checks_prune import SWEEP_CRITERIA
from entprune_ds.coordinator import measuring, run_check
from entprune_ds.importance import leave_one_out as leave_one_out_module
from entprune_ds.importance.criteria import CRITERIA_NEED_SWEEP
from entprune_ds.importance.jackknife import (
    Resampled,
    indistinguishable,
    leave_one_out,
    looks,
    separated,
    standard_error,
    student_quantile,
)
from entprune_ds.importance.leave_one_out import measure_sweep
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.scores import resample_scores
from entprune_ds.importance.sweep_statistics import SweepStatistics
from entprune_ds.monitor.decision_section import decision_section
from entprune_ds.monitor.records import decision_of
from entprune_ds.monitor.tables import separation
from entprune_ds.pruning.decision import PruneDecision
from tests.reference.toys import mean_squared, random_dit
from tests.workers.entropy import toy_check


def resampled(values: list[float], shared: float = 0.0, own: float = 1.0, groups: int = 8) -> Resampled:
    """Scores whose replicates scatter together by `shared` and each for itself by `own`."""
    generator = torch.Generator().manual_seed(0)
    common = shared * torch.randn(groups, 1, generator=generator, dtype=torch.float64)
    noise = common + own * torch.randn(groups, len(values), generator=generator, dtype=torch.float64)
    center = torch.tensor(values, dtype=torch.float64)
    return Resampled(center, center + (noise - noise.mean(0)) / groups)


# ---------------------------------------------------------------- the pure functions


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 7, 8, 15, 32])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_student_quantiles_are_those_of_scipy(degrees, confidence):
    expected = stats.t.ppf((1 + confidence) / 2, degrees)
    assert student_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-9)


def test_leaving_one_group_out_merges_all_others_in_their_order():
    for count in (2, 3, 7):
        letters = "abcdefg"[:count]
        assert list(leave_one_out(letters, lambda a, b: a + b)) == [letters.replace(c, "") for c in letters]


def test_the_error_of_a_difference_is_that_of_the_paired_draws():
    """Two scores that scatter together: their own errors say nothing, their difference is certain."""
    score = resampled([1.0, 2.0, 2.01, 9.0], shared=30, own=0.3)
    assert (score.errors[0] ** 2 + score.errors[1] ** 2).sqrt() > 5  # as if independent: not told apart
    assert indistinguishable(score, (3, 4, 7, 9), 0.95) == {3: (), 4: (7,), 7: (4,), 9: ()}
    pair = score.replicates[:, 0] - score.replicates[:, 1]
    threshold = student_quantile(0.95, 7) * standard_error(pair)
    for scale in (0.99, 1.01):  # exactly at the border
        moved = replace(score, values=torch.tensor([0.0, scale * threshold, 5, 9], dtype=torch.float64))
        assert (4 in indistinguishable(moved, (3, 4, 7, 9), 0.95)[3]) is (scale < 1)


def test_ties_and_scores_that_are_not_finite_are_never_told_apart():
    values = torch.tensor([1.0, 1.0 + 1e-14, 2.0], dtype=torch.float64)
    assert indistinguishable(Resampled(values, values.repeat(4, 1)), (0, 1, 2), 0.95) == {0: (1,), 1: (0,), 2: ()}
    bad = Resampled(torch.tensor([1.0, math.nan]), torch.tensor([[1.0, math.nan]] * 4))
    assert indistinguishable(bad, (0, 1), 0.95) == {0: (1,), 1: (0,)}


def test_separation_is_about_the_border_between_what_goes_and_what_stays():
    score, blocks = resampled([5.0, 1.0, 1.0, 5.0, 5.0], own=0.1), (0, 1, 2, 5, 8)
    assert [separated(score, blocks, first, 0.95) for first in range(6)] == [True, False, True, False, False, True]


@pytest.mark.parametrize(
    ("fewest", "most", "expected"), [(8, 64, [8, 12, 18, 27, 40, 60, 64]), (2, 4, [2, 3, 4]), (5, 5, [5])]
)
def test_the_rule_looks_more_rarely_as_draws_grow_and_at_the_end(fewest, most, expected):
    assert looks(fewest, most) == expected


# ---------------------------------------------------------------- drawing until it is resolved


def damage(size: float):
    def block(x: Tensor) -> Tensor:
        return x + size * torch.sin(3 * x)

    return block


def drawn(*sizes: float, removable: int, criterion: str = "mse", **score: object) -> int:
    settings = {"draws": 64, "batch_size": 16, "until": "resolved", "max_draws": 512} | score
    m = toy_check(*(damage(s) for s in sizes), criterion=criterion, removable=removable, **settings)
    return next(iter(measure_sweep(m)[criterion].values())).draws or 0


def test_an_easy_case_stops_at_once_and_a_tie_spends_the_budget():
    assert drawn(0.1, 0.9, 0.9, removable=1) == 64
    assert drawn(0.1, 0.1, 0.9, removable=2) == 64  # which of the two goes first may stay open
    assert drawn(0.1, 0.1, 0.9, removable=2, mode="greedy") == 512  # one at a time: now it matters
    assert drawn(0.0, 0.0, 0.9, removable=1) == 512
    assert drawn(0.0, 0.0, 0.9, removable=1, until="draws") == 64


def test_protected_blocks_are_not_waited_for():
    """The first block cannot go, so its score settles nothing: the next two, of which one goes, are alike."""
    m = toy_check(*(damage(s) for s in (0.01, 0.1, 0.1, 0.9)), criterion="mse", draws=64, batch_size=16,
                  until="resolved", max_draws=512)  # fmt: skip
    assert next(iter(measure_sweep(m)["mse"].values())).draws == 64
    protected = replace(m.config, prune=replace(m.config.prune, protected_blocks=(0,)))
    assert next(iter(measure_sweep(replace(m, config=protected))["mse"].values())).draws == 512


def test_a_case_in_between_takes_some_draws_and_more_for_more_confidence():
    taken = [drawn(0.30, 0.305, 0.9, removable=1, confidence=c) for c in (0.2, 0.9999)]
    assert 64 <= taken[0] < taken[1] <= 512


def test_every_look_takes_its_share_of_the_error():
    """Two blocks that are equally bad: stopping by luck at any of the looks stays as rare as promised."""

    def stops(seed: int) -> bool:
        left, right = (lambda x: x * torch.tensor([1.4, 1.0]), lambda x: x * torch.tensor([1.0, 1.4]))
        m = toy_check(
            left, right, shape=(2, 1, 1), criterion="mse", seed=seed, draws=64, batch_size=16, until="resolved",
            max_draws=512, confidence=0.8,
        )  # fmt: skip
        return measure_sweep(m)["mse"][0].draws < 512

    assert sum(stops(seed) for seed in range(25)) / 25 <= 0.35


def test_criteria_that_can_be_resolved_are_ranked_by_the_sweep():
    assert set(SWEEP_CRITERIA) <= CRITERIA_NEED_SWEEP
    races = PruneConfig(criterion="recovery_race", target_depth=4, num_checks=1)
    config = Config(prune=races, score=ScoreConfig(until="resolved"))
    assert any("recovery_race does not depend. Set score.until=draws" in problem for problem in problems_of(config))


# ---------------------------------------------------------------- where it is recorded


def test_replicates_of_ced_are_unfolded():
    """A block whose signed_ced is below 0 for sure, and one that is about 0: folding would hide half of its spread."""
    kept, z_t = [0, 1], torch.randn(64, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wave = z_t.flatten(1)[:, 0].sign().view(-1, 1, 1, 1)  # as often 1.3 times as large as 1 / 1.3 times
    outputs = torch.stack([z_t, z_t / 2, z_t * 1.3**wave / (1.3**wave).square().mean().sqrt()])
    statistics = SweepStatistics(kept, 8, (4, 2, 2), torch.device("cpu"))
    for group in range(8):
        mine = slice(8 * group, 8 * group + 8)
        statistics.update(group, outputs[:, mine], z_t[mine], z_t[mine, 0, 0, 0], mean_squared)
    found = resample_scores(statistics.reduce(), kept)
    ced, signed = found["ced"], found["signed_ced"]
    assert signed.values[0] < 0 and torch.equal(ced.replicates[:, 0], -signed.replicates[:, 0])
    assert signed.replicates[:, 1].min() < 0 < signed.replicates[:, 1].max()
    assert torch.equal(ced.errors, signed.errors)
    assert torch.equal(ced.values, signed.values.abs())


def decision() -> PruneDecision:
    """A check of a small model that may remove two of five blocks, in two checks."""
    model = random_dit().float()
    config = Config(
        prune=PruneConfig(
            criterion="loss", target_depth=2, num_checks=2, max_blocks_per_check=2, ntk_samples=4, ntk_repeats=1,
            zico_batches=2, zico_batch_size=2,
        ),
        score=ScoreConfig(draws=32, batch_size=8, until="resolved", max_draws=64, confidence=0.999),
    )  # fmt: skip
    tiny = dict(depth=5, hidden_size=16, num_heads=2, patch_size=2, input_size=4, in_channels=1, num_classes=3)
    config = replace(config, model=replace(config.model, **tiny))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)

    def examples(purpose: str, count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 1, 4, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)

    assert measuring(ModuleParts(model), (0, 1, 2, 3, 4), config, 0, examples).removable == 1
    return run_check(ModuleParts(model), (0, 1, 2, 3, 4), config, 0, 10, 5, examples)[0]


def test_a_check_asks_about_as_many_blocks_as_it_may_remove(monkeypatch):
    asked = []
    monkeypatch.setattr(leave_one_out_module, "separated", lambda s, blocks, first, c: asked.append(first) or True)
    assert {s["draws"] for s in decision().scores["loss"].values()} == {32}
    assert asked == [2]


def test_a_decision_records_its_draws_and_what_they_tell_apart_and_the_report_shows_it():
    made = decision()
    assert PruneDecision.from_json(made.to_json()) == made
    scores = made.scores["loss"]
    assert {s["draws"] for s in scores.values()} == {64}
    assert any(s["same_as"] for s in scores.values())
    for block, score in scores.items():
        assert all(int(block) in scores[str(other)]["same_as"] for other in score["same_as"])
    read = decision_of(made.to_json())
    assert read.scores["loss"][0].same_as == tuple(scores["0"]["same_as"]) and read.scores["loss"][0].draws == 64
    pair = "block 0, and first to stay, block 1"
    for same, said, cell in (((), f"{pair}: told apart by 64 draws", "none"), ((1, 3), f"{pair}: not told", "1, 3")):
        own = replace(read.scores["loss"][0], same_as=same)
        two = replace(
            read, order=(0, 1, 2, 3, 4), dropped=(0,), kept_blocks=(1, 2, 3, 4),
            scores={"loss": read.scores["loss"] | {0: own}},
        )  # fmt: skip
        assert said in separation(two)
        row = str(decision_section(two, 5)).split("block 0</t", 2)[-1].split("</tr>")[0]
        assert f">{cell}<" in row
