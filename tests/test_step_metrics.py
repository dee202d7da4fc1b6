"""Metrics of a step: parts that add up, norms of blocks at any sharding, and a training that does not notice."""

from __future__ import annotations

import json
import statistics
from types import SimpleNamespace

import pytest
import torch

from entprune_ds.config import Config, ModelConfig, MonitorConfig
from entprune_ds.config_checks import problems_of
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.engine import step_parts
from entprune_ds.engine.block_norms import BlockNorms, block_norms
from entprune_ds.engine.device_use import known_peak, memory, peak_tflops, step_flops
from entprune_ds.engine.step_parts import PARTS, StepParts
from entprune_ds.models.dit import DiT, initialize
from entprune_ds.models.registry import count_macs, model_config
from tests.ranks import ROOT, run_ranks
from tests.test_training import equal_state, losses, words
from tests.tiny import tiny_config, tiny_draws

FULL = pytest.mark.full
BASE_PARTS = ("data", "forward", "backward", "optimizer", "communication")


def test_parts_are_disjoint_and_start_anew(monkeypatch):
    now = 100.0
    monkeypatch.setattr(step_parts, "time", SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now))
    parts = StepParts()
    now = 101.0
    with parts.part("backward"):
        now = 103.0
        with parts.part("communication"):
            now = 108.0
            with parts.part("communication"):
                now = 109.0
        now = 109.5
    with parts.part("data"):
        now = 112.0
    parts.steps = 2
    now = 114.0
    seconds, found = parts.take()
    assert found == dict.fromkeys(PARTS, 0) | {"backward": 1.25, "communication": 3.0, "data": 1.25}
    assert seconds == 7.0
    now = 115.0
    assert parts.take() == (1.0, dict.fromkeys(PARTS, 0))  # anew, and no division by no step
    parts.steps = 3
    parts.restart()
    assert parts.steps == 0 and parts.began == 115.0


def test_a_part_that_fails_is_closed():
    parts = StepParts()
    with pytest.raises(ValueError), parts.part("forward"):
        raise ValueError
    with parts.part("data"):
        pass
    assert not parts.open and parts.take()[1]["forward"] >= 0


def test_the_peak_is_that_of_the_card_or_of_the_setting():
    names = {
        "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA L40S": 362.0,
        "NVIDIA A10": 125.0, "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA GeForce GTX 1080": None, "NVIDIA H200": 989.0,
    }  # fmt: skip
    assert {name: known_peak(name) for name in names} == names
    assert peak_tflops(None, torch.float32) is None and peak_tflops(2.5, torch.float32) == 2.5
    model = model_config("DiT-XL/2")
    assert step_flops(model, 256) == 6 * 256 * count_macs(model)
    assert step_flops(model.keeping(tuple(range(14))), 1) < 0.55 * step_flops(model, 1)


@pytest.mark.parametrize(("key", "value"), [("blocks_every", -1), ("peak_tflops", 0.0), ("peak_tflops", -3.0)])
def test_settings_that_make_no_sense_are_refused(key, value):
    (problem,) = [p for p in problems_of(Config(monitor=MonitorConfig(**{key: value}))) if key in p]
    assert str(value) in problem


class Whole:
    """An unsharded model as the view that block_norms takes."""

    def __init__(self, model: DiT, dtype: torch.dtype):
        self.model, self.dtype, self.device = model.to(dtype), dtype, torch.device("cpu")
        self.kept_blocks = tuple(map(int, model.blocks))
        self.embed, self.block = model.embed, lambda index: model.blocks[str(index)]


