"""The recovery race without ranks: its plan, the halving, the candidates, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune_ds.calibration import examples_of
from entprune_ds.config import Config, PruneConfig, RaceConfig, TrainConfig, problems_of
from entprune_ds.coordinator import run_check
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.importance.criteria import RankingRequest, removal_order
from entprune_ds.importance.evenness import keep_set_value
from entprune_ds.importance.keep_sets import Origin, candidates, spaced
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.importance.scores import Score
from entprune_ds.learning_rate import learning_rate
from entprune_ds.models.dit import DiT, initialize
from entprune_ds.monitor.records import decision_of
from entprune_ds.monitor.report import build_report
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.pruning.halving import NoFiniteLossError, better_half, neighbours, race
from entprune_ds.race import Clock, log, order_scores, raced
from entprune_ds.race_plan import check_budget, cost_of, plan, rounds_of, trial_batch, validation_cost
from entprune_ds.race_replicas import KEYS, Replicas, State, built, state_of
from entprune_ds.race_trial import Recovery, micro_batch, trial_config
from entprune_ds.ranking import needed_criteria
from tests.test_monitor import decision_row, write_run
from tests.tiny import tiny_config

# ---------------------------------------------------------------- plan


def test_rounds_halve_the_candidates_and_double_the_steps():
    assert [(r.candidates, r.steps) for r in rounds_of(8, 5)] == [(8, 5), (4, 10), (2, 20)]
    assert [(r.candidates, r.steps) for r in rounds_of(5, 1)] == [(5, 1), (3, 2), (2, 4)]
    assert rounds_of(1, 5) == []
    assert cost_of(rounds_of(8, 5), 0) == 8 * 5 + 4 * 5 + 2 * 10  # survivors go on where they stopped
    assert cost_of(rounds_of(4, 1), 0.5) == 4 * 1.5 + 2 * 1.5


@settings(max_examples=200)
@given(st.floats(1, 1e4), st.floats(0, 3), st.none() | st.integers(2, 40), st.none() | st.integers(1, 50))
def test_a_plan_stays_within_its_budget_uses_it_and_keeps_what_is_given(budget, validation, count, first):
    try:
        rounds = plan(budget, validation, count, first)
    except ValueError as error:
        assert cost_of(rounds_of(count or 2, first or 1), validation) > budget
        assert "the budget has" in str(error)
        return
    assert cost_of(rounds, validation) <= budget * (1 + 1e-9)
    assert count in (None, rounds[0].candidates) and first in (None, rounds[0].steps)
    if first is None:  # one step more would not fit
        assert cost_of(rounds_of(rounds[0].candidates, rounds[0].steps + 1), validation) > budget * (1 - 1e-6)
    elif count is None and rounds[0].candidates < 32:
        assert cost_of(rounds_of(rounds[0].candidates + 1, first), validation) > budget


def race_settings(**race: object) -> Config:
    """12 blocks to 4, the budget of 2000 steps at batch 128."""
    config = tiny_config(depth=12)
    train = TrainConfig(num_steps=2000, global_batch_size=128)
    prune = PruneConfig(target_depth=4, criterion="recovery_race", num_checks=1)
    return replace(config, train=train, prune=prune, race=RaceConfig(**race))


def test_the_budget_is_a_share_of_the_run_in_steps_of_a_candidate():
    config = race_settings(budget=0.05, batch_size=1.0, validation_draws=384)
    assert check_budget(config) == pytest.approx(0.05 * 2000 * 12 / 4)
    assert validation_cost(config) == pytest.approx(1.0)  # 384 forward passes cost as much as 128 with a backward pass
    quarter = race_settings(budget=0.05, batch_size=0.25, validation_draws=384)
    assert trial_batch(quarter) == 32 and check_budget(quarter) == pytest.approx(4 * check_budget(config))
    assert validation_cost(quarter) == pytest.approx(4.0)
    four = replace(config, prune=replace(config.prune, num_checks=4))
    assert check_budget(four) == pytest.approx(check_budget(config) / 4)


def test_a_trial_batch_is_a_multiple_of_the_readers_and_micro_batches_divide_it():
    assert trial_batch(race_settings(batch_size=0.001)) == 4  # data.num_readers of the tiny config
    assert trial_batch(race_settings(batch_size=0.3)) == 40
    assert [micro_batch(w, 12) for w in (None, 5, 8, 100)] == [12, 4, 6, 12]
    config = race_settings(batch_size=0.25)
    config = replace(config, train=replace(config.train, micro_batch_size=64))
    train = trial_config(config, 2).train
    assert (train.global_batch_size, train.micro_batch_size) == (32, 16)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"budget": 0.0}, "`race.budget` must lie in (0, 1]"),
        ({"budget": 1e-4}, "Raise it or train.num_steps, lower race.validation_draws"),
        ({"budget": 0.01, "candidates": 32, "first_steps": 40}, "32 candidates with 40 steps in the first round cost"),
        ({"candidates": 1}, "`race.candidates` must be at least 2, got 1."),
        ({"first_steps": 0}, "`race.first_steps` must be at least 1"),
        ({"batch_size": 1.5}, "`race.batch_size` must lie in (0, 1]"),
        ({"validation_draws": 1}, "`race.validation_draws` must be at least 2"),
        ({"learning_rate": -1.0}, "`race.learning_rate` must be above 0"),
        ({"origins": ("spaced", "nowhere")}, "`race.origins` must list some of spaced, criteria, random"),
        ({"origins": ()}, "`race.origins` must list some of"),
        ({"replicas": "maybe"}, "`race.replicas` must be auto, true or false"),
        ({"local_search": -1}, "`race.local_search` must be at least 0"),
    ],
)
def test_impossible_settings_are_refused_with_a_remedy(setting, said):
    [problem] = problems_of(race_settings(**setting))
    assert said in problem
    assert problems_of(race_settings()) == []
    assert problems_of(replace(race_settings(**setting), prune=PruneConfig(target_depth=4))) == []  # no race, no matter


# ---------------------------------------------------------------- halving


def test_a_race_whose_best_set_is_known_picks_it_and_survivors_go_on():
    asked = []

    def trial(sets, start, stop):
        asked.append((list(sets), start, stop))
        return [abs(sum(s) - 7) + 1 / stop for s in sets]

    sets = [(0, 1), (0, 3), (3, 4), (2, 3), (1, 2)]
    found = race(sets, [2, 4, 8], trial)
    assert found.winner == (3, 4)
    assert asked == [(sets, 0, 2), ([(0, 3), (3, 4), (2, 3)], 2, 4), ([(3, 4), (2, 3)], 4, 8)]
    assert [r["steps"] for r in found.rounds] == [2, 4, 8]
    assert [c["stays"] for c in found.rounds[1]["losses"]] == [False, True, True]
    assert found.rounds[2]["losses"][0] == {"kept_blocks": [3, 4], "loss": 0.125, "stays": True}


def test_a_set_that_starts_badly_but_recovers_wins_as_long_as_it_is_in_the_better_half():
    curves = {(0,): {1: 0.5, 2: 0.4}, (1,): {1: 0.6, 2: 0.2}, (2,): {1: 0.9, 2: 0.0}}
    assert race(list(curves), [1, 2], lambda sets, _, stop: [curves[s][stop] for s in sets]).winner == (1,)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf]), min_size=1, max_size=9))
def test_the_better_half_is_never_worse_than_what_leaves_and_ties_go_to_the_first(losses):
    stays = better_half(losses)
    gone = [i for i in range(len(losses)) if i not in stays]
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    assert len(stays) == min(len(finite), (len(losses) + 1) // 2) and stays == sorted(stays)
    assert all(math.isfinite(losses[i]) for i in stays)
    assert all((losses[i], i) < (losses[j], j) for i in stays for j in gone if math.isfinite(losses[j]))


def test_nan_loses_duplicates_race_once_and_nothing_finite_is_an_error():
    seen = []

    def trial(sets, start, stop):
        seen.extend(sets)
        return [math.nan if s == (0,) else float(s[0]) for s in sets]

    assert race([(0,), (2,), (2,), (5,)], [1, 2], trial).winner == (2,)
    assert seen.count((0,)) == 1 and seen.count((2,)) == 2
    with pytest.raises(NoFiniteLossError, match="Nothing was removed"):
        race([(0,), (1,)], [1], lambda sets, *_: [math.inf, math.nan])
    with pytest.raises(ValueError, match="must be more rounds"):
        race([(0,), (1,), (2,)], [1], lambda sets, *_: [1.0, 2.0, 3.0])
    assert race([(3,)], [1, 2], trial).rounds == []  # alone: nothing to try


def test_neighbours_exchange_one_block_nearest_first_and_leave_protected_ones():
    near = neighbours((1, 4), range(6))
    assert near[:4] == [(0, 4), (2, 4), (1, 3), (1, 5)] and len(near) == len(set(near)) == 8
    assert all(1 in kept for kept in neighbours((1, 4), range(6), protected=(1,)))


# ---------------------------------------------------------------- candidates


def request(depth: int, target: int, **scores: list[float]) -> RankingRequest:
    """A request at depth `depth` with the given values by block."""
    found = {name: {b: Score(v, 0.0) for b, v in enumerate(values)} for name, values in scores.items()}
    return RankingRequest(
        scores=found, kept_blocks=tuple(range(depth)), target_depth=target, seed=3, check=1, explicit_order=()
    )


def test_candidates_come_from_every_score_evenly_spaced_and_at_random():
    asked = request(12, 4, loss=[float(i) for i in range(12)], ced=[-float(i) for i in range(12)])
    found = candidates(asked, 20, ("spaced", "criteria", "random"))
    by_origin = {c.origin: c.kept_blocks for c in found}
    assert by_origin["loss"] == (8, 9, 10, 11) and by_origin["ced"] == (0, 1, 2, 3)
    assert by_origin["spaced 0"] == (0, 4, 7, 11) and by_origin["spaced 1"] == (0, 3, 6, 9)
    assert by_origin["spaced 3"] == (2, 5, 8, 11)
    assert [c.origin for c in found[:2]] == ["spaced 0", "ced"]  # the origins take turns
    assert len(found) == 20 == len({c.kept_blocks for c in found})
    assert found == candidates(asked, 20, ("spaced", "criteria", "random"))
    assert candidates(asked, 3, ("random",)) != candidates(replace(asked, check=2), 3, ("random",))


@settings(max_examples=100)
@given(st.data())
def test_candidates_are_different_sorted_present_of_the_target_depth_and_hold_what_is_protected(data):
    depth = data.draw(st.integers(2, 12))
    target = data.draw(st.integers(1, depth - 1))
    protected = data.draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=target))
    count = data.draw(st.integers(1, 30))
    found = candidates(request(depth, target, loss=[1.0] * depth), count, ("random", "spaced", "criteria"), protected)
    sets = [c.kept_blocks for c in found]
    assert len(sets) == len(set(sets)) == min(count, math.comb(depth - len(protected), target - len(protected)))
    for kept in sets:
        assert list(kept) == sorted(set(kept)) and len(kept) == target and set(kept) <= set(range(depth))
        assert set(protected) <= set(kept)


def test_a_criterion_by_name_gives_its_set_and_one_spread_over_the_model():
    taylor = [9.0, 8.0, 1.0, 2.0, 7.0, 3.0, 4.0, 5.0]
    asked = request(8, 4, taylor=taylor, loss=[1.0] * 8)
    assert candidates(asked, 9, ("taylor",)) == [
        Origin((0, 1, 4, 7), "taylor"),
        Origin((0, 1, 4, 6), "taylor, spread"),
    ]
    held = candidates(asked, 9, ("taylor",), protected=(2, 3))
    places = {b: float(sorted(taylor).index(taylor[b])) for b in range(8)}
    possible = [keep for keep in combinations(range(8), 4) if {2, 3} <= set(keep)]
    best = max(possible, key=lambda keep: keep_set_value(keep, places))
    assert [c.kept_blocks for c in held] == [(0, 1, 2, 3), best]
    assert candidates(asked, 9, ("taylor",), protected=(0, 1, 2, 3)) == [Origin((0, 1, 2, 3), "taylor")]


@pytest.mark.parametrize(
    ("origins", "measured", "sweeps"),
    [
        (("spaced", "random"), 0, False),
        (("taylor", "magnitude_l1", "magnitude_l2", "spaced"), 2, False),
        (("loss", "random"), 0, True),
        (("criteria",), 0, True),
    ],
)
def test_a_race_measures_what_gives_it_candidates_and_no_more(origins, measured, sweeps):
    config = Config(prune=PruneConfig(criterion="recovery_race"), race=RaceConfig(origins=origins))
    needed = needed_criteria(config)
    assert any(c.needs_sweep for c in needed) == sweeps
    assert len({c.measure for c in needed if c.measure is not None}) == measured


def test_even_spacing_of_present_blocks_goes_by_place_not_by_index():
    asked = replace(request(12, 2), kept_blocks=(0, 5, 6, 11))
    assert spaced(asked, ())[0].kept_blocks == (0, 11)
    assert {c.kept_blocks for c in spaced(asked, ())} == {(0, 11), (0, 6), (5, 11)}


def test_the_order_takes_blocks_outside_the_winner_first_each_side_by_its_loss():
    scores = {"loss": {b: Score(v, 0.1) for b, v in enumerate((0.3, 0.1, 0.9, 0.2, 0.5))}}
    found = order_scores((0, 3), scores, range(5))
    assert removal_order("recovery_race", found, range(5), target_depth=2) == [1, 4, 2, 3, 0]


# ---------------------------------------------------------------- trials in one process


def trials(digits: str, **race: object) -> Replicas:
    """Trials of a tiny fresh model in this process, three examples at a time."""
    config = tiny_config(0, input_size=8, num_classes=10)
    config = replace(config, data=replace(config.data, shards=f"{digits}/train"), race=RaceConfig(**race))
    model = initialize(DiT(config.model), 0)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = State({"weight": weights, **{k: {n: torch.zeros_like(p) for n, p in weights.items()} for k in KEYS[1:]}}, 0)
    objective = build_objective(config.model, config.diffusion)
    latents, labels = torch.linspace(-1, 1, 1024).reshape(16, 1, 8, 8), torch.arange(16) % 10
    judge = objective.make_draws(latents, labels, range(16), seed=0, purpose="judge", step=0)
    return Replicas(config.model, state, Recovery(config, 0, 0, objective, judge), 3, torch.float32)


def test_a_trial_that_goes_on_is_one_that_never_stopped_and_the_start_is_untouched(digits):
    whole, parts = trials(digits), trials(digits)
    before = {n: t.clone() for n, t in whole.start.tensors["weight"].items()}
    at_once = whole.run([(0, 2), (1, 3)], 0, 4, lambda share: None)
    shares: list[float] = []
    parts.run([(0, 2), (1, 3)], 0, 1, shares.append)
    assert shares == [0.5, 1.0]
    rest = parts.run([(1, 3)], 1, 4, lambda share: None)
    assert rest == at_once[1:] and list(parts.going_on) == [(1, 3)]
    assert parts.run([(1, 3), (0, 2)], 0, 4, lambda share: None) == at_once[::-1]  # a new race starts from the start
    assert all(torch.equal(t, before[n]) for n, t in whole.start.tensors["weight"].items())
    assert whole.going_on[0, 2].step == 4


def test_every_candidate_sees_the_same_draws_and_another_check_others(digits):
    recovery = trials(digits).recovery
    first, again = (next(recovery.draws(0, 1)) for _ in range(2))
    assert torch.equal(first.z_t, again.z_t) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.z_t, next(replace(recovery, check=1).draws(0, 1)).z_t)
    halves = [next(recovery.draws(0, 1, rank, 2)) for rank in range(2)]
    assert sorted(t for h in halves for t in h.t.tolist()) == sorted(first.t.tolist())


def test_trial_steps_have_the_learning_rate_behind_the_warm_up_and_never_one_beyond_the_run():
    train = TrainConfig(num_steps=100, warmup_steps=20, learning_rate=1e-3, lr_schedule="cosine")
    config = Config(train=train, prune=PruneConfig(target_depth=2, criterion="recovery_race"))

    def rates(step: int) -> list[float]:
        recovery = Recovery(config, 0, step, objective=None, validation=None)
        return [recovery.learning_rate(i) for i in (0, 1, 30)]

    assert rates(0) == rates(20) == [learning_rate(train, step) for step in (20, 21, 50)]
    assert rates(0)[0] == 1e-3
    assert rates(90) == [learning_rate(train, step) for step in (90, 91, 99)]


def test_a_state_survives_being_built_and_taken_back(digits):
    held = trials(digits)
    held.run([(0, 2)], 0, 2, lambda share: None)
    state = held.going_on[0, 2]
    again = state_of(*built(held.model.keeping((0, 2)), state, held.recovery.config))
    assert again.step == state.step == 2
    assert all(torch.equal(again.tensors[k][n], state.tensors[k][n]) for k in KEYS for n in state.tensors[k])
    assert any(t.abs().sum() > 0 for t in state.tensors["exp_avg"].values())


class Known:
    """Trials whose losses are known: the distance of a keep-set from the best one."""

    def __init__(self, best: tuple[int, ...]):
        self.best, self.asked = best, []

    def run(self, keep_sets, start, stop, watch):
        self.asked.append((len(keep_sets), start, stop))
        watch(0.5)
        return [float(sum(abs(a - b) for a, b in zip(kept, self.best, strict=True))) for kept in keep_sets]


def test_a_local_search_finds_what_was_not_among_the_candidates(caplog, monkeypatch):
    config = race_settings(budget=0.5, local_search=8, validation_draws=384)
    sets = [Origin((0, 4, 7, 11), "spaced 0"), Origin((0, 1, 2, 3), "loss")]
    known, rounds = Known((0, 4, 8, 11)), rounds_of(2, 3)
    monkeypatch.setattr(Clock, "seconds", 0.0)
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("INFO", logger=log.name):
        winner, record = raced(known, config, rounds, sets, range(12), ())
    assert winner == record["winner"] == (0, 4, 8, 11)
    assert [c["origin"] for c in record["candidates"]] == ["spaced 0", "loss"] + ["local search"] * 8
    assert [asked[:2] for asked in known.asked] == [(2, 0), (9, 0), *((n, s) for n, s, _ in known.asked[2:])]
    assert 0.2 < record["share_of_run"] <= 0.5
    assert "race: round 1 of 1, 2 keep-sets, from 0 to 3 recovery steps" in caplog.text
    assert "50 % of it done" in caplog.text and "s left" in caplog.text
    _, record = raced(Known((0, 4, 8, 11)), config, rounds, sets, range(12), (7,))
    assert all(7 in c["kept_blocks"] for c in record["candidates"][2:])
    config = replace(config, race=RaceConfig(budget=0.5))
    alone, record = raced(Known((0, 4, 8, 11)), config, rounds, sets, range(12), ())
    assert alone == (0, 4, 7, 11) and len(record["rounds"]) == 1


# ---------------------------------------------------------------- check, record, report


RECORD = {
    "candidates": [{"kept_blocks": [0, 3], "origin": "spaced 0"}, {"kept_blocks": [1, 2], "origin": "ced <b>"}],
    "rounds": [
        {
            "steps": 5,
            "losses": [
                {"kept_blocks": [0, 3], "loss": 0.5, "stays": True},
                {"kept_blocks": [1, 2], "loss": None, "stays": False},
            ],
        }
    ],
    "winner": [0, 3],
    "executor": "replicas",
    "batch_size": 128,
    "share_of_run": 0.04,
}


def test_a_decision_carries_its_race_and_older_ones_keep_their_digest():
    row = decision_row(criterion="recovery_race")
    values = {k: v for k, v in row.items() if k != "digest"}
    plain, raced = PruneDecision(**values), PruneDecision(**values, race=RECORD)
    assert plain.digest != raced.digest and PruneDecision.from_json(raced.to_json()) == raced
    older = {k: v for k, v in plain.to_json().items() if k != "race"}
    assert PruneDecision.from_json(older).digest == plain.digest


def test_the_report_shows_the_rounds_and_takes_a_damaged_record_for_what_it_is(tmp_path):
    folder = write_run(tmp_path / "good", [decision_row(criterion="recovery_race", race=RECORD)])
    text = build_report(folder).read_text()
    assert "Recovery race" in text and "after 5 steps" in text and "spaced 0" in text and "ced &lt;b&gt;" in text
    assert "not finite" in text and "4.0 %" in text
    assert "Recovery race" not in build_report(write_run(tmp_path / "none")).read_text()
    for place, damaged in enumerate(({"rounds": 3}, {"rounds": [{"steps": 1, "losses": [7]}]}, "text")):
        with pytest.raises(ValueError):
            decision_of(decision_row(race=damaged))
        folder = write_run(tmp_path / f"bad{place}", [decision_row(race=damaged)])
        assert "1 " in build_report(folder).read_text()


def test_a_check_without_a_training_run_says_that_a_race_needs_one(digits):
    config = race_settings()
    config = replace(
        config,
        model=replace(config.model, input_size=8, num_classes=10),
        score=replace(config.score, draws=4, batch_size=2),
        data=replace(config.data, shards=f"{digits}/train"),
    )
    model = initialize(DiT(config.model), 0)
    with pytest.raises(ValueError, match=r"`prune.criterion` recovery_race trains candidates"):
        run_check(ModuleParts(model), config.model.blocks, config, 0, 0, 12, examples_of(config, 0))
