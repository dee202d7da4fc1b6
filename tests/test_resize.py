"""Live resizing loses nothing: a resized engine continues to the bit like a fresh engine given the same state."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_ranks

FULL = pytest.mark.full
MATRIX = [
    pytest.param(1, 2, "fp32", [[0, 2]]),
    pytest.param(3, 2, "fp32", [[1, 2, 3], [1, 2]]),  # twice in a row; first and last block
    *(
        pytest.param(stage, world, "fp32", [[0, 1, 2], [1, 2]], marks=FULL)
        for stage in (0, 1, 2, 3)
        for world in (1, 2)
    ),
    *(pytest.param(stage, 2, "bf16", [[0, 1, 2], [0, 1]], marks=FULL) for stage in (1, 2, 3)),
    *(pytest.param(stage, 4, "fp32", [[0, 3]], marks=FULL) for stage in (1, 3)),
]
MUTATIONS = ["swapped_moments", "forgotten_step", "shifted_block"]


@pytest.mark.parametrize(("zero_stage", "world_size", "dtype", "removals"), MATRIX)
def test_resized_engine_continues_like_a_fresh_one(tmp_path, zero_stage, world_size, dtype, removals):
    common = {"folder": str(tmp_path), "zero_stage": zero_stage, "dtype": dtype}
    live = run_ranks("tests.workers.resize:live", world_size, removals=removals, **common)
    arguments = {"kept_blocks": removals[-1], "steps": live[0]["steps"], "mutations": ["none", *MUTATIONS]}
    fresh = run_ranks("tests.workers.resize:fresh", world_size, **common, **arguments)
    expected = load_file(tmp_path / "live.safetensors")
    for rank in range(world_size):
        assert fresh[rank]["none"] == live[rank]["losses"]
        assert live[rank]["ema_kept"]
        assert live[rank]["positions"]  # zero.Init must not round them
    state = load_file(tmp_path / "fresh_none.safetensors")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    for mutation in MUTATIONS:
        assert fresh[0][mutation] != live[0]["losses"], mutation
        wrong = load_file(tmp_path / f"fresh_{mutation}.safetensors")
        assert any(not torch.equal(wrong[name], expected[name]) for name in expected), mutation
    total = sum(t.numel() for name, t in expected.items() if name.startswith("weight/"))
    if zero_stage > 0 and world_size > 1:  # sharded: no rank holds the whole state
        assert sum(live[rank]["held"] for rank in range(world_size)) == total
        assert max(live[rank]["held"] for rank in range(world_size)) < 0.75 * total


def test_impossible_resizes_are_refused_on_all_ranks_and_change_nothing():
    results = run_ranks("tests.workers.resize:refusals", 2, zero_stage=1)
    for result in results:
        assert len(result["messages"]) == 4
        assert "not a proper subset" in result["messages"][0]
        assert "differs between rank 0 and ranks [1]" in result["messages"][3]
        assert len(result["losses"]) == 2