def test_norms_of_an_unsharded_model_by_hand():
    config = tiny_config()
    model = initialize(DiT(config.model), 1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        model.blocks["1"].adaLN_modulation[1].weight.zero_()
        model.blocks["1"].adaLN_modulation[1].bias.zero_()  # its gates are 0: it does nothing
    draws = tiny_draws(config, 0, 0, 1)
    found = block_norms(Whole(model, torch.float64), draws)
    x, c = model.embed(draws.z_t.double(), draws.t.double(), draws.labels)
    for index, block in model.blocks.items():
        after = block(x, c)
        relative = [((a - b).norm() / b.norm()).item() for a, b in zip(after, x, strict=True)]
        gates = block.adaLN_modulation(c)
        d = config.model.hidden_size
        expected = [sum(relative) / len(relative), gates[:, 2 * d : 3 * d].abs().mean().item()]
        expected.append(gates[:, 5 * d :].abs().mean().item())
        assert list(found[int(index)]) == pytest.approx(expected, rel=1e-9), index
        x = after
    assert list(found[1]) == [0, 0, 0] and found[0].residual > 0.01


TOPOLOGIES = [("zero3_fp32", 1), ("zero1_fp32", 2)]


def test_norms_are_the_same_at_any_sharding():
    (one,) = run_ranks("tests.workers.step_metrics:norms", 1, cases=[("zero0_fp32", 1)])
    two = run_ranks("tests.workers.step_metrics:norms", 2, cases=TOPOLOGIES)
    assert two[0] == two[1]  # every rank has the whole answer
    for found in two[0]:
        assert found.keys() == one[0].keys() == {"0", "1", "2", "3"}
        for block, values in found.items():
            assert values == pytest.approx(one[0][block], rel=2e-3), block
            assert min(values) > 0


SHIPPED = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))


def gradient_norms_by_hand() -> list[float]:
    """Norms before clipping of two steps in plain torch."""
    config = tiny_config()
    model, train = initialize(DiT(config.model), config.run.seed), config.train
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay
    )
    norms, objective = [], build_objective(config.model, config.diffusion)
    for step in range(2):
        draws = tiny_draws(config, step, 0, 1)
        optimizer.zero_grad()
        objective.loss(model(draws.z_t, draws.t, draws.labels), draws.target, draws.t).mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip).item())
        optimizer.step()
    return norms


@pytest.mark.parametrize("names", [["zero0_fp32"], pytest.param(SHIPPED, marks=FULL)], ids=["plain", "shipped"])
def test_the_gradient_norm_is_known_at_every_layout(names):
    cases = [(name, 1) for name in names] + [(name, 2) for name in names if name[4] in "01"]
    expected = gradient_norms_by_hand()
    assert min(expected) > 1.5 * tiny_config().train.grad_clip  # clipping is active: it is the norm before it
    for found in run_ranks("tests.workers.step_metrics:gradient_norms", 2, cases=cases):
        for (name, stages), norms in zip(cases, found, strict=True):
            rel = 1e-5 if name.endswith("fp32") else 4e-3
            assert norms == pytest.approx(expected, rel=rel), (name, stages)


def test_waiting_for_a_late_rank_is_communication_of_the_other():
    cases = [("zero1_fp32", 1, 1), ("zero3_fp32", 1, 1), ("zero1_fp32", 2, 4)]
    late = 0.3
    found = run_ranks("tests.workers.step_metrics:split", 2, cases=cases, late=late)
    for case, in_time, behind in zip(cases, *found, strict=True):
        for rank in (in_time, behind):
            assert sum(rank["parts"].values()) <= rank["seconds"] + 1e-3, case
            assert all(rank["parts"][name] > 0 for name in BASE_PARTS), case
            assert min(rank["parts"].values()) >= 0, case
        waited = in_time["parts"]["communication"] - behind["parts"]["communication"]
        assert waited > 0.5 * late, (case, in_time, behind)
        others = in_time["seconds"] - sum(in_time["parts"].values())
        assert others < 0.5 * late, (case, in_time)  # the wait is found, not left over


