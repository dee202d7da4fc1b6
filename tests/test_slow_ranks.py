"""Slow ranks: the judgement on given numbers, and real ranks of which one is late."""

from __future__ import annotations

import json
import re

import pytest

from entprune_ds.config import ConfigError, load_config
from entprune_ds.slow_ranks import RankTime, find_slow, summary
from tests.ranks import run_ranks
from tests.test_training import equal_state, words


def test_the_rank_that_waits_for_nobody_is_named_with_its_host_and_cause():
    even = [RankTime(f"n{i}", 0.01, 0.20, 0.10) for i in range(4)]
    assert find_slow(even, 1.5) == {}
    late = [*even[:2], RankTime("n2", 0.01, 0.35, 0.0), even[3]]
    assert find_slow(late, 2.0) == {} and list(find_slow(late, 1.5)) == [2]
    said = find_slow(late, 1.5)[2]
    assert said.startswith("rank 2 on n2 is slow: 0.360 s") and "the median 0.210 s" in said and "GPU" in said
    starved = [RankTime("a", 0.5, 0.2, 0.0), RankTime("b", 0.0, 0.2, 0.5)]
    assert list(find_slow(starved, 1.5)) == [0] and "storage" in find_slow(starved, 1.5)[0]  # of two the faster counts
    assert find_slow([RankTime("a", 0.0, 0.003, 0.0), RankTime("b", 0.0, 0.0015, 0.0)], 1.5) == {}  # noise
    values = summary(late)
    assert (values["ranks/slowest"], values["ranks/slowest_ratio"]) == (2, pytest.approx(0.36 / 0.21))
    assert (values["ranks/communication_seconds"], values["ranks/communication_seconds_max"]) == (0.10, 0.10)


@pytest.mark.parametrize(
    ("where", "layout"),
    [
        ("compute", "zero1_fp32"),
        *(pytest.param(w, f"zero{s}_fp32", marks=pytest.mark.full) for w in ("data", "compute") for s in (0, 1, 2, 3)),
    ],
)
def test_a_late_rank_is_told_and_measuring_changes_nothing(digits, tmp_path, where, layout):
    few = ["prune.target_depth=null", "train.validate_every=0", "train.num_steps=4", f"parallel.ds_config={layout}"]
    plain = words(digits, tmp_path, "plain", *few, "monitor.slow_every=0")
    run_ranks("tests.workers.training:train", 2, runs=[plain])
    slow = words(digits, tmp_path, "slow", *few, "monitor.slow_every=2")
    told = run_ranks("tests.workers.slow:train_slowly", 2, words=slow, rank=1, where=where, seconds=0.15)[0]
    late = [text for text in told if "is slow" in text]
    assert len(late) == 2 and all(re.match(r"step [24]: rank 1 on \S+ is slow", text) for text in late)
    assert all(("storage" in text) == (where == "data") for text in late)
    lines = [json.loads(line) for line in (tmp_path / "slow" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in lines if "ranks/slowest" in row]
    assert [row["step"] for row in rows] == [2, 4] and {row["ranks/slowest"] for row in rows} == {1}
    for row in rows:  # 0.15 s for each of four blocks and two micro-batches, or for the batch; the other rank waits
        assert row[f"ranks/{where}_seconds_max"] > (0.15 if where == "data" else 1.2)
        assert row["ranks/communication_seconds_max"] > (0.1 if where == "data" else 0.5)
    last = "checkpoints/step_00000004"
    assert equal_state(tmp_path / "slow" / last, tmp_path / "plain" / last)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match=r"`monitor.slow_factor` must be above 1, got 1"):
        load_config(["preset=digits", "monitor.slow_factor=1"])
