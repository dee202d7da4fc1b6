"""When and how much: protected blocks, waiting, the time voter, and decisions that can be made once more."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune_ds.config import (
    Config,
    ConfigError,
    ModelConfig,
    PruneConfig,
    ScoreConfig,
    SoftConfig,
    TrainConfig,
    load_config,
    problems_of,
)
from entprune_ds.engine.layer_costs import LayerCosts
from entprune_ds.engine.step_time import step_seconds
from entprune_ds.preflight import training_problems
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.policy import CheckState, open_depths, propose, protected_last, state_from, state_of
from entprune_ds.pruning.schedule import blocks_at_depth, check_steps, schedule_problem, usable_checks
from entprune_ds.pruning.trend import not_recovered, trend
from entprune_ds.pruning.vote import Candidate, vote
from entprune_ds.replay import replay

MODEL = ModelConfig(depth=12, hidden_size=16, num_heads=2, input_size=4, in_channels=1, num_classes=3)
CONFIG = Config(
    model=MODEL,
    train=TrainConfig(num_steps=400),
    prune=PruneConfig(target_depth=4, num_checks=4, criterion="loss"),
    score=ScoreConfig(draws=64, batch_size=32),
)


def pruned(**changes: object) -> Config:
    return replace(CONFIG, prune=replace(CONFIG.prune, **changes))


def state(check: int = 0, kept: int = 12, last_removal: int | None = None, validations=(), **changes) -> CheckState:
    """The state before check `check`, which stands at step 100 x check."""
    config, blocks = pruned(**changes), tuple(range(kept))
    return state_of(config, check, 100 * check, blocks, 12, last_removal, validations)


def candidates(state: CheckState, order: list[int], preferred: int) -> list[Candidate]:
    """Proxies that elect the open depth nearest to `preferred`."""
    depths = [] if open_depths(state).removes_nothing else open_depths(state).depths
    return [
        Candidate(
            depth=d, kept_blocks=tuple(blocks_at_depth(state.kept_blocks, order, d)),
            ntk=1.0 + abs(d - preferred), zico_mean=1.0, zico_sum=float(d),
        )
        for d in depths
    ]  # fmt: skip


def losses_of(blocks: tuple[int, ...]) -> dict:
    """Recorded scores: block 3 is the safest, then 4, ..., round to 2."""
    return {"loss": {str(b): {"value": float((b - 3) % 12), "standard_error": 0.1} for b in blocks}}


def run(config: Config, wishes: list[int], validations=lambda step, removals: ()) -> list[PruneDecision]:
    """The decisions of a whole run in which the proxies prefer the wished depths."""
    decisions, kept, last = [], config.model.blocks, None
    for check, wish in enumerate(wishes):
        seen = validations(100 * check, [d.step for d in decisions if d.removes])
        now = state_of(config, check, 100 * check, kept, config.model.depth, last, seen)
        order = protected_last(sorted(kept, key=lambda b: (b - 3) % 12), now.protected)
        order = [] if open_depths(now).removes_nothing else order
        decision = propose(now, order, candidates(now, order, wish), losses_of(kept))
        decisions.append(PruneDecision.from_json(json.loads(json.dumps(decision.to_json(), allow_nan=False))))
        kept, last = decision.kept_blocks, decision.step if decision.removes else last
    return decisions


# ---------------------------------------------------------------- protected blocks


def test_protected_blocks_come_last_and_never_go():
    decisions = run(pruned(protected_blocks=(3, 4, -1)), [10, 8, 6, 4])
    assert [d.chosen_depth for d in decisions] == [10, 8, 6, 4]
    assert decisions[0].order[-3:] == (3, 4, 11) and decisions[0].dropped == (5, 6)
    assert set(decisions[-1].kept_blocks) >= {3, 4, 11}


PROTECTED = [
    ({"protected_blocks": tuple(range(12))}, "`prune.protected_blocks` keeps 12 of 12 blocks for good, more than"),
    ({"protected_blocks": (0, 1, 2, 3, -1)}, "keeps 5 of 12 blocks for good, more than `prune.target_depth` (4)"),
    ({"protected_blocks": (0, 12)}, "`prune.protected_blocks` names [12], but the model has blocks"),
    ({"protected_blocks": (-13,)}, "names [-13]"),
    (
        {"protected_blocks": (2,), "criterion": "explicit", "explicit_order": (1, 2, 3, 4, 5, 6, 7, 8)},
        "`prune.explicit_order` removes [2], which `prune.protected_blocks` keeps",
    ),
    ({"min_steps_between": -1}, "`prune.min_steps_between` must be at least 0, got -1"),
    ({"recovery_tolerance": -0.1}, "`prune.recovery_tolerance` must be at least 0, got -0.1"),
    ({"vote_weights": (1.0, 1.0)}, "must be 3 numbers (NTK, ZiCo, step time), got [1.0, 1.0]. Write 0 for what"),
]


@pytest.mark.parametrize(("changes", "expected"), PROTECTED)
def test_what_cannot_work_is_one_error_before_the_start(changes, expected):
    [problem] = problems_of(pruned(**changes))
    assert expected in problem


@pytest.mark.parametrize("key", ["min_steps_between=5", "recovery_tolerance=0.1"])
def test_soft_pruning_refuses_what_only_checks_follow(key):
    with pytest.raises(ConfigError, match=f"`prune.{key.split('=')[0]}`: soft pruning has no checks"):
        load_config(["prune.target_depth=4", "model.depth=12", "soft.every=10", f"prune.{key}"])


def test_as_many_protected_blocks_as_stay_are_accepted():
    assert problems_of(pruned(protected_blocks=(0, 5, 6, -1))) == []
    assert problems_of(pruned(protected_blocks=(0, 11, -1, -12))) == []  # each counts once


def test_a_check_that_finds_too_many_protected_blocks_removes_nothing():
    with pytest.raises(ValueError, match=r"blocks \[0, 1, 2, 3, 4\] are protected.*target depth 4.*Nothing was rem"):
        open_depths(replace(state(), protected=(0, 1, 2, 3, 4, 99)))


# ---------------------------------------------------------------- steps between removals


def test_usable_checks_leave_the_gap_between_them():
    assert usable_checks([0, 100, 200, 300], None, 0) == 4
    assert usable_checks([0, 100, 200, 300], None, 101) == 2
    assert usable_checks([100, 200, 300], 50, 100) == 2
    assert usable_checks([100, 200], 50, 1000) == 0 == usable_checks([], None, 5)


def test_a_check_too_soon_after_a_removal_removes_nothing_and_the_target_is_reached_all_the_same():
    decisions = run(pruned(min_steps_between=150, max_blocks_per_check=6), [10, 9, 4, 4])
    assert [d.chosen_depth for d in decisions] == [10, 10, 4, 4]
    assert decisions[1].held == "100 steps have passed since the last removal, fewer than prune.min_steps_between=150"
    assert not decisions[1].order and not decisions[1].candidates and not decisions[1].forced
    assert decisions[1].reason == f"10 -> 10: {decisions[1].held}."
    assert not decisions[3].held  # nothing is left to remove


def test_a_removal_after_which_no_check_is_left_must_reach_the_target_or_not_happen():
    at_200 = state(check=2, kept=8, last_removal=0, min_steps_between=150, max_blocks_per_check=6)
    assert open_depths(at_200).depths == [8, 4]  # 300 is too soon after 200: all now, or all then


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_wishes_reach_the_target_and_keep_cap_and_gap(data):
    checks, gap = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 350))
    target = data.draw(st.integers(1, 11))
    cap = data.draw(st.one_of(st.none(), st.integers(1, 11)))
    config = replace(pruned(
        target_depth=target, num_checks=checks, max_blocks_per_check=cap, min_steps_between=gap, end_step=100 * checks
    ), train=TrainConfig(num_steps=600))  # fmt: skip
    if problems_of(config) or schedule_problem(config):
        return
    decisions = run(config, [data.draw(st.integers(1, 12)) for _ in range(checks)])
    assert decisions[-1].chosen_depth == target
    removals = [d for d in decisions if d.removes]
    assert all(len(d.dropped) <= state_from(d).cap for d in removals)
    assert all(b.step - a.step >= gap for a, b in itertools.pairwise(removals))
    assert all(found.known and not found.differences for found in replay(decisions))


def test_a_gap_that_leaves_too_few_checks_is_refused_before_the_start(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = pruned(min_steps_between=350)
    expected = (
        "`prune.min_steps_between` (350) leaves 1 of the 4 checks, too few to remove 8 blocks with at most 4 each"
    )
    assert expected in schedule_problem(config)
    assert any(expected in problem for problem in training_problems(config, data_needed=False))
    assert schedule_problem(pruned(min_steps_between=200)) is None
    assert schedule_problem(pruned(min_steps_between=350, score_only=True)) is None
    assert schedule_problem(replace(CONFIG, soft=SoftConfig(every=10))) is None  # it has no checks


def test_one_shot_is_the_case_of_one_check():
    [only] = run(pruned(num_checks=1, min_steps_between=10**6, recovery_tolerance=0.01), [12])
    assert only.chosen_depth == 4 and only.forced and only.dropped == tuple(range(3, 11))
    assert check_steps(0, 400, 1) == [0]


# ---------------------------------------------------------------- recovery before the next removal


def losses(*stretches: list[tuple[int, float]]):
    """Validations of a run; every stretch is a smaller model."""
    return [(step, 1000 - i, loss) for i, stretch in enumerate(stretches) for step, loss in stretch]


def test_the_trend_is_a_power_law_of_the_losses_before_the_last_removal():
    power = [(step, 3 * (step + 1) ** -0.5) for step in (19, 39, 59, 79, 99)]
    assert trend(losses(power), 500) is None
    expected = 3 * 400**-0.5
    assert math.isclose(trend(losses(power, [(99, 9.0), (399, 1.0)]), 399), expected, rel_tol=1e-12)
    bent = [(19, 100.0), *power[1:]]  # the first half does not count
    assert math.isclose(trend(losses(bent, [(99, 9.0)]), 399), expected, rel_tol=1e-12)
    older = [(5, 50.0), (9, 40.0)]
    assert math.isclose(trend(losses(older, power, [(99, 9.0)]), 399), expected, rel_tol=1e-12)


def test_few_or_rising_losses_give_a_level():
    assert trend(losses([(0, 1.0), (100, 0.5)], [(100, 2.0)]), 900) == 0.5
    assert trend(losses([(0, 0.5), (50, 0.6), (100, 0.7)], [(100, 2.0)]), 900) == 0.7


def test_a_loss_within_the_tolerance_of_its_trend_has_recovered():
    level = [(0, 0.5), (100, 0.5)]
    assert not_recovered(losses(level, [(100, 0.9), (200, 0.525)]), 200, 0.05) == ""
    said = not_recovered(losses(level, [(100, 0.9), (200, 0.53)]), 200, 0.05)
    assert said == "the validation loss 0.53 is 6.0 % above its trend 0.5, more than 5 %"
    assert not_recovered(losses(level, [(100, math.nan)]), 200, 0.05)
    assert not_recovered(losses(level), 200, 0.0) == ""


def test_a_check_waits_for_recovery_and_removes_only_what_is_forced():
    slow = losses([(0, 0.5)], [(0, 2.0), (100, 1.0)])
    waits = state(check=1, kept=10, last_removal=0, validations=slow, recovery_tolerance=0.1)
    assert open_depths(waits).removes_nothing and open_depths(waits).depths == [10]
    assert "100.0 % above its trend 0.5" in propose(waits, [], [], {}).reason
    recovered = replace(waits, validations=tuple(losses([(0, 0.5)], [(0, 2.0), (100, 0.54)])))
    assert open_depths(recovered).depths == [10, 9, 8, 7, 6]
    forced = state(check=2, kept=12, last_removal=0, validations=slow, recovery_tolerance=0.1)
    assert open_depths(forced).depths == [8] and open_depths(forced).forced  # 4 now and 4 at the last check
    order = [*range(3, 12), 0, 1, 2]
    decision = propose(forced, order, candidates(forced, order, 12), {})
    assert decision.chosen_depth == 8 and decision.held
    assert decision.reason.endswith("more than 10 %, but 4 had to go to leave the target within reach.")


def test_a_run_that_never_recovers_still_reaches_its_target():
    def never(step: int, removals: list[int]):
        return losses([(0, 0.1)], [(0, 5.0), (step, 5.0)]) if removals else losses([(0, 0.1)])

    decisions = run(pruned(recovery_tolerance=0.1), [10, 10, 10, 10], never)
    assert [d.chosen_depth for d in decisions] == [10, 10, 8, 4]
    assert [bool(d.held) for d in decisions] == [False, True, True, True]


def test_score_only_never_waits():
    slow = losses([(0, 0.5)], [(0, 2.0)])
    only = state(1, 12, 0, slow, recovery_tolerance=0.0, min_steps_between=1000, score_only=True)
    assert not open_depths(only).held and open_depths(only).depths[0] == 12


def test_recovery_needs_validation_losses(digits, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    waits = replace(pruned(recovery_tolerance=0.1), train=TrainConfig(num_steps=400, validate_every=0))
    assert "but `train.validate_every` is 0" in problems_of(waits)[0]
    config = pruned(recovery_tolerance=0.1)
    config = replace(config, data=replace(config.data, shards=f"{digits}/train/"))
    nothing = replace(config, data=replace(config.data, shards="/nowhere/train"))
    text = "`prune.recovery_tolerance` looks at the validation loss, but there is no validation data"
    assert any(text in p for p in training_problems(nothing)) and not any(text in p for p in training_problems(config))


# ---------------------------------------------------------------- the third voter


def timed(depth: int, ntk: float, zico: float, seconds: float | None) -> Candidate:
    kept = tuple(range(depth))
    return Candidate(depth=depth, kept_blocks=kept, ntk=ntk, zico_mean=zico, zico_sum=zico, step_seconds=seconds)


def test_the_step_time_votes_by_its_weight_and_low_is_good():
    both = [timed(8, 1.0, 2.0, 0.8), timed(4, 2.0, 1.0, 0.4)]
    assert vote(both, (1.0, 0.5, 0.0), 0.0).chosen.depth == 8
    ancestor = vote(both, (1.0, 0.5, 0.5), 0.0)
    assert [(c.ntk_rank, c.zico_rank, c.time_rank, c.total) for c in ancestor.candidates] == [
        (1, 1, 2, 2.5),
        (2, 2, 1, 3.5),
    ]
    assert vote(both, (0.0, 0.0, 1.0), 0.0).chosen.depth == 4
    assert vote([timed(8, 1.0, 2.0, 0.8), timed(4, 2.0, 1.0, None)], (0.0, 0.0, 1.0), 0.0).chosen.depth == 8
    without = vote([timed(8, 1.0, 2.0, None), timed(4, 2.0, 1.0, None)], (1.0, 1.0, 0.0), 0.0)
    assert [c["time_rank"] for c in without.as_json()] == [None, None]
    assert [c["step_seconds"] for c in ancestor.as_json()] == [0.8, 0.4]


def test_the_voters_stand_in_the_reason():
    order = [*range(3, 12), 0, 1, 2]
    now = state(vote_weights=(1.0, 0.5, 0.5))
    assert "the NTK, ZiCo and step time ranks" in propose(now, order, candidates(now, order, 10), {}).reason
    now = state(vote_weights=(0.0, 1.0, 0.0))
    assert "the ZiCo ranks" in propose(now, order, candidates(now, order, 10), {}).reason


def test_step_seconds_follow_from_the_costs_of_the_layers():
    costs = LayerCosts(stem=10, block=100, head=20, micro_batch=8)
    config = replace(CONFIG, train=replace(CONFIG.train, global_batch_size=32, micro_batch_size=8))
    assert step_seconds(config, MODEL, 1, costs) == pytest.approx(4 * 1230e-9)
    assert step_seconds(config, MODEL.keeping((0, 5)), 2, costs) == pytest.approx(2 * 230e-9)
    two = replace(config, parallel=replace(config.parallel, pipe_stages=2, ds_config="zero1_fp32"))
    assert step_seconds(two, MODEL, 2, costs) == pytest.approx((4 + 1) * 620e-9)  # 6 blocks + head: the slower stage
    bigger = replace(costs, micro_batch=16)  # times of twice the examples
    assert step_seconds(config, MODEL, 1, bigger) == pytest.approx(2 * 1230e-9)


# ---------------------------------------------------------------- decisions made once more


def decided() -> list[PruneDecision]:
    return run(pruned(protected_blocks=(0,), min_steps_between=150, max_blocks_per_check=6), [10, 9, 6, 4])


def test_every_recorded_decision_can_be_made_again():
    assert [r.differences for r in replay(decided())] == [()] * 4
    assert state_from(decided()[1]).protected == (0,)


def forged(decision: PruneDecision, **changes: object) -> PruneDecision:
    return replace(decision, **changes)


def test_a_decision_that_does_not_follow_from_its_record_is_found():
    first, *rest = decided()
    scores = {"loss": dict(first.scores["loss"], **{"3": {"value": 99.0, "standard_error": 0.1}})}
    proxies = [dict(c, ntk=1.0 if c["depth"] == 9 else 9.0) for c in first.candidates]
    forgeries = {
        "order is": forged(first, scores=scores),
        "chosen_depth is 10, made again 9": forged(first, candidates=proxies),
        "reason is": forged(first, reason="because"),
        "it cannot be made again: check 0: the candidates": forged(first, candidates=first.candidates[1:]),
        "forced is True": forged(first, forced=True),
    }
    for expected, forgery in forgeries.items():
        differences = replay([forgery, *rest])[0].differences
        assert any(expected in d for d in differences), (expected, differences)
    lost = replay(decided()[1:])
    assert any("last_removal is 0, the decisions before say None" in d for d in lost[0].differences)
    [_, other] = replay([first, forged(first, check=1)])
    assert any("kept_before is" in d for d in other.differences)


def test_older_records_without_a_state_are_said_to_be_unknown():
    old = [forged(d, state={}, held="") for d in decided()[:1]]
    row = {k: v for k, v in old[0].to_json().items() if k not in ("state", "held")}
    assert PruneDecision.from_json(row) == old[0]  # the digest is that of a record without the fields
    [found] = replay(old)
    assert not found.known and not found.differences


def test_a_greedy_order_is_made_again_round_by_round():
    now = state()
    order = [3, 5, 4, 6, 7, 8, 9, 10, 11, 0, 1, 2]
    scores = losses_of(now.kept_blocks)
    for number, first in enumerate((5, 4), start=1):  # scored again without those that went before
        left = [b for b in range(12) if b not in order[:number]]
        scores[f"loss/greedy{number}"] = {
            str(b): {"value": -1.0 if b == first else float((b - 3) % 12), "standard_error": 0.1} for b in left
        }
    decision = propose(now, order, candidates(now, order, 9), scores)
    assert decision.dropped == (3, 4, 5)
    assert replay([decision])[0].differences == ()
    wrong = propose(now, [3, 4, 5, *order[3:]], candidates(now, [3, 4, 5, *order[3:]], 9), scores)
    assert any("order is" in d for d in replay([wrong])[0].differences)
