"""Speed and health in the report, and the comparison of runs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from entprune_ds.cli import report as report_cli
from entprune_ds.monitor import activity_plots, runs_page, runs_plots
from entprune_ds.monitor.activity_section import late_median
from entprune_ds.monitor.numbers import MISSING
from entprune_ds.monitor.report import build_report
from entprune_ds.monitor.run_folder import read_run_folder
from tests.test_monitor import HOSTILE, Page, decision_row, write_run


def rich_rows(seed: int = 0, steps: int = 600, speed: float = 1.0) -> list[dict]:
    """Lines as a training writes them; blocks 1 and 2 leave at step 300."""
    generator, rows = np.random.default_rng(seed), []
    for step in range(10, steps + 1, 10):
        kept = range(6) if step <= 300 else (0, 3, 4, 5)
        wave = float(1 + 0.05 * generator.standard_normal())
        parts = {
            "forward": 0.020, "backward": 0.041, "optimizer": 0.008, "communication": 0.013, "data": 0.002,
            "other": 0.3 if step % 200 == 0 else 0.004,
        }  # fmt: skip
        parts = {name: seconds * wave * speed * len(kept) / 6 for name, seconds in parts.items()}
        whole = sum(parts.values())
        rows.append({
            "step": step, "time": 1.7e9 + step, "train/loss": 2 * math.exp(-step / 200 * speed) + 0.1 * wave,
            "train/depth": len(kept), "train/step_seconds": whole, "train/examples_per_second": 128 / whole,
            "train/grad_norm": 3 * math.exp(-step / 100) + 0.1, "train/memory_rss_gib": 1.2 + step / 1e4,
            "train/mfu": 0.3 * wave, **{f"train/seconds_{name}": v for name, v in parts.items()},
        })  # fmt: skip
        if step % 50 == 0:
            rows.append({"step": step, "time": 1.7e9 + step, "train/validation_loss_ema": 1 + 100 / step})
        if step % 20 == 0:
            rows.append({"step": step, "time": 1.7e9 + step} | {
                f"train/{name}/block_{b:02d}": (0.1 + 0.05 * b) * size * step / steps
                for b in kept for name, size in (("residual", 1.0), ("gate_attention", 0.3), ("gate_mlp", 0.5))
            })  # fmt: skip
    return rows


def write_rich(folder: Path, rows: list[dict], config: str = "run:\n  name: a\n", **more) -> Path:
    write_run(folder, **more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "config.yaml").write_text(config)
    return folder


def test_figures_of_speed_and_blocks_are_pictures():
    rows = rich_rows()
    drawn = [
        activity_plots.time_split(rows),
        activity_plots.speed_and_memory(rows),
        activity_plots.block_map(rows, "residual"),
        activity_plots.time_split(rows[:1]),
        activity_plots.speed_and_memory([{"step": 1, "train/bubble_share": 0.3}]),
        runs_plots.overlaid({"a": rows, "$b$ \ud800": rich_rows(1, 4000)}),
    ]
    for png in drawn:
        assert png is not None
        image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        assert image.shape[1] > 600 and image.std() > 10
    nothing = [{"step": 1, "train/loss": 1.0, "train/residual/block_-1": 1.0, "train/residual/block_99999999": 1}]
    assert activity_plots.time_split(nothing) is None and activity_plots.block_map(nothing, "residual") is None
    assert activity_plots.speed_and_memory(nothing) is None and runs_plots.overlaid({"a": []}) is None


def test_the_grid_of_blocks_has_gaps_where_a_block_was_not_there():
    rows = [{"step": 1, "train/gate_mlp/block_00": 0.5, "train/gate_mlp/block_03": 0.25}]
    rows.append({"step": 2, "train/gate_mlp/block_03": 0.75})
    steps, blocks, values = activity_plots.block_grid(rows, "gate_mlp")
    assert (steps, blocks) == ([1, 2], [0, 3])
    np.testing.assert_array_equal(values, [[0.5, np.nan], [0.25, 0.75]])


def test_the_report_says_where_the_time_goes(tmp_path):
    folder = write_rich(tmp_path / "demo", rich_rows())
    page = Page(build_report(folder))
    for words in ("Speed and health", "Where the time of a step goes", "waiting for data", "collectives and traffic",
                  "What the blocks do"):  # fmt: skip
        assert words in page.text, words
    plain = Page(build_report(write_run(tmp_path / "plain")))
    assert page.tags.count("img") == plain.tags.count("img") + 2 + 3
    assert "Speed and health" not in plain.text
    run = read_run_folder(folder)
    late = [r["train/seconds_forward"] for r in rich_rows() if "train/seconds_forward" in r][30:]
    assert late_median(run, "train/seconds_forward") == pytest.approx(float(np.median(late)))
    assert f"{np.median(late) * 1e3:.1f}" in page.text


def test_the_report_shows_slow_ranks_and_the_latency_table(tmp_path):
    looks = [(200, 3, 1.1), (400, 1, 1.2), (600, 3, 1.75), (800, 3, None)]  # the last one is damaged
    ranks = [
        {"step": step, "ranks/slowest": slow, "ranks/slowest_ratio": ratio, "ranks/data_seconds": 0.002,
         "ranks/data_seconds_max": 0.004, "ranks/compute_seconds": 0.08, "ranks/compute_seconds_max": 0.13}
        for step, slow, ratio in looks
    ]  # fmt: skip
    row = {"depth": 4, "parameters": 675_000_000, "macs": 118_600_000_000, "batch": 64, "precision": "bf16",
           "compile": True, "median_ms": 12.5, "p10_ms": 12.25, "p90_ms": 13.5, "images_per_second": 5120.0,
           "speedup": 1.875}  # fmt: skip
    folder = write_rich(tmp_path / "demo", rich_rows() + ranks)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"latency_table": [row, 3, {"depth": HOSTILE}]}))
    page = Page(build_report(folder))
    assert "Rank 3 was the slowest at 2 of 3 looks" in page.text and "at most 1.75 times as long" in page.text
    assert "waiting for data24" in page.text and "forward, backward, optimizer80130" in page.text
    assert "464bf16yes675 M119 G12.512.213.55,1201.88" in page.text and "script" not in page.tags
    for rows in ([], 3, None):
        (folder / "evaluation.json").write_text(json.dumps(evaluation | {"latency_table": rows}))
        assert "Latency of a forward pass" not in Page(build_report(folder)).text
    alone = [{"step": 200, "ranks/slowest": 0, "ranks/slowest_ratio": 1.0, "ranks/data_seconds": 0.1}]
    assert "Ranks beside each other" not in Page(build_report(write_rich(tmp_path / "one", rich_rows() + alone))).text


CONFIG = "run: {{name: {0}}}\ntrain:\n  learning_rate: {1}\n  betas: [0.9, 0.999]\nprune:\n  criterion: {2}\n"


def two_runs(root: Path) -> list[Path]:
    a = write_rich(root / "x" / "demo", rich_rows(), CONFIG.format("a", 0.0001, "ced"))
    slow = [decision_row(step=300, dropped=(1,)), decision_row(1, 400, (0, 2, 3), (3,), score_only=True)]
    b = write_rich(root / "y" / "demo", rich_rows(1, 400, 2.0), CONFIG.format("b", 0.0002, "ced"), decisions=slow)
    evaluation = json.loads((b / "evaluation.json").read_text())
    evaluation["pruned"] |= {
        "fid": 6.5,
        "kid": None,
        "sfid": 9.25,
        "inception_score": 41.5,
        "precision": 0.75,
        "recall": 0.5,
    }
    (b / "evaluation.json").write_text(json.dumps(evaluation))
    return [a, b]


def test_runs_are_compared_on_one_page(tmp_path, capsys):
    a, b = two_runs(tmp_path)
    assert report_cli.main([str(a), str(b), f"out={tmp_path}/both.html"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/both.html\n"
    page = Page(tmp_path / "both.html")
    for words in (
        "x/demo", "y/demo", "FID, whole set7.8756.500", "train.learning_rate0.00010.0002", "steps600400", "depth23",
        "step 300: removed block 1; depth 4 → 3 (by vote, ced)", "would remove block 3", "x/demo: final.png",
    ):  # fmt: skip
        assert words in page.text, words
    assert "criterionced" not in page.text and "run.name" not in page.text  # only what differs
    assert page.tags.count("img") == 1 + 2
    assert not {"script", "link", "iframe", "form"} & set(page.tags)
    runs = dict(zip(["a", "b"], map(read_run_folder, (a, b)), strict=True))
    rows = {row[0]: row[1:] for row in runs_page.final_rows(runs)}
    shown = {"sFID": "9.250", "Inception score": "41.50", "precision": "0.7500", "recall": "0.5000"}
    assert {name: rows[name] for name in shown} == {name: (MISSING, value) for name, value in shown.items()}
    assert "KID, whole set" not in rows and rows["parameters"] == ("617 k", "617 k")
    slow, fast = (float(rows["ms a step, median of the later half"][i]) for i in (1, 0))
    assert slow > 1.5 * fast
    assert report_cli.main([str(a), str(b)]) == 0 and (a.parent / "comparison.html").is_file()


def test_hostile_and_damaged_runs_are_compared_too(tmp_path):
    name = HOSTILE.replace("/", "").replace("\ud800", "")
    hostile = decision_row(criterion=HOSTILE, reason=HOSTILE)
    a = write_rich(tmp_path / name, rich_rows(), f"run: {json.dumps(HOSTILE)}\n", decisions=[hostile], text=HOSTILE)
    b = tmp_path / "b"
    b.mkdir()
    (b / "config.yaml").write_text("a: [1\n" + "[" * 5000)
    c = write_rich(tmp_path / "c", [{"step": 1, "train/loss": None}], "run: 1\n")
    (c / "evaluation.json").write_text('{"speedup": 3, "pruned": []}')
    out = runs_page.build_comparison([a, b, c], tmp_path / "out.html")
    page = Page(out)
    assert not {"script", "svg", "iframe"} & set(page.tags)
    assert "b: config.yaml is damaged" in page.text and "b: metrics.jsonl is missing" in page.text
    assert "alert(1)" in page.text


def test_runs_that_cannot_be_compared_are_refused_on_one_line(tmp_path, capsys):
    a, b = two_runs(tmp_path)
    cases = [
        ([str(a), str(a)], "named twice"), ([str(a), str(tmp_path / "none")], "not a folder"),
        ([str(a), str(b), "out=x.txt"], "must end in .html"), ([str(a), "out=x.html"], "several runs"),
        ([str(a), str(tmp_path / "x")], "not a run folder"),
    ]  # fmt: skip
    for words, text in cases:
        assert report_cli.main(words) == 2
        printed = capsys.readouterr()
        assert text in printed.err and printed.err.count("\n") == 1 and printed.out == "", words
    assert runs_page.distinct_names([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
