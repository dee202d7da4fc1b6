"""Bad steps: left out on all ranks together, then a roll-back, then a stop with a report; nothing else changes."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from entprune_ds.config import ConfigError, load_config
from entprune_ds.data.origin import batch_origin
from entprune_ds.data.stream import Stream, read_shard
from entprune_ds.engine.ds_config import read_ds_config
from entprune_ds.fault_points import VARIABLE
from entprune_ds.loss_guard import SETTLING, LossGuard
from tests.ranks import RankFailure, run_ranks
from tests.test_faults import finish, launch, rank_pids
from tests.test_training import equal_state, losses, named_state, words
from tools.poison import poison

FULL = pytest.mark.full
TRAIN = "tests.workers.training:train"
PLAIN = ["prune.target_depth=null", "train.validate_every=0", "sample.grid=1", "sample.num_steps=1"]


def manifest(run: Path, step: int) -> dict:
    """What a checkpoint says of itself."""
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())


def bad_rows(run: Path) -> list[dict]:
    """The bad steps of a run."""
    return [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]


def poisoned(digits: str, root: Path, steps: list[int]) -> tuple[str, dict[int, str]]:
    """A folder of digits that are bad at some steps of a tiny run, and the bad examples."""
    bad = poison(load_config(words(digits, root, "x", *PLAIN)), root / "data" / "train", steps)
    return str(root / "data"), bad


LAYOUTS = [
    pytest.param("zero0_fp32", 2, 1),  # here DeepSpeed leaves nothing out by itself
    *(pytest.param(f"zero{stage}_fp32", 2, 1, marks=FULL) for stage in (1, 2, 3)),
    *(pytest.param(f"zero{stage}_bf16", 2, 1, marks=FULL) for stage in (0, 1, 2, 3)),
    *(pytest.param(name, 2, 2, marks=FULL) for name in ("zero0_fp32", "zero1_fp32", "zero0_bf16", "zero1_bf16")),
    pytest.param("zero1_fp32", 4, 2, marks=FULL),
]


@pytest.mark.parametrize(("layout", "world_size", "stages"), LAYOUTS)
def test_a_bad_step_changes_nothing_but_the_place_in_the_data(digits, tmp_path, layout, world_size, stages):
    data, bad = poisoned(digits, tmp_path, [3, 5])
    more = [*PLAIN, "train.num_steps=6", "train.checkpoint_every=1", f"parallel.ds_config={layout}"]
    run_ranks(TRAIN, world_size, runs=[words(data, tmp_path, "run", *more, f"parallel.pipe_stages={stages}")])
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    rows = bad_rows(run)
    assert [row["step"] for row in rows] == [3, 5]
    for row in rows:
        assert bad[row["step"]] in row["keys"] and row["shards"]
        assert len(row["ranks"]) == stages and len(row["keys"]) == 16 * stages // world_size
        assert equal_state(folder / f"step_{row['step'] - 1:08d}", folder / f"step_{row['step']:08d}")
        before, after = manifest(run, row["step"] - 1), manifest(run, row["step"])
        assert (after["adam_step"], after["ema_count"]) == (before["adam_step"], before["ema_count"])
        assert after["record"]["stream"]["batches"] == row["step"]
    assert not equal_state(folder / "step_00000005", folder / "step_00000006")
    assert manifest(run, 6)["adam_step"] == manifest(run, 6)["ema_count"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in named_state(folder / "step_00000006").values())


@pytest.mark.parametrize(("layout", "world_size", "stages"), LAYOUTS)
def test_the_guard_changes_nothing_while_all_is_well(digits, tmp_path, layout, world_size, stages):
    more = ["train.num_steps=4", "prune.target_depth=null", f"parallel.ds_config={layout}"]
    more += [f"parallel.pipe_stages={stages}"]
    runs = [words(digits, tmp_path, f"guard_{k}", *more, f"train.bad_steps={k}") for k in (0, 2)]
    run_ranks(TRAIN, world_size, runs=runs)
    without, guarded = tmp_path / "guard_0", tmp_path / "guard_2"
    assert equal_state(guarded / "checkpoints/step_00000004", without / "checkpoints/step_00000004")
    assert losses(guarded) == losses(without)
    assert (manifest(guarded, 4)["record"]["guard"]["count"], manifest(without, 4)["record"]["guard"]["count"]) == (
        4,
        0,
    )


ROLLING = [*PLAIN, "train.num_steps=12", "train.checkpoint_every=4", "train.bad_steps=3"]


def test_several_bad_steps_go_back_with_the_next_data_and_a_resume_in_between_changes_nothing(digits, tmp_path):
    """Bad batches 6 to 9: steps 6, 7, 8 are bad, back to 4; batch 9 is step 5, bad too; then 10, 11, ..."""
    data, _ = poisoned(digits, tmp_path, [6, 7, 8, 9])
    stopped = words(data, tmp_path, "resumed", *ROLLING)
    run_ranks(
        TRAIN, 2, runs=[words(data, tmp_path, "whole", *ROLLING), [*stopped, "train.stop_step=7"], stopped]
    )  # the second one stops in the middle of the bad stretch
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert [row["step"] for row in bad_rows(whole)] == [6, 7, 8, 5]
    last = manifest(whole, 12)
    assert last["record"]["stream"]["batches"] == 16 and last["adam_step"] == 4 + 7
    assert {k: last["record"]["guard"][k] for k in ("skipped", "rollbacks", "in_a_row")} == {
        "skipped": 4, "rollbacks": 1, "in_a_row": 0,
    }  # fmt: skip
    assert equal_state(whole / "checkpoints/step_00000012", resumed / "checkpoints/step_00000012")
    assert manifest(resumed, 12)["record"]["guard"] == last["record"]["guard"]
    assert sorted(losses(whole)) == list(range(1, 13)) and losses(whole)[5] is None
    assert losses(resumed) == losses(whole)
    assert (resumed / "checkpoints" / "superseded_1" / "step_00000007").is_dir()


@FULL
def test_going_back_over_a_removal_takes_the_removed_blocks_back(digits, tmp_path):
    """Bad are the three batches after the removal: the run goes back to before it, and decides the same again."""
    checked = ["train.validate_every=0", "sample.grid=1", "sample.num_steps=1", "train.bad_steps=3"]
    checked += ["prune.num_checks=1", "prune.target_depth=3"]
    run_ranks(TRAIN, 2, runs=[words(digits, tmp_path, "clean", *checked)])
    decided = [json.loads(line) for line in (tmp_path / "clean" / "decisions.jsonl").read_text().splitlines()]
    first = decided[0]["step"]
    assert decided[0]["dropped"] and len(decided) == 1
    data, _ = poisoned(digits, tmp_path, [first + 1, first + 2, first + 3])
    resumed = words(data, tmp_path, "resumed", *checked)
    stop = [*resumed, f"train.stop_step={first + 2}"]
    run_ranks(TRAIN, 2, runs=[words(data, tmp_path, "whole", *checked), stop, resumed])
    whole = tmp_path / "whole"
    again = [json.loads(line) for line in (whole / "decisions.jsonl").read_text().splitlines()]
    assert again == decided and manifest(whole, 12)["kept_blocks"] == decided[0]["kept_blocks"]
    assert [row["step"] for row in bad_rows(whole)] == [first + 1, first + 2, first + 3]
    assert manifest(whole, 12)["record"]["stream"]["batches"] == 15
    assert equal_state(whole / "checkpoints/step_00000012", tmp_path / "resumed" / "checkpoints/step_00000012")


@FULL
def test_a_leap_of_the_loss_is_left_out(digits, tmp_path):
    """Twenty times too large latents at step 56, when the running mean is settled; the next step counts again."""
    config = load_config(words(digits, tmp_path, "x", *PLAIN))
    bad = poison(config, tmp_path / "data" / "train", [56], value=40.0)
    run_ranks(TRAIN, 2, runs=[words(str(tmp_path / "data"), tmp_path, "run", *PLAIN, "train.num_steps=58")])
    [row] = bad_rows(tmp_path / "run")
    assert row["step"] == 56 and "train.spike_deviations" in row["reason"]
    assert bad[56] in row["keys"] and len(row["ranks"]) == 1 and len(row["keys"]) == 8
    assert manifest(tmp_path / "run", 58)["adam_step"] == 57


def test_it_stops_with_a_report_after_the_last_roll_back(digits, tmp_path):
    data, bad = poisoned(digits, tmp_path, list(range(6, 12)))
    with pytest.raises(RankFailure) as stop:
        run_ranks(TRAIN, 2, runs=[words(data, tmp_path, "run", *ROLLING, "train.max_rollbacks=1", "train.bad_steps=2")])
    said = str(stop.value)
    assert "the run has gone back 1 times already (train.max_rollbacks)" in said and "exit 2" in said
    assert (
        "step 6: the loss is" in said
        and "shards shard-" in said
        and bad[9] in (tmp_path / "run/bad_steps.jsonl").read_text()
    )
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000004"


@FULL
def test_a_request_to_stop_is_heard_right_after_a_roll_back(digits, tmp_path, monkeypatch):
    """Not only where the steps are reached again that were left behind."""
    data, _ = poisoned(digits, tmp_path, [190, 191])
    more = ["train.num_steps=400", "train.checkpoint_every=100", "train.bad_steps=2"]
    given, log = words(data, tmp_path, "run", *PLAIN, *more), tmp_path / "log"
    monkeypatch.setenv(VARIABLE, "rollback:5")
    process = launch(given, log)
    while log.read_text().count("waiting at rollback") < 2:
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    os.kill(rank_pids(log)[1], signal.SIGUSR1)
    finish(process, seconds=120)
    assert "went back to step 100" in log.read_text() and "stopped before step 101" in log.read_text()


@FULL
def test_a_run_goes_on_when_the_guard_is_taken_away_after_bad_steps(digits, tmp_path):
    data, _ = poisoned(digits, tmp_path, [3, 4])
    given = words(data, tmp_path, "run", *PLAIN, "train.num_steps=6")
    run_ranks(TRAIN, 2, runs=[[*given, "train.bad_steps=3", "train.stop_step=4"], [*given, "train.bad_steps=0"]])
    assert manifest(tmp_path / "run", 6)["adam_step"] == 4 and len(bad_rows(tmp_path / "run")) == 2


def test_the_guard_tells_a_leap_from_noise_and_forgets_the_old_model():
    guard = LossGuard(deviations=6.0)
    noise = [1 + 0.1 * math.sin(7 * i) for i in range(SETTLING + 200)]
    assert all(guard.allows(value, True) for value in noise)
    assert not guard.allows(2.0, True) and "train.spike_deviations" in guard.reason
    kept = guard.mean, guard.variance, guard.count
    assert not guard.allows(math.nan, True) and not guard.allows(1.0, False) and not guard.allows(math.inf, True)
    assert (guard.mean, guard.variance, guard.count) == kept and (guard.in_a_row, guard.skipped) == (4, 4)
    again = LossGuard.from_json(6.0, json.loads(json.dumps(guard.to_json())))
    assert again.allows(1.0, True) and guard.allows(1.0, True) and again == guard and guard.in_a_row == 0
    guard.settle_again()
    assert guard.allows(2.0, True)  # the loss of a smaller model
    assert LossGuard(deviations=0).allows(1e30, True)


def test_keys_and_shards_of_a_batch_are_those_that_were_read(digits):
    stream = Stream(f"{digits}/train", seed=3, num_readers=4, shuffle_buffer=100, global_batch_size=16)
    shards = {shard.name: shard for shard in stream.index.shards}
    for _ in range(99):  # into the second epoch
        batch = stream.next_batch()
    origin = batch_origin(stream)
    where = {key: (name, label) for name, s in shards.items() for key, _, label in read_shard(stream.index, s)}
    assert [where[key][1] for key in origin.keys] == batch.labels.tolist()
    assert {where[key][0] for key in origin.keys} <= set(origin.shards) and len(origin.shards) < len(shards)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`train.max_rollbacks` must be at least 0, got -1"):
        load_config(["preset=digits", "train.max_rollbacks=-1"])
    path = tmp_path / "ds.json"
    offload = {"device": "cpu", "ratio": 0.5}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": offload}}))
    with pytest.raises(ValueError, match="nor left out of a bad step"):
        read_ds_config(load_config(["preset=digits", f"parallel.ds_config={path}"]))


def test_checkpoints_within_bad_steps_do_not_push_out_the_one_before(digits, tmp_path):
    """With one checkpoint to keep, those of steps 6 and 7 are newer than the one to go back to."""
    data, _ = poisoned(digits, tmp_path, [6, 7, 8])
    more = [*PLAIN, "train.num_steps=12", "train.checkpoint_every=1", "train.bad_steps=3", "train.keep_checkpoints=1"]
    run_ranks(TRAIN, 1, runs=[words(data, tmp_path, "run", *more)])
    last = manifest(tmp_path / "run", 12)
    assert last["record"]["guard"]["rollbacks"] == 1 and last["record"]["stream"]["batches"] == 8 + (12 - 5)


@FULL
def test_a_run_whose_last_steps_counted_is_handed_over_whatever_was_left_out_before(digits, tmp_path):
    data, _ = poisoned(digits, tmp_path, [2, 3, 4, 5, 6, 7])
    more = ["train.num_steps=4", "train.checkpoint_every=1", "train.bad_steps=3", "train.max_rollbacks=5"]
    run_ranks(TRAIN, 1, runs=[words(data, tmp_path, "run", *PLAIN, *more)])
    assert manifest(tmp_path / "run", 4)["record"]["guard"]["skipped"] == 6 and (tmp_path / "run" / "model").exists()


@FULL
def test_bad_steps_do_not_wait_for_others_while_nobody_counts(digits, tmp_path):
    """Two bad steps, then the guard is off for two good ones: the next bad step is the first in a row."""
    data, _ = poisoned(digits, tmp_path, [3, 4, 7])
    given = words(data, tmp_path, "run", *PLAIN, "train.num_steps=8", "train.checkpoint_every=1")
    stretches = [["train.bad_steps=3", "train.stop_step=4"], ["train.bad_steps=0", "train.stop_step=6"]]
    run_ranks(TRAIN, 1, runs=[[*given, *stretch] for stretch in [*stretches, ["train.bad_steps=3"]]])
    guard = manifest(tmp_path / "run", 8)["record"]["guard"]
    assert (guard["rollbacks"], guard["skipped"]) == (0, 3)


def test_a_run_of_which_no_step_counts_hands_nothing_over(digits, tmp_path):
    data, _ = poisoned(digits, tmp_path, [1, 2])
    with pytest.raises(RankFailure, match=r"none of the 2 steps counted: the loss is nan\. Nothing is handed over"):
        run_ranks(TRAIN, 1, runs=[words(data, tmp_path, "run", *PLAIN, "train.num_steps=2")])
    assert not (tmp_path / "run" / "model").exists()
