"""`entprune-ds compare` as a user runs it: real workers that are killed, rows that fail, and a second call."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from entprune_ds.cli.compare_metrics import spent
from entprune_ds.config import load_config
from entprune_ds.data.builtin import write_digits
from entprune_ds.interop.safetensors import write_export
from entprune_ds.interop.source import Source
from entprune_ds.interop.tensors import parameter_shapes
from entprune_ds.monitor.files import read_json_lines
from tests.ranks import ROOT
from tests.tiny import load_model

SIZE = ["model.depth=6", "model.hidden_size=32", "model.num_heads=2"]
TINY = [
    "preset=digits", *SIZE, "target_depth=3", "train.global_batch_size=16", "train.validation_draws=32",
    "score.draws=64", "score.batch_size=32", "prune.ntk_samples=4", "prune.ntk_repeats=1", "prune.zico_batches=2",
    "prune.zico_batch_size=4", "sample.num_samples=80", "sample.num_steps=2", "evaluate.latency_repeats=3",
    "evaluate.latency_batches=[1]", "compare.recovery_steps=40", "compare.num_checks=3", "compare.phase=0.3",
    "compare.random_sets=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with digits, and a base whose every weight is random, so that outputs have a spread."""
    folder = tmp_path_factory.mktemp("compare")
    write_digits(folder / "data", shard_size=64, seed=0)
    model = load_config(["preset=digits", *SIZE]).model
    generator = torch.Generator().manual_seed(3)
    shapes = parameter_shapes(model)
    weights = {
        n: torch.randn(s, generator=generator) * (0.02 if len(s) == 1 else s[-1] ** -0.5) for n, s in shapes.items()
    }
    write_export(folder / "base", Source(model, weights.__getitem__, {"weights": "ema", "step": 0}))
    zeros = weights | {"final_layer.linear.weight": torch.zeros(shapes["final_layer.linear.weight"])}
    write_export(folder / "no_spread", Source(model, zeros.__getitem__, {"weights": "ema", "step": 0}))
    return folder


def command(place: Path, *words: str) -> list[str]:
    """The command on the tiny base."""
    data = [f"data.shards={place / 'data' / 'train'}", f"base={place / 'base'}", f"out={place / 'out'}"]
    return [sys.executable, "-m", "entprune_ds.cli.compare", *TINY, *data, *words]


