"""A rank that stands still: stacks in the run folder, one message, an end; and no wall clock anywhere in it."""

from __future__ import annotations

import re

import pytest

from entprune_ds import fault_points
from tests.ranks import RankFailure, run_ranks
from tests.reference.imports import sources
from tests.test_training import words


@pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=pytest.mark.full)])
def test_a_rank_that_stands_still_leaves_its_stacks_in_the_run_folder(digits, tmp_path, monkeypatch, world_size):
    """Every rank waits ten minutes in the middle of its second checkpoint, and its clock of progress leaps."""
    monkeypatch.setenv(fault_points.VARIABLE, "checkpoint:600:2")
    arguments = words(digits, tmp_path, "still", "prune.target_depth=null", "train.validate_every=0")
    with pytest.raises(RankFailure) as end:
        run_ranks("tests.workers.clocks:stall", world_size, words=arguments)
    said, stacks = str(end.value), tmp_path / "still" / "stacks"
    for rank in range(world_size):
        path = stacks / f"rank_{rank:05d}.txt"
        assert f"rank {rank} on " in said and "(exit 75) ---" in said and f"Stacks of all threads: {path}." in said
        frames = path.read_text()
        assert re.search(r"fault_points.py\", line \d+ in reach", frames) and "in save_checkpoint" in frames
        assert frames.count("hread 0x") >= 2  # the watchdog's own too
    assert "made no progress for 300 s (run.timeout_seconds)" in said
    assert said.count("step_00000004; the same command resumes from it") == world_size


def test_only_time_stamps_read_the_wall_clock():
    users = {m for m, path in sources().items() if re.search(r"time\.time\(|datetime\.now|utcnow", path.read_text())}
    assert users == {"bad_steps", "monitor.metrics"}
