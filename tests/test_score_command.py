"""`entprune-ds score`: every criterion on a checkpoint, a run and an export, on one rank and on two; --replay."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from entprune_ds.calibration import examples_of
from entprune_ds.cli.compare_scores import score_sets
from entprune_ds.cli.sample import sampling_problems
from entprune_ds.cli.score import main
from entprune_ds.config import ModelConfig, load_config
from entprune_ds.config_checks_prune import CRITERIA
from entprune_ds.importance.criteria import CRITERIA as TABLE
from entprune_ds.importance.criteria import Criterion, lowest_score_first
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.interop.safetensors import open_export, write_export
from entprune_ds.interop.source import Source, loaded_model
from entprune_ds.interop.tensors import parameter_shapes
from entprune_ds.monitor import score_plots
from entprune_ds.monitor.correlation import rank_correlations
from entprune_ds.monitor.records import decision_of
from entprune_ds.monitor.score_page import block_rows, render
from entprune_ds.ranking import measuring
from entprune_ds.rng import generator_for
from entprune_ds.scoring import score_model
from tests.ranks import ROOT, run_ranks
from tests.test_monitor import decision_row, picture
from tests.test_training import words

MODEL = ModelConfig(depth=4, hidden_size=32, num_heads=2, patch_size=2, input_size=8, in_channels=1, num_classes=10)
SETTINGS = ["score.draws=64", "score.batch_size=32", "score.dtype=float64", "learned.steps=4"]


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A model of random weights whose blocks 0, 2, 5 and 7 of 8 are left."""
    model = ModelConfig(**vars(MODEL) | {"depth": 8, "kept_blocks": (0, 2, 5, 7)})
    shapes = parameter_shapes(model)

    def read(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator_for(0, name)) / shapes[name][-1] ** 0.5

    folder = tmp_path_factory.mktemp("export") / "model"
    write_export(folder, Source(model, read, {"weights": "raw", "step": 7}))
    return folder


def scored(out: Path) -> dict:
    return json.loads((out / "scores.json").read_text())


def test_every_criterion_on_an_export_is_printed_plotted_and_stored(export, digits, tmp_path, capsys):
    out = tmp_path / "deep" / "scores"
    assert main([f"weights={export}", f"data.shards={digits}/train", f"out={out}", *SETTINGS]) == 0
    result, printed = scored(out), capsys.readouterr().out
    assert set(result["criteria"]) == set(CRITERIA)
    assert result["model"] == {
        "path": str(export), "weights": "raw", "step": 7, "depth": 4, "kept_blocks": [0, 2, 5, 7],
    }  # fmt: skip
    assert result["draws"]["draws"] == 64 and result["draws"]["target_depth"] == 2 and result["draws"]["ranks"] == 1
    for name in ("ced", "ced_abs", "loss"):
        found = result["criteria"][name]
        by_value = sorted(result["scores"][name], key=lambda b, name=name: result["scores"][name][b]["value"])
        assert found["order"] == [int(b) for b in by_value] and found["seconds"] > 0 and not found["note"]
        assert all(s["standard_error"] > 0 for s in result["scores"][name].values())
    assert sorted(result["criteria"]["every_other"]["order"]) == [0, 2, 5, 7]
    assert result["criteria"]["every_other"]["seconds"] is None
    assert result["criteria"]["explicit"] == {
        "order": None, "seconds": None, "note": "`prune.explicit_order` is not given",
    }  # fmt: skip
    names = result["correlations"]["names"]
    assert set(names) >= {"ced", "ced_abs", "loss", "mse"}
    for kind in ("spearman", "kendall"):
        assert all(math.isclose(result["correlations"][kind][i][i], 1) for i in range(len(names)))
    for text in ("Scores, ± standard error", "every_other", "Spearman", "Kendall", "seconds"):
        assert text in printed
    page = (out / "scores.html").read_text()
    assert "<script" not in page and page.count("data:image/png") == 3
    assert {p.name for p in out.glob("*.png")} == {f"scores_{n}.png" for n in ("heat_map", "bars", "correlation")}


def test_what_was_asked_for_is_measured_alone_and_at_the_stated_target(export, digits, tmp_path):
    more = ["score.criteria=[random,every_other]", "prune.target_depth=3", f"out={tmp_path}"]
    assert main([f"weights={export}", f"data.shards={digits}/train", *more, *SETTINGS]) == 0
    result = scored(tmp_path)
    assert list(result["criteria"]) == ["random", "every_other"] and result["scores"] == {}
    assert result["draws"]["target_depth"] == 3 and not list(tmp_path.glob("*.png"))


