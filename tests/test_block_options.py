"""Options of the blocks under DeepSpeed: activation checkpointing and torch.compile, before and after a resize."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks

FULL = pytest.mark.full


def numbers(losses: list[str]) -> list[float]:
    """Losses from their exact hexadecimal text."""
    return [float.fromhex(text) for text in losses]


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [(3, "fp32"), *(pytest.param(*row, marks=FULL) for row in ((1, "fp32"), (3, "bf16")))]
)
@pytest.mark.full
def test_activation_checkpointing_changes_nothing_under_zero(zero_stage, dtype):
    plain, checkpointed = (
        run_ranks("tests.workers.resize:options", 2, zero_stage=zero_stage, dtype=dtype, activation_checkpointing=on)
        for on in (False, True)
    )
    for rank in range(2):
        assert checkpointed[rank]["losses"] == plain[rank]["losses"]


@pytest.mark.parametrize("zero_stage", [1, pytest.param(0, marks=FULL), pytest.param(2, marks=FULL)])
def test_compiled_blocks_agree_and_survive_a_resize_without_compiling_again(zero_stage):
    plain, compiled = (
        run_ranks("tests.workers.resize:options", 1, zero_stage=zero_stage, compile=on)[0] for on in (False, True)
    )
    assert plain["graphs"] == [0, 0]
    before, after = compiled["graphs"]
    assert before >= 1
    assert after == before
    assert compiled["names"] == plain["names"]
    assert numbers(compiled["losses"]) == pytest.approx(numbers(plain["losses"]), rel=1e-4)


@FULL
def test_compiled_blocks_agree_on_a_pipeline_that_is_resized():
    plain, compiled = (run_ranks("tests.workers.pipeline:options", 2, compile=on) for on in (False, True))
    for rank in range(2):
        assert compiled[rank]["graphs"][0] >= 1 and plain[rank]["graphs"] == [0, 0]
        assert numbers(compiled[rank]["losses"]) == pytest.approx(numbers(plain[rank]["losses"]), rel=1e-4)
