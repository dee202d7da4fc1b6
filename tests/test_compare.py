"""Comparing criteria: the arithmetic of equal compute, plan, statistics, text, locks and failures of rows."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from entprune_ds.cli import compare_row, compare_worker, evaluate_inputs
from entprune_ds.cli.compare import main
from entprune_ds.cli.compare_base import base_config, base_path, other_base
from entprune_ds.cli.compare_metrics import check_seconds, damage, equal_step, spent, validation_losses
from entprune_ds.cli.compare_plan import Row, removals, row_config, row_digest, rows_of, studies
from entprune_ds.cli.compare_row import Bench, base_unfinished, missing, plain_step_macs, result_path, run_row
from entprune_ds.cli.compare_rows import at_equal_steps, plain_rows
from entprune_ds.cli.compare_sources import other_settings, sources
from entprune_ds.cli.compare_text import (
    correlation_table,
    figure_cells,
    latex_table,
    margins,
    markdown_table,
    over_budget,
    sampling_table,
    speedup_table,
    standing,
)
from entprune_ds.cli.compare_worker import attempt, failure_path, log_path, work
from entprune_ds.cli.evaluate_inputs import extractor_problem
from entprune_ds.config import Config, ModelConfig, load_config, problems_of, to_yaml
from entprune_ds.config_checks_compare import compare_problems
from entprune_ds.data.index import load_index
from entprune_ds.evaluation.compare import difference, mean_of, rank_correlations
from entprune_ds.evaluation.memorisation import memorisation, nearest_distances
from entprune_ds.mac_counter import MacCounter, counted
from entprune_ds.models.dit import DiT
from entprune_ds.models.registry import count_macs
from entprune_ds.monitor import compare_plots
from tests.ranks import ROOT
from tests.test_locks import hold
from tests.tiny import MODEL, tiny_config

WORDS = ["preset=digits", "prune.target_depth=4", "compare.criteria=[ced,random,every_other]"]
BASE = ModelConfig(depth=12, hidden_size=96, num_heads=4, input_size=8, in_channels=1, num_classes=10)


def settings(*words: str) -> Config:
    """The digits preset with these words."""
    return load_config([*WORDS, *words], check=lambda config: [])


# ---------------------------------------------------------------- compute


def test_counted_macs_are_those_of_the_formula_and_a_backward_pass_is_seen():
    model = replace(MODEL, depth=3)
    net, size = DiT(model), model.input_size
    inputs = torch.randn(5, 1, size, size), torch.rand(5), torch.zeros(5, dtype=torch.int64)
    with MacCounter() as counter, torch.no_grad():
        net(*inputs)
    assert counter.macs == 5 * count_macs(model)
    with MacCounter() as both:
        net(*inputs).square().mean().backward()
    assert 2.8 * counter.macs < both.macs < 3.2 * counter.macs
    with counted(False) as nobody:
        assert nobody is None


def test_compute_is_summed_over_architectures_and_checks_a_resumed_line_counting_once():
    metrics = [
        {"step": 0, "prune/score_macs": 1000}, {"step": 1, "train/step_macs": 30}, {"step": 4, "prune/score_macs": 500},
        {"step": 5, "train/step_macs": 10}, {"step": 7, "train/step_macs": 10}, {"step": 5, "train/loss": 1.0},
    ]  # fmt: skip
    assert spent(metrics, 9) == (4 * 30 + 5 * 10, 1500)
    assert spent(metrics, 20) == (4 * 30 + 16 * 10, 1500)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 150), (0.2, 120), (0.4967, 75), (0.98, 3), (3.0, 1)])
def test_a_row_stops_where_its_total_compute_is_that_of_the_plain_steps(share, expected):
    plain = 1000
    budget = 150 * plain
    metrics = [{"step": 0, "prune/score_macs": round(share * budget)}, {"step": 1, "train/step_macs": plain}]
    stop = equal_step(metrics, budget)
    assert stop == expected
    if share < 1:
        assert abs(sum(spent(metrics, stop)) - budget) <= plain / 2


def test_dearer_steps_and_steps_before_the_last_check_leave_fewer():
    teacher = [{"step": 1, "train/step_macs": 2000}]
    assert equal_step(teacher, 150_000) == 75
    progressive = [{"step": 1, "train/step_macs": 3000}, {"step": 21, "train/step_macs": 1000}]
    assert equal_step(progressive, 150_000) == 150 - 2 * 20


def test_a_plain_step_costs_as_much_as_its_forward_and_backward_passes():
    config = tiny_config()
    plain = plain_step_macs(config, config.model, 2)
    forward = count_macs(config.model.keeping((0, 1))) * config.train.global_batch_size
    assert 2.8 * forward < plain < 3.2 * forward


# ---------------------------------------------------------------- plan


def test_rows_of_a_seed_differ_in_nothing_but_what_is_compared():
    config = settings("compare.study=[criteria,schedule,depth]", "compare.depths=[4,5]", "prune.criterion=ced")
    rows = rows_of(studies(config, BASE))
    assert len({row.name for row in rows}) == len(rows)
    assert [row.seed for row in rows] == sorted(row.seed for row in rows)  # cut short, it is even
    base = row_config(config, rows[0], BASE, Path("out"))
    for row in rows:
        changed = row_config(config, row, BASE, Path("out"))
        assert problems_of(changed) == [], row.name
        for section in ("data", "train", "sample", "diffusion", "parallel", "model", "score"):
            assert getattr(changed, section) == getattr(base, section), (row.name, section)
        assert changed.run.seed == row.seed and changed.run.name == row.name
        assert changed.score.sweep == "needed" and not changed.monitor.wandb and changed.monitor.count_macs


def test_random_keep_sets_are_the_same_for_every_seed_and_differ_from_each_other():
    found = studies(settings(), BASE)[0].contestants
    assert list(found) == ["ced", "random_1", "random_2", "random_3", "every_other"]
    orders = [{row.changes["prune.explicit_order"] for row in found[f"random_{n}"]} for n in (1, 2, 3)]
    assert all(len(by_seed) == 1 for by_seed in orders) and len(set.union(*orders)) == 3
    assert [row.seed for row in found["random_1"]] == [0, 1, 2]


def test_subsets_are_thirty_different_keep_sets_measured_after_a_short_and_a_long_recovery():
    config = settings("compare.study=[criteria,subsets,sampling]")
    criteria, subsets = studies(config, BASE)
    removed = {row.changes["prune.explicit_order"] for rows in subsets.contestants.values() for row in rows}
    assert len(removed) == 30 and all(len(blocks) == 8 for blocks in removed)
    assert all(row.long and row.probes == (5, 10, 20, 40, 80) for rows in subsets.contestants.values() for row in rows)
    first, second, _ = criteria.contestants["ced"]  # the criteria's own keep-sets join them, with one seed
    assert first.long and first.probes and first.samplings == (10, 25, 50, 250)
    assert not second.long and not second.samplings
    few = studies(settings("compare.study=[criteria,subsets]", "prune.target_depth=11"), BASE)[1]
    assert len(few.contestants) == 12  # there are no more


def test_a_fixed_schedule_leaves_the_vote_no_choice_and_one_shot_is_the_criterions_own_row():
    config = settings("compare.study=[criteria,schedule]", "prune.criterion=ced")
    criteria, schedule = studies(config, BASE)
    assert schedule.contestants["one_shot"] == criteria.contestants["ced"]
    fixed = row_config(config, schedule.contestants["progressive, fixed"][0], BASE, Path("out"))
    assert fixed.prune.max_blocks_per_check * fixed.prune.num_checks == 12 - 4
    voted = row_config(config, schedule.contestants["progressive, vote_ntk_zico"][0], BASE, Path("out"))
    assert voted.prune.max_blocks_per_check is None and voted.prune.end_step == 75
    assert voted.prune.ntk_samples == config.prune.ntk_samples  # made cheap only where nothing is voted on
    soft = row_config(config, schedule.contestants["gradient flow, soft"][0], BASE, Path("out"))
    assert soft.soft.every == 3 and removals(soft)[-1] == 75 and removals(fixed) == [0, 18, 37, 56]
    one = row_config(config, criteria.contestants["ced"][0], BASE, Path("out"))
    assert (one.prune.num_checks, one.prune.ntk_samples) == (1, 2)


def test_a_study_of_another_criterion_has_the_published_method_beside_it():
    config = settings("compare.study=[schedule]", "prune.criterion=taylor")
    (schedule,) = studies(config, BASE)
    voted = schedule.contestants["progressive, vote_ntk_zico"]
    published = schedule.contestants["ced, progressive, vote_ntk_zico (EntPruner)"]
    assert {row.name for row in published} == {f"ced_vote_ntk_zico-s{seed}" for seed in (0, 1, 2)}
    for ours, theirs in zip(voted, published, strict=True):
        made = [row_config(config, row, BASE, Path("out")) for row in (ours, theirs)]
        assert [c.prune.criterion for c in made] == ["taylor", "ced"]
        assert replace(made[0].prune, criterion="ced") == made[1].prune


def test_further_bases_are_pruned_once_each_with_their_own_seed_and_come_last():
    config = settings("compare.study=[criteria,bases]", "compare.bases=[7,5]", "compare.random_sets=1")
    criteria, bases = studies(config, BASE)
    rows = rows_of([criteria, bases])
    assert [row.name for row in rows[-6:]] == [f"{c}-b{b}" for b in (5, 7) for c in ("ced", "random_1", "every_other")]
    assert list(bases.contestants) == list(criteria.contestants)
    for name, (first, *further) in bases.contestants.items():
        assert first == criteria.contestants[name][0]
        assert [(row.seed, row.base) for row in further] == [(7, 7), (5, 5)]
        for row in further:
            made = row_config(config, row, BASE, Path("out"))
            assert made.model == replace(BASE, weights=f"out/base_{row.base}/model") and made.run.seed == row.base
    for row in criteria.contestants["ced"]:
        assert row_config(config, row, BASE, Path("out")).model == BASE
    trained = base_config(config, 7)
    assert (trained.run.name, trained.run.seed, trained.run.root) == ("base_7", 7, config.compare.out)
    same = replace(trained, run=base_config(config).run)
    assert same == base_config(config)  # but for name and seed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("compare.bases=[0]",), "`compare.bases` must be seeds of at least 0 other than 0"),
        (("compare.bases=[3,3]",), "`compare.bases` names something twice"),
        (("compare.study=[bases]",), "`compare.bases` is empty, but `compare.study` asks for bases"),
    ],
)
def test_impossible_further_bases_are_refused(words, said):
    assert any(said in problem for problem in compare_problems(settings(*words)))


def test_a_result_of_other_settings_has_another_digest_paths_and_workers_do_not_count():
    config = settings()
    row = rows_of(studies(config, BASE))[0]
    known = row_digest(row_config(config, row, BASE, Path("out")))
    moved = replace(BASE, weights="elsewhere")
    free = ("compare.workers=1", "compare.seeds=[0,5]", "data.shards=/other", "run.timeout_seconds=9")
    same = settings(*free, "data.num_workers=2", "prune.combined=[ced:1,loss:1]")
    assert row_digest(row_config(same, row, moved, Path("other"))) == known
    for word in ("train.learning_rate=1e-3", "compare.recovery_steps=151", "sample.num_samples=100", "score.draws=512"):
        assert row_digest(row_config(settings(word), row, BASE, Path("out"))) != known, word


def test_settings_of_one_criterion_change_the_digest_of_its_rows_alone():
    """Tuning a race must not make the rows of ced train again."""
    for word, criterion in {"race.budget=0.2": "recovery_race", "learned.steps=50": "learned"}.items():
        for name in ("ced", "recovery_race", "learned"):
            row = Row(name="x-s0", criterion=name, seed=0, target_depth=4, changes={"prune.criterion": name})
            digests = {row_digest(row_config(c, row, BASE, Path("out"))) for c in (settings(), settings(word))}
            assert len(digests) == 1 + (name == criterion), (word, name)


def test_a_criterion_that_contains_another_reads_its_settings_and_a_file_is_part_of_the_digest(tmp_path):
    mine = tmp_path / "mine.py"

    def digest_of(criterion: str, *words: str) -> str:
        row = Row(name="x-s0", criterion="x", seed=0, target_depth=4, changes={"prune.criterion": criterion})
        return row_digest(row_config(settings(*words), row, BASE, Path("out")))

    for criterion, word in (
        ("combined", "prune.combined=[learned:1,ced:1]"),
        ("recovery_race", "race.origins=[learned]"),
    ):
        assert digest_of(criterion, word) != digest_of(criterion, word, "learned.steps=50")
    mine.write_text("CRITERION = 1")
    before = digest_of(str(mine))
    mine.write_text("CRITERION = 2")
    assert digest_of(str(mine)) != before


def test_soft_pruning_of_the_command_is_of_no_row_and_of_no_base():
    config = settings(
        "soft.every=5", "soft.target_macs=0.5", "distill.kind=output", "compare.study=[criteria,schedule]"
    )
    criteria, schedule = studies(config, BASE)
    made = row_config(config, criteria.contestants["ced"][0], BASE, Path("out"))
    assert made.soft.every == 0 and made.soft.target_macs == 0.5
    soft = row_config(config, schedule.contestants["gradient flow, soft"][0], BASE, Path("out"))
    assert soft.soft.every == 3
    base = base_config(config)
    assert base.soft.every == 0 and base.distill.kind == "none" and base.prune.target_depth is None


def test_random_keep_sets_hold_what_is_protected_and_there_are_no_more_than_exist():
    config = settings("compare.study=[criteria,subsets]", "prune.protected_blocks=[0,-1]")
    for study in studies(config, BASE):
        for name, (row, *_) in study.contestants.items():
            if name.startswith(("random", "set")):
                made = row_config(config, row, BASE, Path("out"))
                assert problems_of(made) == [] and not {0, 11} & set(made.prune.explicit_order)
    few = settings("prune.target_depth=11", "prune.protected_blocks=[0,1,2,3,4,5,6,7,8,9]", "compare.random_sets=3")
    (criteria,) = studies(few, BASE)
    assert [name for name in criteria.contestants if name.startswith("random")] == ["random_1", "random_2"]


def test_a_row_is_finished_when_everything_that_is_asked_of_it_was_measured():
    compare = settings("compare.recovery_steps=10", "compare.long_steps=20").compare
    row = Row(name="x-s0", criterion="x", seed=0, target_depth=4, long=True, probes=(5,), samplings=(7,))
    assert missing(row, compare, {}) == [
        "step 10", "step 20", "equal compute", "probe 5", "7 sampler steps", "latency",
    ]  # fmt: skip
    result = {"equal_step": 8, "stops": {"10": {}, "20": {}}, "probes": {"5": 1.0}, "samplings": {"7": {}}}
    assert missing(row, compare, result) == ["step 8", "latency"]
    whole = result | {"stops": {"8": {}, "10": {}, "20": {}}, "latency_ms": {"1": 1.0}}
    assert missing(row, compare, whole) == []
    assert missing(replace(row, samplings=(7, 9)), compare, whole) == ["9 sampler steps"]


def test_a_base_is_finished_when_it_was_sampled_as_asked():
    config = settings("compare.study=[criteria,sampling]", "compare.sampling_steps=[5,7]")
    assert base_unfinished(config, {}) and base_unfinished(config, {"latency_ms": {}, "samplings": {"5": {}}})
    whole = {"latency_ms": {}, "samplings": {"5": {}, "7": {}}}
    assert not base_unfinished(config, whole) and not base_unfinished(settings(), {"latency_ms": {}, "samplings": {}})


def test_damage_is_the_rise_at_the_removals_and_probes_are_read_at_their_steps():
    loss = "train/validation_loss"
    metrics = [{"step": 0, loss: 0.5}, {"step": 0, loss: 0.9}, {"step": 5, loss: 0.7}, {"step": 8, loss: 0.6}]
    metrics += [{"step": 8, loss: 0.8}, {"step": 9, "train/loss": 1.0}]
    assert damage([0, 8], metrics) == pytest.approx(0.4 + 0.2)
    assert damage([], metrics) == 0
    assert validation_losses(metrics, (5, 7)) == {"5": 0.7}


def test_seconds_of_checks_are_summed_over_their_parts_a_repeated_check_counting_once():
    first = {"step": 0, "prune/score_seconds": 1.0, "prune/vote_seconds": 0.5}
    metrics = [first, first | {"prune/score_seconds": 2.0}, {"step": 0, "prune/race_seconds": 4.0}]
    assert check_seconds([*metrics, {"step": 7, "prune/score_seconds": 0.25}]) == 2.0 + 0.5 + 4.0 + 0.25


# ---------------------------------------------------------------- statistics


def test_means_and_differences_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(5, 1, 6).tolist(), rng.normal(6, 2, 6).tolist()
    found = mean_of(a)
    assert (found.value, found.count) == (pytest.approx(np.mean(a)), 6)
    assert found.standard_error == pytest.approx(stats.sem(a))
    d = difference(dict(enumerate(a)), dict(enumerate(b)))
    assert d.value == pytest.approx(np.mean(b) - np.mean(a))
    assert d.errors_apart == pytest.approx(stats.ttest_ind(b, a, equal_var=False).statistic)
    assert d.paired_errors_apart == pytest.approx(stats.ttest_rel(b, a).statistic)
    alone = mean_of([3.0])
    assert alone.value == 3 and math.isnan(alone.standard_error)
    with pytest.raises(ValueError, match="at least one value"):
        mean_of([])


def test_pairs_are_the_seeds_that_both_have():
    d = difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 2.0, 1: 3.5, 7: 4.0})
    assert d.paired_error == pytest.approx(stats.sem([1.0, 1.5]))


def test_rank_correlations_are_scipys_and_nothing_is_said_without_variation():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=20), rng.normal(size=20)
    assert rank_correlations(a, a + 0.3 * b) == pytest.approx(
        (stats.spearmanr(a, a + 0.3 * b)[0], stats.kendalltau(a, a + 0.3 * b)[0])
    )
    assert rank_correlations([1, 2, 3], [1, 8, 27]) == pytest.approx((1, 1))
    assert all(math.isnan(v) for v in (*rank_correlations([1, 1, 1], [1, 2, 3]), *rank_correlations([1, 2], [1, 2])))


def test_copies_of_training_images_are_told_from_unseen_images():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (300, 8, 8, 1)).astype(np.uint8)
    training, validation, unseen = images[:100], images[100:200], images[200:]
    slow = [min(np.sqrt(np.mean((u / 255.0 - t / 255.0) ** 2)) for t in training) for u in unseen]
    assert nearest_distances(unseen, training) == pytest.approx(np.array(slow))
    copied = memorisation(training[:50], training, validation)
    assert copied["samples"] == 0 and copied["ratio"] == 0 and copied["copies"] == 1
    fresh = memorisation(unseen, training, validation)
    assert 0.95 < fresh["ratio"] < 1.05 and fresh["copies"] < 0.1
    with pytest.raises(ValueError, match="training images"):
        memorisation(unseen, training[:, :4], validation)


# ---------------------------------------------------------------- tables


def plain(criterion: str, seed: int, fid: float, **more: object) -> dict:
    """A row of compare.json."""
    row = dict(
        criterion=criterion, seed=seed, target_depth=4, fid=fid, kid=fid / 1e4, class_accuracy=0.9, val_loss=0.4,
        damage=fid / 10, latency_ms=1.0, score_seconds=2.0, kept_blocks=[0, 3, 7, 11], depths=[4], steps=98,
        macs=10**12, macs_budget=10**12, macs_training=9 * 10**11, macs_scoring=10**11,
    )  # fmt: skip
    equal = {k: row[k] for k in ("kid", "class_accuracy", "val_loss", "steps", "macs", "macs_training", "macs_scoring")}
    return row | {"equal_steps": equal | {"fid": 100 - fid}} | more


ROWS = [plain("far", s, 40 + s) for s in range(3)] + [plain("near", s, 20 + 2 * s) for s in range(3)]
ROWS += [plain("like", s, 20.5 + 2 * s) for s in range(3)]


def test_the_table_is_sorted_by_the_mean_fid_and_shows_the_standard_error():
    head, lines = figure_cells(ROWS)
    assert [line[0] for line in lines] == ["near", "like", "far"]
    fid = head.index("FID")
    assert lines[0][fid] == "22.0 ± 1.2" and lines[2][fid] == "41.00 ± 0.58"
    assert lines[0][head.index("checks' share of them (%)")] == "10" and lines[0][-1] == "0 3 7 11"
    assert [line[0] for line in figure_cells(at_equal_steps(ROWS))[1]] == ["far", "like", "near"]
    text = markdown_table(head, lines)
    assert text.count("\n") == 4 and len({line.count("|") for line in text.splitlines()}) == 1


def test_the_winner_is_told_with_its_margins_paired_and_unpaired():
    text = standing(ROWS)
    assert "Lowest mean FID: **near**, 22.0 ± 1.2 (n = 3)." in text
    assert "ahead of 1 of 2 by more than 2 standard errors" in text and "not of like." in text
    error = math.hypot(stats.sem([20, 22, 24]), stats.sem([40, 41, 42]))
    cells = next(line for line in text.splitlines() if line.startswith("| far")).split("|")
    assert float(cells[2]) == 19 and float(cells[3]) == pytest.approx(error, rel=0.05)
    assert float(cells[4]) == pytest.approx(19 / error, rel=0.05)
    assert float(cells[5]) == pytest.approx(stats.sem([20, 19, 18]), rel=0.05)
    ahead = "**like** is ahead of far; within 2 of near"
    assert ahead in margins(ROWS, "like") and margins(ROWS, "near") == "" == margins(ROWS, "absent")
    assert "**far** is behind near, like" in margins(ROWS, "far")
    level = [*ROWS, *(plain("level", seed, 21 + 2 * seed) for seed in range(3))]
    assert "**like** is ahead of far; within 2 of near, level" in margins(level, "like")
    assert standing(ROWS[:1]).endswith("(n = 1).") and "no standard errors" in standing([ROWS[0], ROWS[3]])


def test_contestants_whose_checks_exceed_the_common_compute_are_named():
    assert over_budget(ROWS) == ""
    rich = [row | {"macs": 3 * row["macs"]} if row["criterion"] == "like" else row for row in ROWS]
    assert over_budget(rich).endswith("was made: like (3.00 x).")


def test_latex_has_as_many_cells_as_columns_and_no_bare_specials():
    text = latex_table([plain("ced_abs", s, 3.0 + s) for s in range(2)])
    columns = text.split("{tabular}{")[1].split("}")[0]
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 2 and all(line.count("&") == len(columns) - 1 for line in body)
    assert r"ced\_abs" in text and r"$\pm$" in text and r"(\%)" in text


def test_scores_of_keep_sets_are_ranked_by_how_well_they_predict():
    sets = [plain(f"set_{i}", 0, 0.0) for i in range(6)]
    for i, row in enumerate(sets):
        row |= {"equal_steps": {"fid": float(i)}, "long": {"fid": float((i * 5) % 7)}}
    scores = {f"set_{i}": {"good": i**2, "bad": -i, "flat": 1.0} for i in range(6)}
    scores["set_0"]["rare"] = 2.0
    sets.append(plain("set_0", 1, 50.0))  # another seed was not trained to the long stop
    table = correlation_table(sets, scores).splitlines()
    expected = f"{stats.spearmanr(range(6), [0, 5, 3, 1, 6, 4])[0]:+.2f}"
    assert table[2].split(" | ")[:4] == ["| good", "6", "+1.00", "+1.00"] and table[2].split(" | ")[4] == expected
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| good", "| bad"]
    assert "| rare | 1 | – | – | – | – |" in table and "| flat | 6 | – | – | – | – |" in table


def test_sampler_steps_are_set_beside_the_usual_ones():
    rows = [plain(n, 0, f, samplings={"10": g, "50": f}) for n, f, g in (("a", 1, 9), ("b", 2, 8), ("c", 3, 7))]
    lines = sampling_table(rows, None, 25).splitlines()
    assert lines[0] == "| FID | 10 steps | 50 steps |" and lines[2] == "| a | 9 | 1 |"
    assert lines[-1] == "| Spearman with 25 steps | -1.00 | +1.00 |"


def test_the_speed_up_of_a_depth_stands_beside_its_share_and_its_fid():
    rows = [plain("depth 5", seed, 20 + seed, kept_blocks=[0, 3, 5, 7, 11]) for seed in (0, 2)]
    rows = [row | {"speedup_by_batch": {"1": 1.9 + row["seed"] / 10, "64": 2.3}} for row in rows]
    line = speedup_table(rows, {"depth": 12}).splitlines()[-1]
    assert line == "| depth 5 | 5 | 0.417 | 2 at batch 1; 2.30 at batch 64 | 21.0 ± 1.0 |"


def test_figures_are_pngs_and_nothing_is_drawn_of_nothing():
    png = b"\x89PNG"
    assert compare_plots.bars({"a": [1.0, 2.0]}, {"a": 0.5}, "FID").startswith(png)
    assert compare_plots.scatter({"a": (1.0, 2.0), "b": (math.nan, 1.0)}, "x", "y").startswith(png)
    panels = compare_plots.score_panels({"s": [1.0, 2.0]}, [3.0, 4.0], [1.0, 2.0], [True, False])
    assert panels.startswith(png)
    assert compare_plots.bars({}, {}, "FID") is None and compare_plots.scatter({}, "x", "y") is None


def test_only_finished_rows_become_rows_of_the_result():
    config = settings("compare.recovery_steps=10", "compare.seeds=[0]")
    figures = dict(
        fid=1.0, kid=0.1, class_accuracy=0.9, val_loss=0.4, memorisation={}, steps=8, macs=5, macs_training=4,
        macs_scoring=1,
    )  # fmt: skip
    whole = {
        "equal_step": 8, "stops": {"8": figures, "10": figures | {"fid": 2.0}}, "latency_ms": {"1": 3.0, "64": 9.0},
        "speedup": {"1": 2.0}, "damage": 0.5, "score_seconds": 1.5, "kept_blocks": [1, 2], "depths": [2], "probes": {},
    }  # fmt: skip
    results = {"ced-s0": whole, "every_other-s0": whole | {"stops": {"8": figures}}}
    found = plain_rows(studies(config, BASE)[0], config.compare, lambda name: results.get(name, {}))
    assert [row["criterion"] for row in found] == ["ced"]
    assert (found[0]["fid"], found[0]["equal_steps"]["fid"], found[0]["latency_ms"]) == (1.0, 2.0, 3.0)
    required = {"criterion", "seed", "fid", "kid", "class_accuracy", "damage", "val_loss", "latency_ms"}
    assert all(isinstance(found[0][key], (str, int, float)) for key in required | {"score_seconds"})
    json.dumps(found, allow_nan=False)
    at_steps = settings("compare.recovery_steps=10", "compare.seeds=[0]", "compare.equal_compute=false")
    assert plain_rows(studies(at_steps, BASE)[0], at_steps.compare, lambda n: results.get(n, {}))[0]["fid"] == 2.0


# ---------------------------------------------------------------- workers


def test_a_row_of_another_process_is_left_to_it_and_a_dead_one_is_taken_over(tmp_path):
    done, said = [], []

    def row(name: str) -> None:
        attempt(tmp_path, name, lambda: done.append(name), lambda: name not in done, lambda *event: said.append(event))

    with hold(tmp_path / "locks" / "a") as other:
        row("a")
        assert done == [] and said == []
        other.send_signal(signal.SIGKILL)
    row("a")
    row("a")
    assert done == ["a"] and said == [("start", "a"), ("done", "a")]


def test_a_row_that_raises_is_noted_with_its_log_and_not_tried_twice(tmp_path, capfd):
    said = []

    def fails() -> None:
        print("on the way")
        raise ValueError("no such luck")

    for _ in range(2):
        attempt(tmp_path, "a", fails, lambda: True, lambda *event: said.append(event))
    assert said == [("start", "a"), ("failed", "a")]
    failure = json.loads(failure_path(tmp_path, "a").read_text())
    assert failure["why"] == "ValueError: no such luck" and failure["log"] == str(log_path(tmp_path, "a"))
    text = log_path(tmp_path, "a").read_text()
    assert "on the way" in text and "Traceback" in text and "no such luck" in text
    print("spoken")
    assert "spoken" in capfd.readouterr().out  # the output is ours again


def test_a_base_that_failed_is_not_tried_for_ever_and_one_of_another_command_is_waited_for(tmp_path, monkeypatch):
    config, tried = settings(f"compare.out={tmp_path}"), []
    monkeypatch.setattr(compare_worker.comm, "init", lambda timeout: True)  # not in this process
    monkeypatch.setattr(compare_worker, "train", lambda settings, devices: tried.append(1) or 1 / 0)
    work(config, "base")
    work(config, "base")
    assert tried == [1] and "ZeroDivisionError" in failure_path(tmp_path, "base").read_text()
    failure_path(tmp_path, "base").unlink()
    with hold(tmp_path / "locks" / "base") as other:
        monkeypatch.setattr(compare_worker.time, "sleep", lambda seconds: base_path(config).mkdir(parents=True))
        work(config, "base")
        other.kill()
    assert tried == [1]


# ---------------------------------------------------------------- one experiment in a folder


def test_rows_of_another_base_or_of_other_data_do_not_join(digits, tmp_path):
    bases = [tmp_path / name for name in "ab"]
    for base in bases:
        base.mkdir()
        (base / "config.json").write_text(json.dumps({"name": base.name}))
    words = [
        f"compare.out={tmp_path / 'out'}",
        "compare.criteria=[ced]",
        "compare.seeds=[0]",
        f"data.shards={digits}/train",
    ]
    config = settings(f"compare.base={bases[0]}", *words)
    (row,) = rows_of(studies(config, BASE))
    made = sources(config, row)
    assert set(made) == {"base", "data"}
    settled = row_digest(row_config(config, row, BASE, tmp_path / "out"))
    path = result_path(tmp_path / "out", row.name)
    path.parent.mkdir(parents=True)

    def said(given: Config, **more: object) -> str:
        path.write_text(json.dumps({"digest": settled, "sources": made, "stops": {"150": {}}} | more))
        return " ".join(other_settings(given, BASE))

    latency = {"latency_ms": {"1": 1.0, "64": 9.0}}
    assert said(config, **latency) == "" == said(config, sources={})  # those of an earlier version say nothing
    assert "was made from another base than" in said(settings(f"compare.base={bases[1]}", *words))
    assert "was made from other data than" in said(
        settings(*words[:3], f"compare.base={bases[0]}", f"data.shards={digits}/val")
    )
    assert "with other `evaluate.latency_batches`" in said(
        settings(*words, f"compare.base={bases[0]}", "evaluate.latency_batches=[1]"), **latency
    )
    assert "with other settings" in said(config, digest="0")


def test_what_lies_in_a_row_without_figures_goes_on_only_with_the_settings_that_it_was_begun_with(
    digits, tmp_path, monkeypatch
):
    config = settings(f"compare.out={tmp_path}", f"data.shards={digits}/train", "compare.criteria=[ced]")
    bench, (row, *_) = Bench(config, tmp_path, BASE, None, None, None), rows_of(studies(config, BASE))
    other = replace(bench, config=settings(f"compare.out={tmp_path}", "train.learning_rate=1e-6"))
    there = row_config(config, row, BASE, tmp_path).run_dir / "there"
    monkeypatch.setattr(compare_row, "train_to", lambda settings, row, stop: 1 / 0)

    def begun(bench: Bench, made_from: dict[str, str]) -> bool:
        """Whether what lay in the run folder is still there when the training begins."""
        there.parent.mkdir(parents=True, exist_ok=True)
        there.touch()
        with pytest.raises(ZeroDivisionError):
            run_row(bench, row, made_from)
        return there.exists()

    assert [begun(bench, {"base": "a"}) for _ in range(2)] == [False, True]
    assert not begun(other, {"base": "a"}) and not begun(other, {"base": "b"})
    assert other_settings(config, BASE) == []  # nothing was measured, so nothing can be mixed


def test_the_setting_that_differs_from_a_finished_row_is_named(digits, tmp_path):
    words = (f"compare.out={tmp_path}", f"data.shards={digits}/train", "compare.criteria=[ced]", "compare.seeds=[0]")
    config = settings(*words)
    (row,) = rows_of(studies(config, BASE))
    made = row_config(config, row, BASE, tmp_path)
    made.run_dir.mkdir(parents=True)
    (made.run_dir / "config.yaml").write_text(to_yaml(made))
    path = result_path(tmp_path, row.name)
    path.parent.mkdir()
    path.write_text(json.dumps({"digest": row_digest(made), "stops": {"150": {}}}))
    assert other_settings(config, BASE) == []
    (problem,) = other_settings(settings(*words, "train.learning_rate=1e-6"), BASE)
    assert f"with other settings (`train.learning_rate` {made.train.learning_rate}, not 1e-06) than these" in problem


def test_a_worker_ends_with_the_command_that_started_it():
    code = "import time; from entprune_ds.cli.compare import _end_with_parent; import threading; "
    code += "threading.Thread(target=_end_with_parent).start(); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"1\n" and process.poll() is None
    process.stdin.close()
    assert process.wait(20) == -signal.SIGTERM


def test_a_base_of_other_settings_is_refused_and_speed_does_not_count(tmp_path):
    config = settings(f"compare.out={tmp_path}")
    assert other_base(config) == []
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.yaml").write_text(to_yaml(base_config(config)))
    more = ("train.checkpoint_every=7", "compare.recovery_steps=9", "prune.criterion=loss")
    assert other_base(settings(f"compare.out={tmp_path}", *more)) == []
    (problem,) = other_base(settings(f"compare.out={tmp_path}", "compare.base_steps=10", "compare.seeds=[4]"))
    assert "made with `compare.base_steps` 2000, not 10; `compare.seeds[0]` 0, not 4. Use those" in problem


# ---------------------------------------------------------------- command


def refusal(capsys: pytest.CaptureFixture, *words: str) -> list[str]:
    """The problems that a command line is refused with."""
    assert main([*words]) == 2
    return capsys.readouterr().err.splitlines()


def test_impossible_comparisons_are_refused_with_all_problems(digits, tmp_path, capsys):
    data = ["preset=digits", f"data.shards={digits}/train", f"out={tmp_path / 'out'}"]
    lines = refusal(capsys, *data, "seeds=[0,0]", "study=[criteria,taste]", "workers=0")
    assert [line.split("`")[1] for line in lines] == [
        "compare.study",
        "compare.seeds",
        "compare.workers",
        "prune.target_depth",
    ]
    (line,) = refusal(capsys, *data, "target_depth=4", "criteria=[nonsense]")
    assert line.startswith("error: `prune.criterion` must be one of") and "nonsense" in line
    (line,) = refusal(capsys, *data, "target_depth=12")
    assert "`prune.target_depth` must be below" in line
    (line,) = refusal(capsys, *data, "target_depth=4", "train.lr_schedule=cosine")
    assert "`train.lr_schedule` must be constant" in line
    subsets = ("target_depth=4", "study=[criteria,subsets]", "compare.equal_compute=false")
    (line,) = refusal(capsys, *data, *subsets, "train.lr_schedule=cosine")
    assert "no subsets in compare.study" in line
    (line,) = refusal(capsys, *data, *subsets, "distill.kind=features")
    assert "`distill.kind` features fades out" in line
    (line,) = refusal(capsys, *data, "target_depth=4", "criteria=[ced,a/ced.py,b/x.py,c/x.py]")
    assert "a/ced.py, b/x.py, c/x.py would be called like another criterion" in line
    (line,) = refusal(capsys, *data, "target_depth=4", "sample.num_samples=64")
    assert "`sample.num_samples` must be above 64, the features" in line
    (line,) = refusal(capsys, *data, "target_depth=4", "study=[criteria,depth]")
    assert "`compare.depths` is empty" in line
    (line,) = refusal(capsys, *data, "target_depth=4", "base=/nowhere")
    assert "/nowhere" in line
    index = load_index(f"{digits}/train")
    assert extractor_problem(index) == "" and "holds [1, 8, 8] with 5 classes" in extractor_problem(
        replace(index, num_classes=5)
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate_inputs, "extractor_problem", lambda index: "made for digits.")
        assert refusal(capsys, *data, "target_depth=4") == [
            "error: `data.shards`: made for digits. Compare there by the validation losses of single runs."
        ]
    preset = tmp_path / "mine.yaml"
    preset.write_text("compare: {criteria: [mine.py]}")
    (line,) = refusal(capsys, *data[1:], f"preset={preset}", "target_depth=4")
    assert "mine.py" in line and "whose code would run" in line
    assert refusal(capsys, *data, "--nonsense") == ["error: `--nonsense` is not known. See --help."]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_every_row_and_the_time_and_starts_nothing(digits, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["preset=digits", f"data.shards={digits}/train", f"out={out}", "target_depth=4", "criteria=[ced,random]"]
    assert main([*words, "seeds=[3,4]", "--dry-run"]) == 0
    text = capsys.readouterr().out
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert rows[:4] == ["ced-s3", "random_1-s3", "random_2-s3", "random_3-s3"] and rows[8:] == ["base"]
    assert "8 rows, 0 done; about " in text and not out.exists()