def test_a_criterion_that_cannot_score_this_model_says_why_and_leaves_the_others(export, digits, tmp_path, monkeypatch):
    def broken(m):
        raise ValueError("it needs gradients where there are none")

    monkeypatch.setitem(TABLE, "random", Criterion(lowest_score_first("own"), measure=broken))
    monkeypatch.setitem(TABLE, "every_other", Criterion(lowest_score_first("own"), needs_sweep=True, races=True))
    more = ["score.criteria=[loss,random,every_other]", f"out={tmp_path}"]
    assert main([f"weights={export}", f"data.shards={digits}/train", *more, *SETTINGS]) == 0
    found = scored(tmp_path)["criteria"]
    assert found["random"]["note"] == "it needs gradients where there are none" and found["random"]["order"] is None
    assert "only a training run can tell" in found["every_other"]["note"] and found["every_other"]["seconds"] is None
    assert found["loss"]["order"] and not found["loss"]["note"]


def test_a_combination_and_a_file_of_ones_own_are_scored_like_any_other(export, digits, tmp_path):
    own = tmp_path / "deepest.py"
    own.write_text(
        "from entprune_ds.importance.criteria import Criterion\n"
        "CRITERION = Criterion(lambda request: sorted(request.kept_blocks, reverse=True))\n"
    )
    more = [f"score.criteria=[combined,{own}]", "prune.combined=[loss:1,mse:1]", f"out={tmp_path}/out"]
    assert main([f"weights={export}", f"data.shards={digits}/train", *more, *SETTINGS]) == 0
    result = scored(tmp_path / "out")
    assert result["criteria"][str(own)]["order"] == [7, 5, 2, 0]
    by_value = {
        n: sorted(result["scores"][n], key=lambda b, n=n: result["scores"][n][b]["value"]) for n in ("loss", "mse")
    }
    places = {b: by_value["loss"].index(b) + by_value["mse"].index(b) for b in by_value["loss"]}
    expected = sorted(places, key=lambda b: (places[b], -int(b)))
    assert result["criteria"]["combined"]["order"] == [int(b) for b in expected]


def test_bad_input_is_refused_in_words(export, digits, tmp_path, capsys, monkeypatch):
    data = f"data.shards={digits}/train"
    cases = {
        "`model.weights` is missing. Give a model": [data],
        "`data.shards` is empty": [f"weights={export}"],
        "/nowhere is not an exported model": ["weights=/nowhere", data],
        "`score.criteria` must be among": [f"weights={export}", data, "score.criteria=[best]"],
        "`score.batch_size` must divide `score.draws` (100) and be": [
            f"weights={export}",
            data,
            "score.draws=100",
        ],
        "`score.weights` must be one of raw, ema": [f"weights={export}", data, "score.weights=mean"],
        "is not a run folder": ["run=/nowhere", data],
        "--replay takes one run folder": ["--replay"],
        "decisions.jsonl is missing": ["--replay", str(tmp_path)],
        "is not a setting": [f"weights={export}", data, "score.mood=1"],
        "`prune.combined` may hold": [f"weights={export}", data, "prune.combined=[combined:1]"],
        "`score.until` resolved needs": [f"weights={export}", data, "score.until=resolved", "prune.criterion=taylor"],
    }
    for expected, arguments in cases.items():
        assert main(arguments) == 2, expected
        error = capsys.readouterr().err
        assert expected in error and error.startswith("error: ") and "Traceback" not in error
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert main([f"weights={export}", data, *SETTINGS]) == 2
    assert "at least the number of ranks (64)" in capsys.readouterr().err


def test_a_model_of_a_run_that_prunes_softly_or_ranks_greedily_is_scored_and_sampled(export, digits, tmp_path):
    soft = ["soft.every=10", "soft.target_macs=0.1", "score.mode=greedy", "score.criteria=[loss,every_other]"]
    place = [f"weights={export}", f"data.shards={digits}/train", *SETTINGS, *soft]
    assert main([*place, f"out={tmp_path}/scores"]) == 0
    assert set(scored(tmp_path / "scores")["criteria"]) == {"loss", "every_other"}
    assert sampling_problems(load_config(place[1:], check=lambda config: []), export) == []


def test_a_diffusion_model_is_scored_without_a_preset(digits, tmp_path):
    model = replace(MODEL, process="dit", learn_sigma=True)
    shapes = parameter_shapes(model)

    def read(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator_for(0, name)) / shapes[name][-1] ** 0.5

    write_export(tmp_path / "dit", Source(model, read, {"weights": "plain", "step": None}))
    place = [f"weights={tmp_path}/dit", f"data.shards={digits}/train", f"out={tmp_path}/scores", *SETTINGS]
    assert main([*place, "score.criteria=[loss,magnitude_l1]"]) == 0
    assert set(scored(tmp_path / "scores")["criteria"]) == {"loss", "magnitude_l1"}


