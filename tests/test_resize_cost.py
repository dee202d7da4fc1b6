"""What a resize leaves behind (nothing), what it holds and sends, and the largest tensor that any rank ever makes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.ranks import ROOT, run_ranks

FULL = pytest.mark.full
SHIPPED = sorted(p.stem for p in (ROOT / "ds_configs").glob("zero*.json"))
TOPOLOGIES = [(3, 1), *(pytest.param(*t, marks=FULL) for t in ((1, 1), (2, 1), (1, 2)))]
"""(ZeRO stage, pipeline stages) on four ranks."""


@pytest.mark.parametrize(
    "ds_config", [pytest.param(name, marks=() if name == "zero1_fp32" else FULL) for name in SHIPPED]
)
@pytest.mark.full
def test_ten_resizes_in_one_process_leave_nothing_behind(ds_config):
    """Every resize removes a block, and tensors shrink by its state at least."""
    for ranks in run_ranks(
        "tests.workers.resize_cost:ten_resizes", 2, timeout=500, zero_stage=int(ds_config[4]), dtype=ds_config[6:]
    ):
        memory, tensors, parameters = ([c.pop(what) for c in ranks] for what in ("rss", "tensors", "parameters"))
        assert (ranks[0]["engines"], ranks[0]["models"], ranks[0]["old_parameters"]) == (1, 1, 0)
        assert ranks == [ranks[0]] * 10
        assert memory[9] <= memory[2] * 1.01**7, memory
        state_of_block = 16 * (parameters[0] - parameters[1]) // 2
        assert all(before - after >= state_of_block for before, after in pairwise(tensors)), tensors


def written(folder: Path, zero_stage: int, **more: object) -> str:
    """A DeepSpeed configuration with small buckets of gradients: what they hold is a setting, and not asked for."""
    buckets = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    if zero_stage == 3:
        buckets = {"reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    path = folder / f"zero{zero_stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": zero_stage, **buckets}, **more}))
    return str(path)


@pytest.mark.parametrize(("zero_stage", "pipe_stages"), TOPOLOGIES)
@pytest.mark.full
def test_no_tensor_is_larger_than_a_partition_or_a_block(tmp_path, zero_stage, pipe_stages):
    """Scoring and saving make none above a block, activations included: there are few examples of few tokens.

    ZeRO-1/2 replicate the forward weights by definition, in one flat tensor that DeepSpeed makes with the engine.
    """
    arguments = {"ds_config": written(tmp_path, zero_stage), "folder": str(tmp_path / "c")}
    for result in run_ranks(
        "tests.workers.resize_cost:largest", 4, zero_stage=zero_stage, pipe_stages=pipe_stages, **arguments
    ):
        block, padding = result["block"], 64
        partition = max(result["partition"], block)
        assert 2 * max(partition, result["old"]) < result["whole"] and result["dropped"] == 1
        limits = {"resize": partition, "build": partition, "load": partition, "score": block, "save": block}
        assert limits.keys() == result["made"].keys()
        for part, made in result["made"].items():
            over = [numel for numel, _ in made if numel > limits[part] + padding]
            if part == "build" and zero_stage < 3:
                assert len(over) == 1 and over[0] <= result["replica"] + padding, (made, result)
            else:
                assert not over, (part, made, result)


@FULL
@pytest.mark.parametrize(("zero_stage", "pipe_stages"), [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_no_rank_holds_more_state_than_before_and_after_and_a_block(tmp_path, zero_stage, pipe_stages):
    """The old partition and copies of what stays; then what is parked, the new partition and parameters in flight.

    DeepSpeed's views of the moments keep them at ZeRO-1/2 until the engine is gone; at ZeRO-3 the copies add a quarter.
    """
    ds_config = written(tmp_path, zero_stage, bf16={"enabled": True})
    for result in run_ranks(
        "tests.workers.resize_cost:state_alive", 4, zero_stage=zero_stage, pipe_stages=pipe_stages, ds_config=ds_config
    ):
        old, parked, new, block = (4 * result[size] for size in ("old", "parked", "new", "block"))
        peaks, padding = result["peaks"], 256
        assert result["counted"] == pytest.approx(old, abs=padding)
        assert old < peaks["resize"] <= old + (0.25 if zero_stage == 3 else 0.75) * parked + block / 4 + padding, result
        assert parked + new / 4 <= peaks["build"] <= parked + new / 2 + padding, result  # weights and EMA
        assert parked + new <= peaks["fill"] <= parked + new + block + padding, result


REPLICATED = {
    2: [(0, 1, "zero0_fp32"), (0, 1, "zero0_bf16"), (1, 1, "zero1_fp32"), (2, 1, "zero2_fp32")],
    4: [
        *[(0, 1, "zero0_fp32"), (1, 1, "zero1_bf16"), (2, 1, "zero2_bf16")],
        *[(0, 2, "zero0_fp32"), (0, 2, "zero0_bf16"), (1, 2, "zero1_fp32")],
    ],
}
"""(ZeRO stage, pipeline stages, DeepSpeed configuration) by number of ranks."""


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=FULL)])
def test_what_deepspeed_replicates_in_a_resize_is_what_the_report_says(world_size):
    replicates_as_reported(REPLICATED[world_size], world_size)


@FULL
def test_what_deepspeed_replicates_at_zero_3_is_what_the_report_says(tmp_path):
    """With parameters below the threshold and without, which DeepSpeed gathers once more when weights are written."""
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    replicates_as_reported([(3, 1, str(path)), (3, 1, "zero3_bf16")], 2)


def replicates_as_reported(cases: list[tuple[int, int, str]], world_size: int) -> None:
    """Compare what all ranks have received with what each reports; flat buffers are padded."""
    ranks = run_ranks("tests.workers.resize_cost:replicated", world_size, cases=cases)
    for case, *of_ranks in zip(cases, *ranks, strict=True):
        [reported] = {reported for reported, _ in of_ranks}
        assert reported > 0
        assert sum(received for _, received in of_ranks) == pytest.approx(reported, rel=2e-3), case
