"""A disk that is full at the worst moments: nothing older is lost, the error is one, and the same command goes on."""

from __future__ import annotations

import json

import pytest

from entprune_ds import fault_points
from entprune_ds.engine.checkpoint import file_problems, step_folders
from tools.fault_rows import Bench, fill, small_disk
from tools.trials import Unavailable, assert_same_end, killed_at_the_end

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """One undisturbed run."""
    return Bench(tmp_path_factory.mktemp("disk"))


@pytest.mark.parametrize("point", ["checkpoint", "latest", "broadcast"])
def test_a_disk_that_is_full_in_the_middle_of_a_write_loses_nothing(bench, point):
    """Before the manifest of a checkpoint, before `latest`, and before the decision is written."""
    trial = bench.trial(f"full_{point}", environment={fault_points.VARIABLE: f"{point}:15:2"})
    try:
        with small_disk(trial.run.parent, 32), killed_at_the_end(trial):
            trial.output = bench.root / f"full_{point}.log"
            trial.start()
            trial.wait_for_text(f"waiting at {point} ")
            ballast, decisions = trial.run.parent / "ballast", trial.run / "decisions.jsonl"
            decided = decisions.read_text() if decisions.is_file() else ""
            before = [folder.name for folder in step_folders(trial.run / "checkpoints")]
            fill(ballast)
            assert trial.wait_end() != 0
            assert "No space left on device" in trial.text and "Free space" in trial.text
            assert "Traceback" not in trial.text
            root = trial.run / "checkpoints"
            assert (root / "latest").read_text() in before
            assert all(file_problems(folder) == [] for folder in step_folders(root) if folder.name in before)
            assert (decisions.read_text() if decisions.is_file() else "").startswith(decided)
            assert all(json.loads(line) for line in decided.splitlines())
            ballast.unlink()
            trial.environment.pop(fault_points.VARIABLE)
            trial.start()
            assert trial.wait_end() == 0, trial.text[-3000:]
            assert_same_end(trial, bench.whole)
    except Unavailable as problem:
        pytest.skip(str(problem))