@pytest.mark.full
def test_launched_ranks_score_the_newest_checkpoint_of_a_run(digits, tmp_path):
    assert run_ranks("tests.workers.training:train", 1, runs=[words(digits, tmp_path, "run")]) == [[0]]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "entprune_ds.cli.score", f"run={tmp_path}/run", *SETTINGS, "score.criteria=[taylor,magnitude_l1]"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(scored(tmp_path / "run" / "scores")["criteria"]) == {"taylor", "magnitude_l1"}


def test_a_model_with_nan_is_refused_and_what_says_nothing_is_no_success(export, digits, tmp_path, capsys):
    place = [f"data.shards={digits}/train", f"out={tmp_path}/scores", *SETTINGS]
    assert main([*place, f"weights={export}", "score.criteria=[explicit]"]) == 1
    shapes = parameter_shapes(MODEL)
    write_export(
        tmp_path / "nan", Source(MODEL, lambda n: torch.full(shapes[n], math.nan), {"weights": "ema", "step": 0})
    )
    assert main([*place, f"weights={tmp_path}/nan"]) == 2
    assert "NaN or infinite values" in capsys.readouterr().err


@pytest.mark.full
def test_a_run_that_waits_and_its_scores_on_two_ranks(digits, tmp_path, capsys):
    run = tmp_path / "waits"
    training = words(
        digits, tmp_path, "waits", "prune.num_checks=3", "prune.end_step=9", "prune.max_blocks_per_check=2",
        "prune.min_steps_between=4", "prune.protected_blocks=[0]", "prune.vote_weights=[0,0,1]",
        "model.depth=6", "prune.target_depth=3", "prune.recovery_tolerance=1000", "train.validate_every=2",
        "train.num_steps=9",
    )  # fmt: skip
    place = f"weights={run}/checkpoints/step_00000006"
    settings = [*SETTINGS, "score.criteria=[ced,loss,taylor,gradient_flow,every_other]"]
    scoring = [place, f"data.shards={digits}/train", f"out={tmp_path}/two", *settings]
    assert run_ranks("tests.workers.score:train_and_score", 2, training=training, scoring=scoring) == [[0, 0]] * 2

    decisions = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
    assert [d["step"] for d in decisions] == [0, 3, 6] and [d["chosen_depth"] for d in decisions] == [4, 4, 3]
    assert all(0 in d["kept_blocks"] for d in decisions)
    deep, shallow = decisions[0]["candidates"]
    assert deep["step_seconds"] > shallow["step_seconds"] > 0 and (deep["time_rank"], shallow["time_rank"]) == (2, 1)
    assert "fewer than prune.min_steps_between=4" in decisions[1]["held"] and decisions[1]["candidates"] == []
    assert decisions[1]["scores"]["loss"]  # score.sweep=always: for the record
    seen = decisions[2]["state"]["validations"]
    assert [step for step, _, _ in seen] == [0, 0, 2, 3, 4, 6] and all(loss > 0 for _, _, loss in seen)
    assert len({size for _, size, _ in seen[:1]} | {size for _, size, _ in seen[1:]}) == 2
    assert main(["--replay", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"check {i}, step {3 * i}, depth {d}: the same again" for i, d in enumerate((4, 4, 3))]

    assert main([*scoring[:2], f"out={tmp_path}/one", *settings]) == 0
    one, two = scored(tmp_path / "one"), scored(tmp_path / "two")
    assert one["model"]["kept_blocks"] == decisions[0]["kept_blocks"] and two["draws"]["ranks"] == 2
    assert one["model"]["step"] == 6 and one["model"]["weights"] == "raw"
    for name, by_block in one["scores"].items():
        for block, score in by_block.items():
            assert two["scores"][name][block]["value"] == pytest.approx(score["value"], rel=1e-9, abs=1e-12)
    assert [c["order"] for c in one["criteria"].values()] == [c["order"] for c in two["criteria"].values()]

    capsys.readouterr()
    assert main([f"run={run}", "score.criteria=[loss]", *SETTINGS]) == 0
    assert scored(run / "scores")["model"]["step"] == 9  # the newest checkpoint
    assert main([f"run={run}", "score.criteria=[loss]", f"out={tmp_path}/ema", "score.weights=ema", *SETTINGS]) == 0
    assert scored(tmp_path / "ema")["scores"] != scored(run / "scores")["scores"]
    changed = (run / "decisions.jsonl").read_text().replace('"chosen_depth": 3', '"chosen_depth": 2')
    (run / "decisions.jsonl").write_text(changed)
    assert main(["--replay", str(run)]) == 2
    assert "line 3" in capsys.readouterr().err


# ---------------------------------------------------------------- what is drawn and correlated


def test_criteria_that_remove_alike_agree_whichever_end_goes_first():
    same = {"taylor": {0: 1.0, 1: 2.0, 2: 3.0}, "gradient_flow": {0: 9.0, 1: 5.0, 2: 1.0}}
    assert rank_correlations(same).kendall == ((1.0, 1.0), (1.0, 1.0))


def test_rank_correlations_of_known_orders():
    found = rank_correlations({
        "a": {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0},
        "b": {0: 10.0, 1: 20.0, 2: 40.0, 3: 30.0},
        "reversed": {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0, 9: 7.0},
        "gaps": {0: 1.0, 1: math.nan, 2: 2.0, 3: 0.5},
        "constant": dict.fromkeys(range(4), 1.0),
        "few": {0: 1.0, 1: 2.0},
    })  # fmt: skip
    assert found.names == ("a", "b", "reversed", "gaps", "constant")
    assert found.spearman[0][:3] == pytest.approx((1, 0.8, -1)) and found.kendall[0][:3] == pytest.approx(
        (1, 2 / 3, -1)
    )
    assert found.spearman[0][3] == pytest.approx(-0.5)  # over blocks 0, 2 and 3 alone
    assert math.isnan(found.spearman[0][4]) and math.isnan(found.kendall[4][0])
    assert found.spearman[1][2] == found.spearman[2][1]


def test_figures_of_scores_are_pictures_and_of_nothing_none():
    scores = {f"criterion {i} $x^$": {b: (math.sin(b * (i + 1)), 0.1) for b in range(28)} for i in range(5)}
    scores["hole"] = {0: (math.nan, math.nan), 1: (1.0, math.nan)}
    correlated = rank_correlations({n: {b: v for b, (v, _) in found.items()} for n, found in scores.items()})
    for png in (score_plots.heat_map(scores), score_plots.bars(scores), score_plots.correlation_matrices(correlated)):
        image = picture(png)
        assert image.shape[1] > 600 and image.std() > 10
    assert score_plots.heat_map({}) is None and score_plots.bars({}) is None
    assert score_plots.correlation_matrices(rank_correlations({})) is None


def test_blocks_that_cannot_be_told_apart_are_marked():
    row = {"value": 1.0, "standard_error": 0.1}
    head, rows = block_rows({"ced": {"3": row | {"same_as": [4, 7]}, "4": row}, "loss": {"4": row}})
    assert head == ["block", "ced", "loss"]
    assert rows == [("3", "1.00 ± 0.10 (as 4, 7)", "–"), ("4", "1.00 ± 0.10", "1.00 ± 0.10")]


def test_the_page_escapes_what_it_is_given():
    hostile = "<script>alert(1)</script>"
    found = {"order": None, "seconds": None, "note": hostile}
    result = {"model": {"path": hostile}, "draws": {}, "criteria": {hostile: found}, "scores": {}}
    assert b"<script" not in render(result, {})


def test_the_report_shows_correlations_the_step_time_and_what_held_a_check_back():
    from entprune_ds.monitor.decision_section import decision_section

    row = decision_row()
    for i, candidate in enumerate(row["candidates"]):
        candidate |= {"step_seconds": 0.5 + i, "time_rank": 1 + i}
    page = decision_section(decision_of(row), 4)
    assert "step time (s)" in page and "0.500" in page and "Spearman ρ between" in page and "-1.00" in page
    assert "step time" not in decision_section(decision_of(decision_row()), 4)
    held = decision_row(dropped=(), held="the validation loss is high", candidates=[], order=[])
    assert "held back" in decision_section(decision_of(held), 4)


def test_of_all_keep_sets_the_one_that_a_criterion_chooses_has_the_lowest_sum_of_its_scores(export, digits):
    words = [f"model.weights={export}", f"data.shards={digits}/train", "prune.target_depth=2", *SETTINGS]
    config = load_config(words, check=lambda config: [])
    source = open_export(export)
    config = replace(config, model=source.model)
    net, kept = loaded_model(source), (0, 2, 5, 7)
    names = ("ced", "loss", "flux_lite", "taylor", "diff_pruning", "magnitude_l1", "gradient_flow")
    check = measuring(ModuleParts(net), kept, config, 0, examples_of(config, 0))
    orders = {name: found.order for name, found in score_model(check, names).criteria.items()}
    of_sets = score_sets(config, net, {str(keep): list(keep) for keep in combinations(kept, 2)})
    for name, order in orders.items():
        best = min(of_sets, key=lambda keep: of_sets[keep][f"sum of single {name}"])
        assert best == str(tuple(sorted(order[2:]))), name