def test_monitoring_changes_nothing_and_says_everything(digits, tmp_path):
    common = ["train.num_steps=6", "prune.end_step=4", "train.validate_every=0", "parallel.ds_config=zero3_fp32"]
    loud = ["monitor.blocks_every=1", "monitor.peak_tflops=0.5", "monitor.log_every=1"]
    quiet = ["monitor.blocks_every=0", "monitor.log_every=3"]
    runs = [words(digits, tmp_path, name, *common, *more) for name, more in (("loud", loud), ("quiet", quiet))]
    run_ranks("tests.workers.step_metrics:train", 2, folder=str(tmp_path), runs=runs)
    last = "checkpoints/step_00000006"
    assert equal_state(tmp_path / "loud" / last, tmp_path / "quiet" / last)
    assert losses(tmp_path / "loud").items() >= losses(tmp_path / "quiet").items()
    rows = [json.loads(line) for line in (tmp_path / "loud" / "metrics.jsonl").read_text().splitlines()]
    decisions = [json.loads(line) for line in (tmp_path / "loud" / "decisions.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    for row in steps:
        parts = [row[f"train/seconds_{name}"] for name in (*BASE_PARTS, "other")]
        assert sum(parts) == pytest.approx(row["train/step_seconds"], rel=0.2)  # one is of rank 0, the others are means
        assert row["train/examples_per_second"] == pytest.approx(16 / row["train/step_seconds"])
        assert row["train/memory_rss_gib"] > 0.1 and row["train/grad_norm"] > 0
        model = ModelConfig(
            depth=4, hidden_size=32, num_heads=2, input_size=8, in_channels=1, num_classes=10,
            kept_blocks=tuple(range(row["train/depth"])),
        )  # fmt: skip
        mfu = step_flops(model, 16) / (row["train/step_seconds"] * 0.5e12 * 2)
        assert row["train/mfu"] == pytest.approx(mfu, rel=1e-6)
    blocks = {row["step"]: [k for k in row if k.startswith("train/residual/")] for row in rows}
    kept = decisions[-1]["kept_blocks"]
    assert blocks[6] == [f"train/residual/block_{b:02d}" for b in kept]
    assert any(f"train/gate_mlp/block_{kept[0]:02d}" in row for row in rows)
    quiet_rows = [json.loads(line) for line in (tmp_path / "quiet" / "metrics.jsonl").read_text().splitlines()]
    assert not [k for row in quiet_rows for k in row if "block_" in k or k == "train/mfu"]


@FULL
def test_a_pipeline_tells_its_bubble(digits, tmp_path):
    """Of two stages each stands still for half of the passes of one micro-batch, and for a seventeenth of sixteen."""
    common = [
        "train.num_steps=8", "prune.target_depth=null", "train.validate_every=0", "parallel.pipe_stages=2",
        "model.hidden_size=256", "model.patch_size=1", "train.global_batch_size=64",  # computing outweighs sending
    ]  # fmt: skip
    runs = [words(digits, tmp_path, f"micro_{n}", *common, f"train.micro_batch_size={n}") for n in (4, 64)]
    run_ranks("tests.workers.step_metrics:train", 2, folder=str(tmp_path), runs=runs)
    shares = {}
    for size in (4, 64):
        rows = [json.loads(line) for line in (tmp_path / f"micro_{size}" / "metrics.jsonl").read_text().splitlines()]
        found = [row["train/bubble_share"] for row in rows if "train/loss" in row]
        assert len(found) == 8 and all(0 < share < 1 for share in found)
        shares[size] = found[1:]
    one_micro_batch = statistics.median(shares[64])
    assert one_micro_batch > 0.25
    assert one_micro_batch > 1.4 * min(shares[4]), shares  # the step that others on the machine have disturbed least


def test_the_benchmark_of_monitoring_measures_pairs(tmp_path):
    from tools.bench_monitor import TINY, bootstrap

    found, other = run_ranks("tools.bench_monitor:measure", 2, folder=str(tmp_path), pairs=1, settings=TINY)
    assert found["pairs"] == 1 and found["world_size"] == 2 and found["wandb"] == "offline" and not found["dropped"]
    per_block = found["log_ms"] + found["blocks_ms"] * found["log_every"] / found["blocks_every"]
    per_block += found["clock_ms_per_step"] * found["log_every"]
    ratio = 1 + per_block / (found["step_ms"] * found["log_every"])
    assert found["ratio"] - 1 == pytest.approx(ratio - 1) and found["interval"] == [found["ratio"]] * 2
    assert min(found["log_ms"], found["blocks_ms"], found["clock_ms_per_step"], other["step_ms"]) > 0
    low, high = bootstrap([1.0, 1.1, 1.2, 1.3, 1.4])
    assert 1.0 <= low < 1.2 < high <= 1.4 and bootstrap([1.0, 1.0, 1.0]) == [1.0, 1.0]
    assert list((tmp_path / "bench" / "wandb").glob("offline-run-*/*.wandb"))


def test_every_metric_of_a_step_is_explained():
    text = (ROOT / "docs" / "METRICS.md").read_text()
    names = [f"train/seconds_{name}" for name in (*PARTS, "other")]
    names += ["train/mfu", "train/bubble_share", *memory(), *(f"train/{name}/block_NN" for name in BlockNorms._fields)]
    assert [name for name in names if f"`{name}`" not in text] == []
