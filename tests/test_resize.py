"""Live resizing loses nothing: a resized engine continues to the bit like a fresh engine given the same state."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import ROOT, run_ranks

FULL = pytest.mark.full
SCENARIOS = {
    "twice": [[0, 1, 3], [0, 3]],
    "first": [[1, 2, 3]],
    "last": [[0, 1, 2]],
    "interior": [[0, 2, 3]],
    "several": [[1, 3]],
}
MUTATIONS = ["swapped_moments", "forgotten_step", "shifted_block", "stale_ema"]
SHIPPED = sorted(p.stem for p in (ROOT / "ds_configs").glob("zero*.json"))
MATRIX = [  # the quick rows run one scenario of what a full row runs whole
    pytest.param("zero3_fp32", 2, "twice"),
    *(
        pytest.param(name, world, "all", marks=FULL)
        for name in SHIPPED
        for world in (1, 2, *((4,) if name in ("zero1_fp32", "zero3_fp32") else ()))
    ),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Losses and final weights of one unsharded process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("reference")
    return run_ranks("tests.workers.resize:reference", 1, folder=str(folder), scenarios=SCENARIOS)[0], folder


@pytest.mark.parametrize(("ds_config", "world_size", "which"), MATRIX)
def test_resized_engine_continues_like_a_fresh_one(tmp_path, reference, ds_config, world_size, which):
    zero_stage, dtype = int(ds_config[4]), ds_config[6:]
    scenarios = {name: removals for name, removals in SCENARIOS.items() if which in (name, "all")}
    common = {"folder": str(tmp_path), "zero_stage": zero_stage, "dtype": dtype, "scenarios": scenarios}
    live = run_ranks("tests.workers.resize:live", world_size, **common)
    fresh = run_ranks("tests.workers.resize:fresh", world_size, **common, mutations=MUTATIONS)
    for name in scenarios:
        expected = load_file(tmp_path / f"{name}_live.safetensors")
        for rank in range(world_size):
            assert live[rank][name]["settings_kept"]
            assert fresh[rank][f"{name}_none"] == live[rank][name]["after"]
            assert live[rank][name]["positions"]  # zero.Init must not round them
        assert differing(tmp_path / f"{name}_none.safetensors", expected) == []
        check_shares([ranks[name] for ranks in live], zero_stage, expected)
        if dtype == "fp32":
            agree_with_reference(reference, name, [ranks[name] for ranks in live], expected)
    first = next(iter(scenarios))
    expected = load_file(tmp_path / f"{first}_live.safetensors")
    for mutation in MUTATIONS:
        assert differing(tmp_path / f"{first}_{mutation}.safetensors", expected), mutation
        if mutation != "stale_ema":
            assert fresh[0][f"{first}_{mutation}"] != live[0][first]["after"], mutation


def differing(path: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal to the bit."""
    state = load_file(path)
    assert state.keys() == expected.keys()
    return [name for name in expected if not torch.equal(state[name], expected[name])]


def check_shares(ranks: list[dict], zero_stage: int, expected: dict[str, torch.Tensor]) -> None:
    """Sharded: no rank holds the whole state, and only what changes its rank travels (nothing at ZeRO-3)."""
    total = sum(t.numel() for name, t in expected.items() if name.startswith("weight/"))
    if zero_stage > 0 and len(ranks) > 1:
        assert sum(r["held"] for r in ranks) == total
        assert max(r["held"] for r in ranks) < 0.75 * total
    for sent, minimum in [resize for r in ranks for resize in r["traffic"]]:
        assert sent == minimum
        assert sent == 0 or (zero_stage in (1, 2) and len(ranks) > 1)


def agree_with_reference(reference: tuple, name: str, ranks: list[dict], state: dict[str, torch.Tensor]) -> None:
    """Loss within 1e-6 relative, every tensor within 1e-4 relative L2; key biases (zero gradient) apart."""
    losses, folder = reference
    by_rank = [[float.fromhex(x) for x in r["before"] + r["after"]] for r in ranks]
    for step, per_rank in enumerate(zip(*by_rank, strict=True)):
        assert math.isclose(sum(per_rank) / len(per_rank), losses[name][step], rel_tol=1e-6), (name, step)
    for key, expected in load_file(folder / f"{name}.safetensors").items():
        found = state[key]
        if key.endswith("attn.qkv.bias"):
            (query, _, value), (q, _, v) = expected.chunk(3), found.chunk(3)
            expected, found = torch.cat([query, value]), torch.cat([q, v])
        assert (found - expected).norm() <= 1e-4 * expected.norm(), key


@pytest.mark.parametrize("zero_stage", [1, *(pytest.param(stage, marks=FULL) for stage in (0, 2, 3))])
def test_impossible_resizes_are_refused_on_all_ranks_and_change_nothing(zero_stage):
    results = run_ranks("tests.workers.resize:refusals", 2, zero_stage=zero_stage)
    for result in results:
        assert len(result["messages"]) == 6
        assert "not a proper subset" in result["messages"][0]
        assert "the cut [1, 1] does not give 2 blocks to 1 stages" in result["messages"][3]
        assert "differs between rank 0 and ranks [1]" in result["messages"][4]
        assert "must stand between optimizer steps, not inside a gradient accumulation" in result["messages"][5]
        assert result["steps"] == [2, 2] and result["depth"] == 2
        assert result["same"]
