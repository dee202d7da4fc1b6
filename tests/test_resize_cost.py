"""What a resize leaves behind (nothing), and the largest tensor that any rank ever holds (a partition or a block)."""

from __future__ import annotations

import json

import pytest

from tests.ranks import ROOT, run_ranks

FULL = pytest.mark.full
SHIPPED = sorted(p.stem for p in (ROOT / "ds_configs").glob("zero*.json"))


@pytest.mark.parametrize(
    "ds_config", [pytest.param(name, marks=() if name == "zero1_fp32" else FULL) for name in SHIPPED]
)
def test_ten_resizes_in_one_process_leave_nothing_behind(ds_config):
    for ranks in run_ranks(
        "tests.workers.resize_cost:ten_resizes", 2, timeout=500, zero_stage=int(ds_config[4]), dtype=ds_config[6:]
    ):
        memory = [cycle.pop("rss") for cycle in ranks]
        assert (ranks[0]["engines"], ranks[0]["models"], ranks[0]["old_parameters"]) == (1, 1, 0)
        assert ranks == [ranks[0]] * 10
        assert memory[9] <= memory[2] * 1.01**7, memory


@pytest.mark.parametrize("zero_stage", [pytest.param(1, marks=FULL), pytest.param(2, marks=FULL), 3])
def test_no_tensor_is_larger_than_a_partition_or_a_block(tmp_path, zero_stage):
    """A bucket of gradients is a setting and is made small here. ZeRO-1/2 replicate the forward weights by definition:
    their one flat tensor is the model itself, and is what writing weights may show; scoring and saving may not."""
    buckets = {"reduce_bucket_size": 10_000, "allgather_bucket_size": 10_000}
    if zero_stage == 3:
        buckets = {"reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": zero_stage, **buckets}}))
    for result in run_ranks(
        "tests.workers.resize_cost:largest", 4, zero_stage=zero_stage, ds_config=str(path), folder=str(tmp_path / "c")
    ):
        limit = max(result["partition"], result["block"]) + 64  # padding of a partition
        assert limit < 0.4 * result["whole"]
        for what, (numel, where) in result["found"].items():
            allowed = max(limit, result["old"] + 64) if what == "resize" else limit
            if zero_stage < 3 and what in ("resize", "load"):
                allowed = result["whole"] + 64
            assert numel <= allowed, (what, numel, where, result)
