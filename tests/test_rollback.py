"""Going back to the checkpoint before a removal, and micro-batches that grow into the memory of removed blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from entprune_ds.engine.ds_config import batch_plan
from tests.ranks import RankFailure, run_ranks
from tests.test_training import cut_after, equal_state, losses, words
from tests.tiny import tiny_config

ONE_EACH = "prune.max_blocks_per_check=1"


@pytest.fixture(scope="module")
def pruned(digits, tmp_path_factory) -> Path:
    """A finished run: a block goes before step 0, one before step 4; checkpoints at 0, 4, 8, 12."""
    root = tmp_path_factory.mktemp("rollback")
    run_ranks("tests.workers.training:train", 2, runs=[words(digits, root, "whole", ONE_EACH)])
    return root / "whole"


def depths(run: Path) -> list[int]:
    return [len(json.loads(line)["kept_blocks"]) for line in (run / "decisions.jsonl").read_text().splitlines()]


def folders(run: Path, aside: str = "") -> list[str]:
    return sorted(p.name for p in (run / "checkpoints" / aside).glob("step_*"))


def test_a_rollback_undoes_a_removal_once_and_loses_nothing(digits, tmp_path, pruned):
    assert depths(pruned) == [3, 2]
    run = cut_after(pruned, tmp_path / "back", 12)
    command = words(digits, tmp_path, "back", "prune.rollback=step_4", ONE_EACH, "prune.target_depth=3")
    later = {name: (pruned / "checkpoints" / name / "manifest.json").read_text() for name in folders(pruned)[2:]}
    [[status], _] = run_ranks("tests.workers.training:train", 2, runs=[command])
    assert status == 0
    assert depths(run) == [3, 3]  # the second removal has not taken place
    assert folders(run) == folders(pruned) and folders(run, "superseded_1") == list(later)
    for name, manifest in later.items():
        assert (run / "checkpoints" / "superseded_1" / name / "manifest.json").read_text() == manifest
    [undone] = (run / "decisions.superseded.jsonl").read_text().splitlines()
    assert json.loads(undone)["step"] == 4 and len(json.loads(undone)["kept_blocks"]) == 2
    first, second = losses(pruned), losses(run)
    assert first.keys() == second.keys()
    assert [s for s in first if first[s] != second[s]] == list(range(5, 13))
    assert len(json.loads((run / "model" / "config.json").read_text())["kept_blocks"]) == 3

    command[command.index("prune.rollback=step_4")] = "prune.rollback=step_00000004"  # the same step
    before = (run / "metrics.jsonl").read_text()
    run_ranks("tests.workers.training:train", 2, runs=[command])  # the same command goes on: it is at the end
    assert folders(run) == folders(pruned) and not (run / "checkpoints" / "superseded_2").exists()
    assert (run / "metrics.jsonl").read_text().startswith(before)


@pytest.mark.full
def test_a_rollback_to_another_schedule_makes_the_checks_of_that_schedule(digits, tmp_path, pruned):
    run = cut_after(pruned, tmp_path / "other", 12)
    other = ["prune.start_step=4", "prune.end_step=8", "prune.num_checks=1", "prune.target_depth=1"]
    command = words(digits, tmp_path, "other", "prune.rollback=step_4", *other)
    run_ranks("tests.workers.training:train", 2, runs=[command])
    assert depths(run) == [3, 1]
    run_ranks("tests.workers.training:train", 2, runs=[words(digits, tmp_path, "other", *other)])  # without the word
    run_ranks("tests.workers.training:train", 2, runs=[command])  # it is not forgotten that this has been done
    assert folders(run) == folders(pruned) and not (run / "checkpoints" / "superseded_2").exists()


@pytest.mark.full
def test_a_rollback_with_the_same_settings_repeats_the_run_exactly(digits, tmp_path, pruned):
    run = cut_after(pruned, tmp_path / "again", 12)
    command = words(digits, tmp_path, "again", "prune.rollback=step_00000000", ONE_EACH)
    run_ranks("tests.workers.training:train", 2, runs=[command])
    assert folders(run, "superseded_1") == folders(pruned)[1:]
    assert losses(run) == losses(pruned) and depths(run) == depths(pruned)
    assert equal_state(run / "checkpoints/step_00000012", pruned / "checkpoints/step_00000012")


def test_impossible_rollbacks_are_refused_before_anything_moves(digits, tmp_path, pruned, capsys):
    from entprune_ds.cli.train import main

    run = cut_after(pruned, tmp_path / "kept", 12)
    there = folders(run)
    for value, message in (
        ("step_5", f"holds no such checkpoint. There are {', '.join(there)}; those before a removal are always kept."),
        ("400", "`prune.rollback` must name a checkpoint, such as step_400, got 400."),
    ):
        assert main(words(digits, tmp_path, "kept", f"prune.rollback={value}", ONE_EACH)) == 2
        assert message in capsys.readouterr().err
    assert main(words(digits, tmp_path, "kept", "prune.target_depth=3", ONE_EACH)) == 2  # only with a rollback
    assert "`prune.target_depth` is 3" in capsys.readouterr().err
    for more, message in (
        (["prune.rollback=step_12", ONE_EACH], "step_00000012 is the newest checkpoint, there is nothing to undo"),
        (["prune.rollback=step_8", "prune.target_depth=3", ONE_EACH], "is 3, but step_00000008 holds 2 blocks. Lower"),
        (["prune.rollback=step_4", "prune.num_checks=1"], "0 checks of at most 4 blocks stand before the end, too few"),
    ):
        assert main(words(digits, tmp_path, "kept", *more)) == 2
        assert message in capsys.readouterr().err
    [*_, file] = (run / "checkpoints/step_00000004").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    command = words(digits, tmp_path, "kept", "prune.rollback=step_4", ONE_EACH)
    with pytest.raises(RankFailure, match="step_00000004 is damaged"):
        run_ranks("tests.workers.training:train", 2, runs=[command])
    assert folders(run) == there


PLANS = [  # 16 examples a rank in micro-batches of 2, from depth 24
    (24, (2, 8)), (10, (2, 8)), (9, (4, 4)), (2, (4, 4)), (1, (8, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("depth", "plan"), PLANS)
def test_a_micro_batch_grows_as_blocks_go_and_never_needs_more_memory(depth, plan):
    config = tiny_config()
    model = replace(config.model, depth=24)
    train = replace(config.train, global_batch_size=32, micro_batch_size=2)
    config = replace(config, model=model, train=train)
    assert batch_plan(config, 2, depth) == (2, 8)
    grown = replace(config, prune=replace(config.prune, regrow_micro_batch=True))
    assert batch_plan(grown, 2, depth) == plan
    assert batch_plan(grown, 2) == (2, 8)
    lean = replace(grown, model=replace(model, activation_checkpointing=True))
    assert batch_plan(lean, 2, depth) == (2, 8)  # there the inputs of 24 blocks are less than a block's activations


def test_a_live_engine_grows_its_micro_batch():
    assert run_ranks("tests.workers.resize:grown", 2) == [[[1, 4], [2, 2], [2, 2]]] * 2


@pytest.mark.full
def test_a_run_that_grows_its_micro_batch_trains_the_same_and_resumes_exactly(digits, tmp_path):
    grow = "prune.regrow_micro_batch=true"
    deep = ["model.depth=12", "train.micro_batch_size=1"]
    runs = [words(digits, tmp_path, name, *deep, *more) for name, more in (("grown", [grow]), ("plain", []))]
    run_ranks("tests.workers.training:train", 2, runs=runs)
    grown, plain = tmp_path / "grown", tmp_path / "plain"
    assert depths(grown) == depths(plain) and depths(grown)[-1] == 2
    assert losses(grown) == pytest.approx(losses(plain), rel=1e-5)
    cut = cut_after(grown, tmp_path / "cut", 8)
    run_ranks("tests.workers.training:train", 2, runs=[words(digits, tmp_path, "cut", grow, *deep)])
    assert losses(cut) == losses(grown)
    assert equal_state(cut / "checkpoints/step_00000012", grown / "checkpoints/step_00000012")
    refused = {
        "train.micro_batch_size=null": "needs `train.micro_batch_size`",
        "parallel.pipe_stages=2": "needs parallel.pipe_stages=1",
    }
    from entprune_ds.config import ConfigError, load_config

    for word, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            load_config(words(digits, tmp_path, "x", grow, word))