def start(words: list[str]) -> subprocess.Popen:
    """The command as a process of its own group."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def worker_in(row: Path, process: subprocess.Popen) -> int:
    """The process that holds a row, once its training has written a checkpoint."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        lock = row.parents[1] / "locks" / row.name / "lock"
        if (row / "checkpoints" / "latest").is_file() and lock.is_file():
            found = re.search(r"process (\d+)", lock.read_text())
            if found:
                return int(found[1])
        time.sleep(0.02)
    raise AssertionError(f"no worker came to {row}")


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What a command has printed, when it ends with this status."""
    text, _ = process.communicate(timeout=1200)
    assert process.returncode == status, text
    return text


STUDIES = [
    "criteria=[ced,random,every_other]", "seeds=[0,1]", "study=[criteria,subsets]", "compare.subsets=3",
    "compare.long_steps=50", "compare.probe_steps=[5,10]",
]  # fmt: skip


@pytest.fixture(scope="module")
def compared(place) -> Path:
    """Folder of a comparison one of whose workers was killed (SIGKILL) in the middle of a row."""
    process = start(command(place, *STUDIES))
    os.kill(worker_in(place / "out" / "rows" / "ced-s0", process), signal.SIGKILL)
    (place / "text").write_text(finish(process))
    return place / "out"


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_the_row_of_a_killed_worker_is_taken_up_and_all_end_at_equal_compute(place, compared):
    text = (place / "text").read_text()
    assert "ced-s0 died and is taken up again" in text and "FAILED" not in text and " s left" in text
    rows = json.loads((compared / "compare.json").read_text())
    assert sorted((r["criterion"], r["seed"]) for r in rows) == [
        (c, s) for c in ("ced", "every_other", "random_1") for s in (0, 1)
    ]
    known = {(r["criterion"], r["seed"]): r for r in rows}
    plain = known["every_other", 0]["macs_budget"] / 40
    for (criterion, seed), row in known.items():
        assert len(row["kept_blocks"]) == 3 and row["latency_ms"] > 0 and row["equal_steps"]["steps"] == 40
        metrics = read_json_lines(compared / "rows" / f"{criterion}-s{seed}" / "metrics.jsonl").rows
        assert (row["macs_training"], row["macs_scoring"]) == spent(metrics, row["steps"])
        assert row["macs_training"] == row["steps"] * plain  # counted in the run, and computed for the budget
        assert abs(row["macs"] - 40 * plain) <= plain / 2
    assert known["ced", 0]["steps"] < known["random_1", 0]["steps"] == 40
    assert known["random_1", 0]["kept_blocks"] == known["random_1", 1]["kept_blocks"]
    memory = [json.loads(p.read_text())["worker_mib"] for p in (compared / "results").glob("*-s?.json")]
    assert len(memory) == 9 and max(memory) - min(memory) < 100  # rows of a worker leave nothing behind
    assert not list(compared.glob("rows/*/checkpoints")) and not list(compared.glob("locks/*/lock"))


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_comparison_leaves_tables_and_figures(compared):
    markdown = (compared / "compare.md").read_text()
    for title in ("equal total compute", "at 40 optimizer steps", "Memorisation", "predicts the FID"):
        assert title in markdown, title
    singles = [f"sum of single {name}" for name in ("ced", "taylor", "magnitude_l2", "gradient_flow")]
    for score in (*singles, "ced of the whole set", "taylor, spread", "unevenness", "validation loss after 5 steps"):
        assert f"| {score} | 6 |" in markdown, score  # three random sets and those of three criteria
    assert {p.name for p in compared.glob("*.png")} == {"criteria_fid.png", "damage_fid.png", "subsets.png"}
    assert (compared / "compare.tex").read_text().count(r"\\") == 4


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_second_call_trains_nothing_and_refuses_other_settings(place, compared):
    rows = (compared / "compare.json").read_text()
    before = {p: p.stat().st_mtime_ns for p in (compared / "results").glob("*.json")}
    assert f"{len(before) - 1} done" in finish(start(command(place, *STUDIES)))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (compared / "compare.json").read_text() == rows
    text = finish(start(command(place, *STUDIES, "train.learning_rate=1e-3")), status=2)
    assert "was made with other settings" in text


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_row_is_what_the_ordinary_command_trains_with_its_settings(place, compared):
    rows = json.loads((compared / "compare.json").read_text())
    step = next(r["steps"] for r in rows if (r["criterion"], r["seed"]) == ("ced", 0))  # killed and resumed
    words = [f"preset={compared / 'rows' / 'ced-s0' / 'config.yaml'}", f"run.root={place / 'plain'}",
             f"train.stop_step={step}", "train.num_steps=40", "train.validate_every=7"]  # fmt: skip
    finish(start([sys.executable, "-m", "entprune_ds.cli.train", *words]))
    ours, _ = load_model(compared / "rows" / "ced-s0" / f"model_{step}")
    theirs, facts = load_model(place / "plain" / "ced-s0" / "model")
    assert facts["step"] == step
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_every_other_study_runs_over_the_trainer(place):
    words = [w for w in command(place, "criteria=[ced,every_other]", "seeds=[0]") if not w.startswith("out=")]
    words += [f"out={place / 'studies'}", "study=[criteria,schedule,estimators,distill,sampling,depth,bases]",
              "compare.bases=[9]", "compare.base_steps=30",
              "compare.estimators=[per_element,scalar]", "compare.recoveries=[none,output]", "compare.depths=[4]",
              "compare.sampling_steps=[2,3]", "compare.equal_compute=false"]  # fmt: skip
    finish(start(words))
    studies = json.loads((place / "studies" / "compare_studies.json").read_text())["studies"]
    names = {study: {row["criterion"] for row in rows} for study, rows in studies.items()}
    assert names["estimators"] == {"per_element", "scalar"} and names["distill"] == {"none", "output"}
    assert names["schedule"] == {"one_shot", "gradient flow, one_shot", "gradient flow, soft"} | {
        f"progressive, {kind}" for kind in ("fixed", "vote_ntk", "vote_zico", "vote_ntk_zico", "vote_time")
    }
    by_name = {row["criterion"]: row for rows in studies.values() for row in rows}
    assert by_name["output"]["macs_training"] > 1.3 * by_name["none"]["macs_training"]  # the teacher's passes count
    assert len(by_name["depth 4"]["kept_blocks"]) == 4 and len(by_name["gradient flow, soft"]["kept_blocks"]) <= 3
    assert by_name["progressive, fixed"]["depths"] == [5, 4, 3] and by_name["one_shot"]["depths"] == [3]
    assert [(r["criterion"], r["seed"]) for r in studies["bases"]] == [
        (criterion, seed) for criterion in ("ced", "every_other") for seed in (0, 9)
    ]
    assert (place / "studies" / "base_9" / "model" / "config.json").is_file()
    markdown = (place / "studies" / "compare.md").read_text()
    for title in (
        "One-shot, fixed",
        "Entropy estimators",
        "With and without a teacher",
        "Sampler steps",
        "Other depths",
        "Other bases",
    ):
        assert f"## {title}" in markdown, title


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_row_that_fails_is_told_at_the_end_and_the_others_go_on(place):
    words = [
        w for w in command(place, "criteria=[ced,every_other]", "seeds=[0]") if not w.startswith(("base=", "out="))
    ]
    words += [f"base={place / 'no_spread'}", f"out={place / 'failing'}", "workers=1"]
    text = finish(start(words), status=1)
    rows = json.loads((place / "failing" / "compare.json").read_text())
    assert [row["criterion"] for row in rows] == ["every_other"]
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: row ced-s0 failed: ended with status 2") and "have no spread" in last
    log = Path(last.rpartition("Log: ")[2])
    assert "no spread over the draws" in log.read_text()


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_an_interrupted_comparison_leaves_no_worker_and_goes_on(place):
    words = [w for w in command(place, "criteria=[every_other]", "seeds=[0]") if not w.startswith("out=")]
    words += [f"out={place / 'stopped'}", "workers=2"]
    process = start(words)
    victim = worker_in(place / "stopped" / "rows" / "every_other-s0", process)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in finish(process, status=128 + signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)
    finish(start(words))
    assert len(json.loads((place / "stopped" / "compare.json").read_text())) == 1


@pytest.mark.full
def test_the_depth_of_a_speedup_is_the_deepest_that_was_measured_to_reach_it():
    words = ["--width", "64", "--heads", "2", "--depth", "12", "--depths", "9", "3", "1", "--repeats", "5", "--json"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_depth.py"), *words, "--goal", "2"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    figures = json.loads(result.stdout)
    assert figures["speedups"]["12"] == 1 and figures["speedups"]["3"] > figures["speedups"]["9"]
    reached = max(int(d) for d, ratio in figures["speedups"].items() if ratio >= 2)
    assert (figures["depth"], figures["share"], figures["digits_depth"]) == (reached, reached / 12, reached)
    assert result.returncode == 0 and set(figures["milliseconds"]) == {"12", "9", "3", "1"}
