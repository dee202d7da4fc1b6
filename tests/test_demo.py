"""`make demo` at a tiny size: the commands of the README, from shards to report, as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = [
    "model.hidden_size=32", "model.num_heads=2", "train.num_steps=12", "train.global_batch_size=16",
    "train.warmup_steps=0", "train.validate_every=6", "train.validation_draws=32", "train.checkpoint_every=6",
    "prune.num_checks=2", "prune.max_blocks_per_check=2", "prune.end_step=8", "score.draws=64", "score.batch_size=32",
    "prune.ntk_samples=4", "prune.ntk_repeats=1", "prune.zico_batches=2", "prune.zico_batch_size=4",
    "sample.num_samples=80", "sample.num_steps=2", "sample.grid=20", "evaluate.latency_repeats=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """Folder in which the tiny demo has run."""
    folder = tmp_path_factory.mktemp("demo")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), *TINY]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (folder / "stdout").write_text(result.stdout)
    return folder


def test_the_demo_ends_with_a_summary_a_table_and_a_report(demo):
    summary = json.loads((demo / "runs/demo/summary.json").read_text())
    assert summary["base"]["depth"] == 8
    assert summary["pruned"]["depth"] == 4
    for model in (summary["base"], summary["pruned"]):
        assert {"fid", "kid", "class_accuracy", "latency_ms", "fid_validation"} <= model.keys()
    assert summary["resizes"] >= 2
    assert len(summary["resize_seconds"]) == summary["resizes"]
    assert len(summary["score_seconds"]) == 2
    assert summary["total_seconds"] == pytest.approx(sum(summary["phase_seconds"].values()))
    text = (demo / "stdout").read_text()
    assert str(demo / "runs/demo/report.html") in text.replace("\n", "")
    assert "budget" in text


def test_the_demo_writes_one_wandb_run_per_training_and_escapes_the_report(demo):
    runs = sorted((demo / "runs/demo/wandb").glob("offline-run-*"))
    identifier = (demo / "runs/demo/wandb_id.txt").read_text().strip()
    assert runs
    assert all(identifier in run.name for run in runs)
    report = (demo / "runs/demo/report.html").read_text()
    assert "<script" not in report.lower()
    assert "data:image/png;base64" in report


def test_every_decision_of_the_demo_is_a_valid_value(demo):
    from entprune_ds.pruning.decision import PruneDecision

    lines = (demo / "runs/demo/decisions.jsonl").read_text().splitlines()
    decisions = [PruneDecision.from_json(json.loads(line)) for line in lines]
    assert [len(d.kept_blocks) for d in decisions][-1] == 4
    config = json.loads((demo / "runs/demo/model/config.json").read_text())
    assert config["kept_blocks"] == list(decisions[-1].kept_blocks)


def test_a_finished_demo_is_not_run_again(demo):
    before = (demo / "runs/demo/metrics.jsonl").read_bytes()
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), *TINY]
    result = subprocess.run(command, cwd=demo, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert result.stdout.count(": done before (") == 7
    assert (demo / "runs/demo/metrics.jsonl").read_bytes() == before
