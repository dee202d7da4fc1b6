"""What --dry-run says about memory and time: by hand, against the layouts of real ranks, against a real peak."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch

from entprune_ds import estimate, estimate_resize
from entprune_ds.cli import train
from entprune_ds.config import PruneConfig, load_config
from entprune_ds.engine.ds_config import WORKING_BLOCKS
from entprune_ds.models.registry import count_parameters
from tests.ranks import ROOT, run_ranks
from tests.tiny import tiny_config
from tools import measure_memory

FULL = pytest.mark.full
SHIPPED = sorted(p.stem for p in (ROOT / "ds_configs").glob("*.json"))
XL = 674_834_720
"""Parameters of SiT-XL/2 with its learn_sigma half."""
RATES = {"replicated": 0.5, "sharded": 3.0}


def rates(working_blocks: float = 0.0) -> dict:
    """Round figures in place of the measured ones."""
    return {"working_blocks": working_blocks, "released": 0.25, "buffers": dict.fromkeys(measure_memory.STAGES, RATES)}


def xl(*words: str, ranks: int = 8) -> list[estimate.Memory]:
    """SiT-XL/2 on some ranks."""
    config = load_config(["preset=sit_xl2_256", *words], check=lambda config: [])
    return estimate.rank_memory(config, ranks, rates())


def block_bytes(item: int, tokens: int, width: int, heads: int, ratio: float = 4.0) -> int:
    """What one block keeps of one example, by hand.

    Of T x D tokens: the input, norm1, its modulation, q, k, v, the attention and its projection, the sum, norm2, its
    modulation, the MLP's output (12), the MLP's hidden values before and after the GELU (2 r). Of the conditioning: c,
    silu(c), six shifts, scales and gates, two 1 + scale (10 D). In fp32: mean and 1 / deviation of two norms and the
    log-sum-exp of every head, per token; norms keep theirs in the precision of the input.
    """
    elements = tokens * width * (12 + 2 * ratio) + 10 * width + 4 * tokens
    return int(item * elements) + 4 * heads * tokens


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("name", "weights", "gradients", "master", "sharded"),
    [  # bytes per parameter; those of the optimizer state are divided by the ranks from ZeRO-1 on
        ("zero0_fp32", 4, 4, 0, 1),
        ("zero1_fp32", 4, 4, 4 / 8, 8),
        ("zero2_fp32", 4, 4 / 8, 4 / 8, 8),
        ("zero3_fp32", 4 / 8, 4 / 8, 4 / 8, 8),
        ("zero0_bf16", 2, 2, 4, 1),
        ("zero1_bf16", 2, 4, 4 / 8, 8),
        ("zero2_bf16", 2, 4 / 8, 4 / 8, 8),
        ("zero3_bf16", 2 / 8, 4 / 8, 4 / 8, 8),
    ],
)
def test_the_parts_of_xl_on_8_ranks(name, weights, gradients, master, sharded):
    [m] = xl(f"parallel.ds_config={name}")
    assert (m.weights, m.gradients, m.master) == (int(weights * XL), int(gradients * XL), int(master * XL))
    assert (m.moments, m.ema) == (8 * XL // sharded, 4 * XL // sharded)
    item = 4 if name.endswith("fp32") else 2
    gathered = 500_000_000 + 50_000_000 + 18 * 1152**2 + 15 * 1152 if name.startswith("zero3") else 0
    released = XL - gathered if gathered else 0
    assert m.gathered == item * gathered
    assert m.buffers == int(0.5 * min(XL, 500_000_000) + 3 * XL / sharded + 0.25 * item * released)
    assert m.total == sum((m.weights, m.gradients, m.master, m.moments, m.ema, m.activations, m.gathered, m.buffers))
    assert not m.offloaded and m.host == 0


def test_a_tiny_model_by_hand():
    """4 blocks of width 32 with 2 heads on 4 tokens of 4 values; 4 classes with the null label; 4 examples a rank."""
    block = 18 * 32**2 + 15 * 32
    stem = (4 * 32 + 32) + (256 * 32 + 32) + (32 * 32 + 32) + 4 * 32
    head = (32 * 4 + 4) + (32 * 64 + 64)
    assert count_parameters(tiny_config().model) == 4 * block + stem + head
    [m] = estimate.rank_memory(tiny_config(1), 2, rates())
    numel = 4 * block + stem + head
    state = 4 * numel + 4 * numel + (4 + 8 + 4) * numel // 2 + int(0.5 * numel + 3 * numel / 2)
    one = block_bytes(4, 4, 32, 2)
    assert 4 * 4 * one < m.activations < 4 * 5 * one and m.total == state + m.activations
    [more] = estimate.rank_memory(tiny_config(1), 2, rates(working_blocks=2.5))
    assert more.total == m.total + 4 * 2.5 * one


@pytest.mark.parametrize(("dtype", "item"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_of_a_block_by_hand(dtype, item):
    for width, heads, side in ((32, 2, 8), (64, 4, 16)):
        model = replace(tiny_config().model, hidden_size=width, num_heads=heads, input_size=side)
        tokens, ends = side**2 // 4, 0
        block, ends = estimate.example_activations(model, dtype)
        assert block == block_bytes(item, tokens, width, heads)
        assert (
            3 * item * tokens * width < ends < 5 * item * tokens * width + 2**14
        )  # the norm and modulation of the head


def test_activations_grow_with_batch_and_blocks_and_shrink_by_checkpointing():
    [plain], [half] = xl(), xl("train.micro_batch_size=16")
    assert plain.activations == 2 * half.activations  # 256 / 8 = 32 examples
    block, ends = block_bytes(2, 256, 1152, 16), 0
    ends = plain.activations // 32 - 28 * block
    assert 0 < ends < 5 * 2 * 256 * 1152
    [saved] = xl("model.activation_checkpointing=true")
    assert saved.activations == 32 * (28 * 2 * 257 * 1152 + ends)


def test_a_pipeline_stage_has_its_own_parameters_and_the_micro_batches_in_flight():
    few = xl("parallel.pipe_stages=4", "train.micro_batch_size=16", ranks=8)  # 256 / 2 / 16 = 8 micro-batches
    plan = estimate.plan_of(load_config(["preset=sit_xl2_256", "parallel.pipe_stages=4"], lambda c: []), 8)
    assert plan.cut == (7, 7, 7, 7) and plan.dp_size == 2
    block = 18 * 1152**2 + 15 * 1152
    assert [m.weights for m in few][1:3] == [2 * 7 * block] * 2
    assert sum(m.weights for m in few) == 2 * XL and few[0].weights > few[1].weights
    carried, one = 2 * 257 * 1152, block_bytes(2, 256, 1152, 16)
    assert few[1].activations == 16 * 3 * (7 * one + 2 * carried) and few[2].activations * 3 == few[1].activations * 2
    short = xl("parallel.pipe_stages=4", "train.micro_batch_size=64", ranks=8)  # 2 micro-batches: never 3 in flight
    assert short[1].activations == 64 * 2 * (7 * one + 2 * carried)
    uneven = xl("parallel.pipe_stages=8", "parallel.zero_stage=1", ranks=8)
    assert [round(m.weights / 2 / block) for m in uneven][1:] == [4, 4, 4, 3, 3, 3, 3]


def test_gathered_parameters_are_bounded_by_the_settings_of_zero_3():
    zero = {"stage3_max_reuse_distance": 1000, "stage3_prefetch_bucket_size": 100, "stage3_max_live_parameters": 10_000}
    assert estimate.gathered_parameters(zero, 10_000, 7) == 500 + 100 + 7
    assert estimate.gathered_parameters(zero | {"stage3_max_reuse_distance": 0}, 10_000, 7) == 100 + 7
    assert estimate.gathered_parameters(zero | {"stage3_max_live_parameters": 520}, 10_000, 7) == 500 + 20 + 7
    assert estimate.gathered_parameters(zero | {"stage3_max_live_parameters": 0}, 10_000, 7) == 500 + 7
    assert estimate.gathered_parameters({}, 10_000, 7) == 10_000


def test_offloaded_state_is_in_host_memory():
    [m], [plain] = xl("parallel.ds_config=zero2_offload"), xl("parallel.ds_config=zero2_bf16")
    assert m.host == (4 + 8 + 4) * XL // 8 and m.total == plain.total and plain.host == 0


def test_the_bucket_of_a_gpu_is_what_small_models_do_not_fill():
    stages = xl("parallel.pipe_stages=4", "parallel.ds_config=zero1_fp32")
    assert stages[0].reserved == 4 * (500_000_000 - stages[0].weights // 4)
    [m] = xl("parallel.ds_config=zero2_fp32", "model.depth=14")
    assert m.reserved == 4 * (500_000_000 - m.weights // 4)
    assert xl("parallel.ds_config=zero2_fp32")[0].reserved == xl("model.depth=14")[0].reserved == 0  # filled; none


def test_time_of_a_resize_and_what_is_parked():
    known = measure_memory.blank()
    known["resize"]["zero2"] = {"seconds": 0.5, "seconds_per_parameter": 1e-6}
    known["resize"]["seconds_per_byte"] = 1e-3
    config = tiny_config(2)
    kept = (0, 1, 3)
    found = estimate_resize.removal_estimate(config, 2, kept, known)
    numel = count_parameters(replace(config.model, kept_blocks=kept))
    block = 18 * 32**2 + 15 * 32
    received = 16 * [block // 2, 0][0]  # the boundary between the two ranks moves by half a block
    assert found.depth == 3 and abs(found.moved - received) <= 16 * 4
    assert math.isclose(found.seconds, 0.5 + 1e-6 * numel + 1e-3 * found.moved)
    assert found.parked <= 16 * (numel + block) // 2 + 64
    at_3 = estimate_resize.removal_estimate(tiny_config(3), 2, kept, known)
    assert at_3.moved == 0 and 16 * numel // 2 <= at_3.parked <= 16 * (numel // 2 + 100)
    alone = estimate_resize.removal_estimate(tiny_config(0), 2, kept, known)
    assert alone.moved == 0 and alone.parked == 16 * numel


def test_the_removal_that_is_estimated_is_the_largest_first_one():
    def depth(**prune: int | bool) -> int | None:
        found = estimate_resize.resize_estimate(
            replace(tiny_config(), prune=PruneConfig(**prune)), 2, measure_memory.blank()
        )
        return found and found.depth

    assert depth() is None and depth(target_depth=1, score_only=True) is None
    assert depth(target_depth=1, num_checks=2) == 1 and depth(target_depth=2, num_checks=4) == 3
    assert depth(target_depth=1, max_blocks_per_check=2) == 2
    assert estimate_resize.evenly(tuple(range(8)), 2) == (0, 1, 3, 4, 5, 7)


# ---------------------------------------------------------------- real ranks


CASE = {"ds_config": "zero1_fp32", "hidden_size": 320, "depth": 8, "micro_batch": 8, "world_size": 2}


def test_a_real_peak_and_the_layouts_of_real_ranks(tmp_path):
    topologies = [[1, 1], [3, 1], [1, 2]]
    first, second = run_ranks(
        "tests.workers.estimate:peak_and_layouts", 2, case=CASE, topologies=topologies, folder=str(tmp_path)
    )
    measured = max(first["peak"], second["peak"])
    assert abs(measure_memory.estimated(CASE, estimate.load_constants()["memory"]) / measured - 1) <= 0.15
    for real, guessed in first["layouts"]:
        assert real == guessed
    for minimum, guess in first["resizes"]:
        assert guess["moved"] == minimum


@FULL
def test_peaks_of_the_held_out_cases_are_within_15_percent():
    measured = measure_memory.all_measured([(case, "peak") for case in measure_memory.HELD_OUT])
    found = measure_memory.summary(measured, estimate.load_constants())
    assert len(found["held_out"]) >= 8
    assert not [c for c in measure_memory.HELD_OUT if c in measure_memory.FITTED]
    assert found["largest_error"]["held_out"] <= 0.15, found


# ---------------------------------------------------------------- what is printed and shipped


def test_the_shipped_constants_are_measured_ones():
    known = estimate.load_constants()
    facts = {"date", "machine", "torch", "deepspeed", "held_out_cases", "largest_error", "largest_error_seconds"}
    assert set(known["measured"]) == facts
    assert known["measured"]["held_out_cases"] == len(measure_memory.HELD_OUT) >= 8
    assert 0 < known["measured"]["largest_error"] <= 0.15
    memory = known["memory"]
    assert set(memory["buffers"]) == set(measure_memory.STAGES)
    assert 1 <= memory["working_blocks"] <= WORKING_BLOCKS and 0 <= memory["released"] < 3
    assert all(0 <= rate < 20 for pair in memory["buffers"].values() for rate in pair.values())
    for name in SHIPPED:
        assert estimate.plan_of(load_config([f"parallel.ds_config={name}"]), 8).key in memory["buffers"]
    costs = [cost for name, cost in known["resize"].items() if name != "seconds_per_byte"]
    assert len(costs) == 5 and all(cost["seconds"] > 0 for cost in costs) and known["resize"]["seconds_per_byte"] > 0
    assert "estimate.json" in (ROOT / "setup.py").read_text()


def mebibytes(text: str) -> float:
    """A printed size."""
    number, unit = text.split()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


QUICK = [*((name, 8, 1) for name in SHIPPED), ("zero1_bf16", 1, 1), ("zero1_fp32", 64, 4), ("zero2_bf16", 8, 4)]
REST = [c for c in itertools.product(SHIPPED, (1, 4, 64), (1, 4)) if c not in QUICK]


@pytest.mark.parametrize(("name", "ranks", "stages"), [*QUICK, *(pytest.param(*c, marks=FULL) for c in REST)])
def test_the_dry_run_prints_memory_and_time_for_every_topology(name, ranks, stages, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local := min(ranks, 4)))
    pruning = ["prune.target_depth=14", "prune.start_step=100"]
    words = ["preset=sit_xl2_256", f"parallel.ds_config={name}", f"parallel.pipe_stages={stages}", *pruning]
    status = train.main([*words, "--dry-run"])
    printed = capsys.readouterr()
    if stages > ranks or (stages > 1 and name[4] in "23"):
        assert status == 2 and "parallel.pipe_stages" in printed.err and not printed.out
        return
    assert status == 0 and not torch.distributed.is_initialized()
    rows = dict(re.findall(r"^#   (\S.*?)  +([\d.]+ [MG]iB)$", printed.out, re.MULTILINE))
    assert list(rows) == [
        "weights", "gradients", "fp32 weights", "Adam moments", "EMA", "activations", "gathered blocks", "buffers",
        "total",
    ]  # fmt: skip
    sizes = {label: mebibytes(text) for label, text in rows.items()}
    assert math.isclose(sum(sizes.values()), 2 * sizes["total"], rel_tol=0.01)
    assert (sizes["gathered blocks"] > 0) == (name[4] == "3")
    assert ("in host memory" in printed.out.split("# a resize")[0]) == name.endswith("offload")
    assert ("stage 0, the largest" in printed.out) == (stages > 1) == ("an even cut" in printed.out)
    assert re.search(
        r"# a resize from 28 to 21 blocks: about [\d.e-]+ s; between ranks travel\n#   [\d.]+ .iB of state", printed.out
    )
    assert f"on a node of {local} ranks" in printed.out and f"on a node of {local} such ranks" in printed.out
    assert ("idle" in printed.out) == (stages > 1) and "measure yours: python tools/measure_memory.py" in printed.out


def test_only_the_first_rank_prints_and_compile_is_named(monkeypatch, capsys):
    assert train.main(["preset=digits", "data.shards=", "model.compile=true", "--dry-run"]) == 0
    assert "# model.compile is not accounted for" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert train.main(["preset=digits", "data.shards=", "--dry-run"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("variable", "text"),
    [("WORLD_SIZE", "many"), ("WORLD_SIZE", "0"), ("LOCAL_WORLD_SIZE", "-8")],
)
def test_a_number_of_ranks_that_is_none_is_refused(variable, text, monkeypatch, capsys):
    monkeypatch.setenv(variable, text)
    assert train.main(["preset=sit_xl2_256", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"error: `{variable}` is {text!r}; set it to a number of ranks")


def test_the_ranks_of_a_node_must_divide_all_ranks_and_nothing_is_resized_where_nothing_goes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert train.main(["preset=sit_xl2_256", "--dry-run"]) == 0
    assert "# a resize: none, for nothing is removed" in capsys.readouterr().out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert train.main(["preset=sit_xl2_256", "--dry-run"]) == 2
    assert "`LOCAL_WORLD_SIZE` (3, ranks of a node) must divide `WORLD_SIZE` (8)." in capsys.readouterr().err
