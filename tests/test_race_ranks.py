"""Recovery races on real ranks: the run goes on to the bit, both executors agree, and no rank holds a whole model."""

from __future__ import annotations

import json

import pytest

from tests.ranks import run_ranks
from tests.test_training import losses, words

FULL = pytest.mark.full
TOPOLOGIES = [
    pytest.param(2, 1, "fp32", 1),
    *(pytest.param(2, stage, "fp32", 1, marks=FULL) for stage in (0, 2, 3)),
    *(pytest.param(2, stage, "bf16", 1, marks=FULL) for stage in (0, 1, 3)),
    pytest.param(2, 1, "fp32", 2),
    pytest.param(4, 1, "fp32", 2, marks=FULL),
    pytest.param(1, 0, "fp32", 1, marks=FULL),
]
"""(ranks, ZeRO stage, precision, pipeline stages)"""


@pytest.mark.parametrize(("world_size", "zero_stage", "dtype", "stages"), TOPOLOGIES)
def test_a_run_goes_on_to_the_bit_after_a_race_and_both_executors_agree(digits, world_size, zero_stage, dtype, stages):
    ways = ["none", "false"] + ["true"] * (stages == 1)
    ranks = run_ranks(
        "tests.workers.race:inert", world_size, shards=f"{digits}/train", zero_stage=zero_stage, dtype=dtype,
        stages=stages, ways=ways,
    )  # fmt: skip
    records = [found["record"] for found in ranks[0][1:]]
    for found in ranks:
        assert all(f["same"] and f["count"] == 6 for f in found)
        assert [f["record"] for f in found[1:]] == records
    assert [r["executor"] for r in records] == ["sharded", "replicas"][: len(records)]
    for record, found in zip(records, ranks[0][1:], strict=True):
        assert [(r["steps"], len(r["losses"])) for r in record["rounds"]] == [(2, 3), (4, 2)]
        last = [b for b, place in sorted(found["scores"].items(), key=lambda item: item[1])][-2:]
        assert sorted(map(int, last)) == record["winner"]
        assert 0 < record["share_of_run"] <= 0.5
    if len(records) == 2:
        near = 1e-4 if dtype == "fp32" else 3e-2
        found = [[c["loss"] for r in record["rounds"] for c in r["losses"]] for record in records]
        assert found[0] == pytest.approx(found[1], rel=near)
        assert dtype == "bf16" or records[0]["winner"] == records[1]["winner"]


@FULL
def test_no_rank_holds_a_whole_model_in_sharded_trials(digits, tmp_path):
    small = {"stage": 3, "reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": small}))
    for found in run_ranks("tests.workers.race:held", 2, shards=f"{digits}/train", ds_config=str(path)):
        assert 2 * found["block"] < found["partition"] <= 0.51 * found["whole"]
        largest = [made for part in found["made"].values() for made in part]
        assert largest[0][0] <= found["partition"] + 64, largest
        assert 16 * found["partition"] <= found["peak"] < 0.8 * 16 * found["whole"]


@FULL
def test_candidates_that_do_not_fit_on_one_rank_are_trained_by_all_together(digits):
    for found in run_ranks("tests.workers.race:no_room", 2, shards=f"{digits}/train"):
        assert (found["1000000000000"], found["1000"]) == (True, False)
        assert "`race.replicas=true`, but whole candidates do not fit into the free memory" in found["said"]
        assert "Set it to auto or false" in found["said"]


@pytest.mark.parametrize("replicas", ["true", pytest.param("false", marks=FULL)])
def test_a_race_without_a_finite_loss_is_one_error_of_all_ranks(digits, replicas):
    for message in run_ranks("tests.workers.race:hopeless", 2, shards=f"{digits}/train", replicas=replicas):
        assert "check 0, recovery race: no loss is finite after 2 recovery steps of 3 keep-sets" in message
        assert "Nothing was removed. Lower race.learning_rate" in message


RACE = [
    "prune.criterion=recovery_race", "race.budget=1", "race.candidates=3", "race.first_steps=1",
    "race.validation_draws=16",
]  # fmt: skip


def test_a_run_that_races_keeps_the_winner_and_one_that_only_scores_is_inert(digits, tmp_path):
    one_shot = ["prune.num_checks=1", "prune.start_step=2"]
    runs = [
        words(digits, tmp_path, "raced", *RACE, *one_shot, "score.sweep=needed", "race.origins=[taylor,random]"),
        words(digits, tmp_path, "scored", *RACE, "prune.score_only=true", "parallel.ds_config=zero3_fp32",
              "race.replicas=false"),
        words(digits, tmp_path, "plain", "prune.target_depth=null", "parallel.ds_config=zero3_fp32"),
        words(digits, tmp_path, "progressive", *RACE, "race.replicas=false", "prune.protected_blocks=[-1]"),
    ]  # fmt: skip
    assert run_ranks("tests.workers.training:train", 2, runs=runs) == [[0] * 4] * 2
    decisions = {
        name: [json.loads(line) for line in (tmp_path / name / "decisions.jsonl").read_text().splitlines()]
        for name in ("raced", "scored", "progressive")
    }
    [raced] = decisions["raced"]
    assert raced["kept_blocks"] == raced["race"]["winner"] and len(raced["kept_blocks"]) == 2
    assert raced["race"]["executor"] == "replicas"
    assert list(raced["scores"]) == ["taylor", "recovery_race"]  # nothing asked for the sweep
    assert raced["race"]["candidates"][0]["origin"] == "taylor"
    assert losses(tmp_path / "scored") == losses(tmp_path / "plain")
    first, second = decisions["progressive"]
    assert set(first["race"]["winner"]) <= set(first["kept_blocks"]) and len(second["kept_blocks"]) == 2
    assert second["kept_blocks"] == (second["race"] or first["race"])["winner"]
    assert all(3 in c["kept_blocks"] for c in first["race"]["candidates"]) and 3 in second["kept_blocks"]
    metrics = [json.loads(line) for line in (tmp_path / "raced" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if row.get("prune/race_seconds", 0) > 0] == [2]
