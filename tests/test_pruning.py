"""Schedule, vote and decision: pure functions of plain values."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.schedule import blocks_at_depth, candidate_depths, check_steps, default_cap
from entprune_ds.pruning.surgery import Narrowing
from entprune_ds.pruning.vote import Candidate, competition_ranks, vote

# ---------------------------------------------------------------- schedule


def test_checks_stand_at_the_start_of_equal_parts():
    assert check_steps(100, 500, 4) == [100, 200, 300, 400]
    assert check_steps(0, 10, 4) == [0, 2, 5, 7]
    assert check_steps(7, 100, 1) == [7]
    with pytest.raises(ValueError, match="as many steps"):
        check_steps(0, 3, 4)


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(0, 500))
def test_every_check_has_recovery_after_it_within_the_phase(start, num_checks, spare):
    end = start + num_checks + spare
    steps = check_steps(start, end, num_checks)
    assert steps[0] == start and len(steps) == num_checks
    gaps = [b - a for a, b in zip(steps, [*steps[1:], end], strict=True)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_default_cap_is_twice_the_even_share_rounded_up():
    assert [default_cap(28, 14, 4), default_cap(8, 4, 4), default_cap(28, 15, 4), default_cap(5, 4, 4)] == [7, 2, 7, 1]


def test_candidates_are_deepest_first_with_the_current_depth_and_the_cap():
    assert candidate_depths(28, 14, 7, 4) == [28, 27, 26, 25, 24, 23, 22, 21]
    assert candidate_depths(28, 14, 7, 2) == [21]  # nothing removed so far: the cap forces seven now
    assert candidate_depths(20, 14, 7, 2) == [20, 19, 18, 17, 16, 15, 14]
    assert candidate_depths(17, 14, 7, 1) == [14]
    assert candidate_depths(14, 14, 7, 3) == [14]
    with pytest.raises(ValueError, match=r"prune\.max_blocks_per_check"):
        candidate_depths(28, 14, 6, 2)


@settings(max_examples=200)
@given(st.data())
def test_any_choices_reach_the_target_at_the_last_check_and_never_exceed_the_cap(data):
    depth = data.draw(st.integers(2, 40))
    target, checks = data.draw(st.integers(1, depth - 1)), data.draw(st.integers(1, 8))
    least = -(-(depth - target) // checks)
    cap = data.draw(st.one_of(st.just(default_cap(depth, target, checks)), st.integers(least, depth)))
    now = depth
    for left in range(checks, 0, -1):
        depths = candidate_depths(now, target, cap, left)
        assert depths == sorted(depths, reverse=True) and target <= depths[-1] and now - depths[-1] <= cap
        now = data.draw(st.sampled_from(depths))
    assert now == target


def test_one_shot_is_a_single_check():
    assert candidate_depths(28, 14, default_cap(28, 14, 1), 1) == [14]


def test_blocks_at_a_depth_follow_the_order():
    assert blocks_at_depth([0, 2, 5, 7], [5, 0, 7, 2], 3) == [0, 2, 7]
    assert blocks_at_depth([0, 2, 5, 7], [5, 0, 7, 2], 4) == [0, 2, 5, 7]
    with pytest.raises(ValueError, match="do not fit"):
        blocks_at_depth([0, 2, 5], [5, 0, 7], 2)


# ---------------------------------------------------------------- vote


def candidate(depth: int, ntk: float | None, zico: float | None) -> Candidate:
    return Candidate(depth=depth, kept_blocks=tuple(range(depth)), ntk=ntk, zico_mean=zico, zico_sum=zico)


def test_ties_share_a_rank_and_the_next_rank_is_skipped():
    assert competition_ranks([5.0, 7.0, 7.0, 1.0], 0.0) == [3, 1, 1, 4]
    assert competition_ranks([3.0], 0.0) == [1]


def test_tolerance_groups_are_anchored_at_their_best_member():
    # 100 ~ 99.1 and 99.1 ~ 98.2, but 98.2 is not within 1 % of 100: ties are not transitive
    assert competition_ranks([98.2, 100.0, 99.1], 0.01) == [3, 1, 1]
    assert competition_ranks([-100.0, -100.9, -101.8], 0.01) == [1, 1, 3]
    assert competition_ranks([100.0, 99.0], 0.01) == [1, 1]


def test_invalid_values_rank_last_and_never_win():
    assert competition_ranks([None, 1.0, math.nan, 2.0, math.inf], 0.0) == [3, 2, 3, 1, 3]
    assert competition_ranks([None, None], 0.0) == [1, 1]
    outcome = vote([candidate(8, None, 1.0), candidate(6, 900.0, 1.0)], (1.0, 0.0, 0.0), 0.0)
    assert outcome.chosen.depth == 6


def test_low_condition_number_and_high_zico_win():
    outcome = vote([candidate(4, 30.0, 1.0), candidate(8, 20.0, 3.0), candidate(6, 10.0, 2.0)], (1.0, 1.0, 0.0), 0.0)
    assert [(c.depth, c.ntk_rank, c.zico_rank, c.total) for c in outcome.candidates] == [
        (8, 2, 1, 3.0),
        (6, 1, 2, 3.0),
        (4, 3, 3, 6.0),
    ]
    assert outcome.chosen.depth == 8  # a tie goes to the deeper candidate
    candidates = list(outcome.candidates)
    assert vote([candidate(c.depth, c.ntk, c.zico_mean) for c in candidates], (2.0, 1.0, 0.0), 0.0).chosen.depth == 6


def test_totals_that_differ_by_rounding_tie():
    candidates = [candidate(8, 30.0, 3.0), candidate(6, 10.0, 2.0), candidate(4, 20.0, 1.0)]
    outcome = vote(candidates, (0.19, 0.38, 0.0), 0.0)
    deep, middle, _ = (c.total for c in outcome.candidates)  # 0.19 * 3 + 0.38 and 0.19 + 0.38 * 2
    assert deep > middle and outcome.chosen.depth == 8


def test_a_vote_needs_different_depths():
    for bad in ([], [candidate(4, 1.0, 1.0), candidate(4, 2.0, 1.0)]):
        with pytest.raises(ValueError, match="different depths"):
            vote(bad, (1.0, 1.0, 0.0), 0.0)


@settings(max_examples=200)
@given(st.permutations(range(4)), st.lists(st.one_of(st.none(), st.floats(0.1, 1e6)), min_size=8, max_size=8))
def test_the_vote_does_not_depend_on_the_order_of_the_candidates(order, values):
    candidates = [candidate(d + 1, values[d], values[4 + d]) for d in range(4)]
    assert vote([candidates[i] for i in order], (1.0, 1.0, 0.0), 0.01) == vote(candidates, (1.0, 1.0, 0.0), 0.01)


# ---------------------------------------------------------------- decision


def decision(**changes: object) -> PruneDecision:
    outcome = vote([candidate(3, None, 2.0), candidate(2, 12.5, 1.5)], (1.0, 1.0, 0.0), 0.01)
    values = dict(
        check=1,
        step=100,
        criterion="ced",
        kept_before=(0, 3, 5),
        dropped=(3,),
        kept_blocks=(0, 5),
        order=(3, 5, 0),
        scores={"ced": {"3": {"value": 0.1, "standard_error": math.nan}}},
        candidates=outcome.as_json(),
        chosen_depth=2,
        forced=False,
        reason="the vote",
        score_only=False,
    )
    return PruneDecision(**(values | changes))  # type: ignore[arg-type]


def test_a_decision_survives_json_with_its_digest():
    original = decision()
    line = json.dumps(original.to_json(), allow_nan=False)
    restored = PruneDecision.from_json(json.loads(line))
    assert restored == original and restored.digest == original.digest
    assert list(original.to_json())[-1] == "digest"
    assert original.to_json()["scores"]["ced"]["3"]["standard_error"] is None  # NaN has no JSON
    assert original.to_json()["candidates"][0] == {
        "depth": 3, "kept_blocks": [0, 1, 2], "ntk": None, "zico_mean": 2.0, "zico_sum": 2.0,
        "step_seconds": None, "ntk_rank": 2, "zico_rank": 1, "time_rank": None, "total": 3.0,
    }  # fmt: skip


def test_any_change_of_a_stored_decision_is_found():
    stored = decision().to_json()
    changes = dict(
        check=2, step=101, criterion="loss", order=[5, 3, 0], chosen_depth=3, forced=True, reason="x", score_only=True,
        scores={}, candidates=[], dropped=[5], digest="0" * 64,
    )  # fmt: skip
    for field, value in changes.items():
        with pytest.raises(ValueError, match="check"):
            PruneDecision.from_json(stored | {field: value})
    with pytest.raises(ValueError, match="fields: mood"):
        PruneDecision.from_json(stored | {"mood": 1})
    with pytest.raises(ValueError, match="fields: step"):
        PruneDecision.from_json({k: v for k, v in stored.items() if k != "step"})


def test_the_cut_of_a_pipeline_is_part_of_a_decision_and_older_records_have_none():
    cut = decision(cut=[0, 2])
    assert PruneDecision.from_json(json.loads(json.dumps(cut.to_json()))) == cut and cut.cut == (0, 2)
    assert cut.digest != decision(cut=(1, 1)).digest != decision().digest
    with pytest.raises(ValueError, match="does not match its digest"):
        PruneDecision.from_json(cut.to_json() | {"cut": [1, 1]})
    with pytest.raises(ValueError, match="does not add up"):
        decision(cut=(1, 2))
    older = {name: value for name, value in decision().to_json().items() if name != "cut"}
    assert PruneDecision.from_json(older) == decision()


def test_what_gets_narrower_is_part_of_a_decision_and_older_records_have_none():
    kept = decision().kept_blocks[0]
    narrow = decision(narrow={kept: Narrowing(heads=(1, 2))})
    restored = PruneDecision.from_json(json.loads(json.dumps(narrow.to_json())))
    assert restored == narrow and restored.narrow == {kept: Narrowing(heads=(1, 2), channels=None)}
    assert narrow.to_json()["narrow"] == {str(kept): {"heads": [1, 2], "channels": None}}
    assert narrow.digest != decision(narrow={kept: Narrowing(heads=(1, 3))}).digest != decision().digest
    with pytest.raises(ValueError, match="does not match its digest"):
        PruneDecision.from_json(narrow.to_json() | {"narrow": {str(kept): {"heads": [1, 3], "channels": None}}})
    with pytest.raises(ValueError, match="it narrows blocks"):
        decision(narrow={decision().dropped[0]: Narrowing(heads=(1,))})
    older = {name: value for name, value in decision().to_json().items() if name != "narrow"}
    assert PruneDecision.from_json(older) == decision()
    stays = dict(dropped=(), kept_blocks=decision().kept_before, chosen_depth=len(decision().kept_before))
    assert decision().removes and not decision(**stays).removes
    assert decision(**stays, narrow={kept: Narrowing(channels=(0,))}).removes


def test_a_decision_is_frozen_and_consistent():
    with pytest.raises(FrozenInstanceError):
        decision().step = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="chosen depth 3"):
        decision(chosen_depth=3)
    with pytest.raises(ValueError, match="must each make up"):
        decision(dropped=(5,))
    with pytest.raises(ValueError, match="must each make up"):
        decision(order=(3, 5))
    assert replace(decision(), reason="y").digest != decision().digest


def test_a_vote_names_the_depths_that_tie_with_the_chosen_one():
    def candidate(depth: int, ntk: float, zico: float) -> Candidate:
        return Candidate(depth=depth, kept_blocks=tuple(range(depth)), ntk=ntk, zico_mean=zico, zico_sum=zico)

    tied = vote([candidate(4, 1.0, 1.0), candidate(3, 2.0, 2.0), candidate(2, 3.0, 3.0)], (1.0, 1.0, 0.0), 0.01)
    assert tied.chosen.depth == 4
    assert tied.tied_depths == [4, 3, 2]
    clear = vote([candidate(4, 1.0, 3.0), candidate(3, 2.0, 2.0)], (1.0, 1.0, 0.0), 0.01)
    assert clear.tied_depths == [clear.chosen.depth]
