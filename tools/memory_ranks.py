"""The cases of tools/measure_memory.py, and what a rank of one does: python tools/memory_ranks.py CASE MODE FOLDER."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

STEPS = 3
"""Optimizer steps of a case: from the second one on ZeRO-3 knows the order of the layers and keeps what comes again."""
STAGES = [f"zero{stage}_{dtype}" for dtype in ("fp32", "bf16") for stage in range(4)]
RELEASING = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1_000_000}
"""ZeRO-3 that gathers a parameter for each use and releases it afterwards."""
SMALL_BUCKET = {"reduce_bucket_size": 1_000_000}
SHAPES: list[dict[str, Any]] = [
    {"hidden_size": 256, "depth": 12, "micro_batch": 4, "world_size": 1},
    {"hidden_size": 256, "depth": 12, "micro_batch": 16, "world_size": 2},
    {"hidden_size": 384, "depth": 12, "micro_batch": 4, "world_size": 2},
]
FITTED = [{"ds_config": name, **shape} for name in STAGES for shape in SHAPES]
FITTED += [{"ds_config": name, **SHAPES[1], "checkpointing": True} for name in ("zero1_fp32", "zero2_bf16")]
FITTED += [
    {"ds_config": f"zero3_{dtype}", **SHAPES[0], "world_size": 2, "zero": RELEASING} for dtype in ("fp32", "bf16")
]
FITTED += [{"ds_config": name, **SHAPES[0], "world_size": 4} for name in STAGES if not name.startswith("zero0")]
FITTED += [{"ds_config": f"zero{stage}_fp32", **SHAPES[2], "zero": SMALL_BUCKET} for stage in (1, 2)]
TWO = {"world_size": 2, "micro_batch": 4}
HELD_OUT: list[dict[str, Any]] = [
    {"ds_config": "zero0_fp32", "hidden_size": 448, "depth": 10, "micro_batch": 8, "world_size": 1},
    {"ds_config": "zero1_fp32", "hidden_size": 320, "depth": 16, **TWO, "micro_batch": 8},
    {"ds_config": "zero1_fp32", "hidden_size": 320, "depth": 20, **TWO, "world_size": 4},
    {"ds_config": "zero2_fp32", "hidden_size": 320, "depth": 14, **TWO, "micro_batch": 32, "checkpointing": True},
    {"ds_config": "zero2_fp32", "hidden_size": 384, "depth": 16, **TWO, "zero": {"reduce_bucket_size": 2_000_000}},
    {"ds_config": "zero3_fp32", "hidden_size": 320, "depth": 18, **TWO, "micro_batch": 8},
    {"ds_config": "zero3_fp32", "hidden_size": 384, "depth": 16, **TWO, "zero": RELEASING},
    {"ds_config": "zero1_bf16", "hidden_size": 320, "depth": 16, **TWO, "micro_batch": 8},
    {"ds_config": "zero2_bf16", "hidden_size": 320, "depth": 14, **TWO, "accumulation": 2},
    {"ds_config": "zero3_bf16", "hidden_size": 448, "depth": 10, **TWO},
    {"ds_config": "zero2_offload", "hidden_size": 384, "depth": 14, **TWO},
    {"ds_config": "zero1_fp32", "hidden_size": 384, "depth": 16, **TWO, "micro_batch": 8, "accumulation": 2,
     "pipe_stages": 2},
    {"ds_config": "zero1_fp32", "hidden_size": 448, "depth": 10, **TWO, "micro_batch": 16, "checkpointing": True},
    {"ds_config": "zero3_bf16", "hidden_size": 320, "depth": 14, **TWO, "zero": RELEASING},
    {"ds_config": "zero1_bf16", "hidden_size": 320, "depth": 20, **TWO, "accumulation": 2, "pipe_stages": 2},
    {"ds_config": "zero3_offload", "hidden_size": 384, "depth": 12, **TWO, "micro_batch": 8},
]  # fmt: skip
RESIZES: list[dict[str, Any]] = [
    {"ds_config": f"zero{stage}_fp32", "hidden_size": width, "depth": depth, "micro_batch": 2, "world_size": 2, **more}
    for width, depth in ((256, 12), (384, 20))
    for stage, more in ((0, {}), (1, {}), (2, {}), (3, {}), (1, {"pipe_stages": 2}))
]
RESIZES += [{**RESIZES[6], "front": True}]
REMOVALS = 3
"""Removals of a RESIZES case, each of a quarter of the blocks: evenly over the depth, or the first ones."""


def config_of(case: dict[str, Any], folder: str) -> Any:
    """The Config of a case; `folder` takes a DeepSpeed configuration when the case has one of its own."""
    from entprune_ds.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
    from entprune_ds.engine.ds_config import find_ds_config

    name = case["ds_config"]
    if "zero" in case:
        values = json.loads(find_ds_config(name).read_text())
        values["zero_optimization"] |= case["zero"]
        name = f"{folder}/ds_{os.getpid()}.json"
        Path(name).write_text(json.dumps(values))
    stages, accumulation = case.get("pipe_stages", 1), case.get("accumulation", 1)
    replicas = case["world_size"] // stages
    model = ModelConfig(
        depth=case["depth"], hidden_size=case["hidden_size"], num_heads=case["hidden_size"] // 64, input_size=16,
        num_classes=10, activation_checkpointing=case.get("checkpointing", False),
    )  # fmt: skip
    batch = case["micro_batch"] * accumulation * replicas
    return Config(
        model=model, data=DataConfig(num_readers=replicas),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=case["micro_batch"]),
        parallel=ParallelConfig(ds_config=name, pipe_stages=stages),
    )  # fmt: skip


def tiny(config: Any) -> Any:
    """The same run with a model that weighs nothing: what follows finds everything imported and connected."""
    train = replace(config.train, global_batch_size=2 * config.train.global_batch_size // config.train.micro_batch_size)
    model = replace(config.model, depth=4, hidden_size=64, num_heads=1)
    return replace(config, model=model, train=replace(train, micro_batch_size=2))


def trained(config: Any, steps: int = STEPS) -> Any:
    """An engine after some optimizer steps on random data."""
    import torch

    from entprune_ds.diffusion.objective import build_objective
    from entprune_ds.engine.build import build_engine, initialize_fresh
    from entprune_ds.engine.train_step import train_step

    model = config.model
    engine = build_engine(config, model)
    initialize_fresh(engine, seed=0)
    objective, count = build_objective(model, config.diffusion), config.train.global_batch_size // engine.dp_size
    latents = torch.randn(count, model.in_channels, model.input_size, model.input_size)
    labels = torch.zeros(count, dtype=torch.long)
    for step in range(steps):
        draws = objective.make_draws(latents, labels, range(count), seed=0, purpose="train", step=step)
        train_step(engine, draws.split(config.train.micro_batch_size), objective.loss)
        engine.update_ema(0.9)
    return engine


def status(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith(f"{key}:")).split()[1])


def rank_peak(case: dict[str, Any], folder: str, steps: int = STEPS) -> int:
    """Bytes that this rank's peak over some steps lies above the same process after a tiny model. Collective."""
    from entprune_ds.engine.build import destroy_engine

    config = config_of(case, folder)
    destroy_engine(trained(tiny(config)))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    destroy_engine(trained(config, steps))
    return status("VmHWM") - before


def rank_resizes(case: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """What the removals of a case take, after those of a tiny model; the faster of two rounds. Collective."""
    config = config_of(case, folder)
    removals(case, tiny(config), 1)
    rounds = removals(case, config, REMOVALS), removals(case, config, REMOVALS)
    return [min(both, key=lambda removal: removal["seconds"]) for both in zip(*rounds, strict=True)]


def kept_after(case: dict[str, Any], before: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks that a removal of a case leaves."""
    from entprune_ds.estimate_resize import evenly

    count = len(before) // 4
    return before[count:] if case.get("front") else evenly(before, count)


def removals(case: dict[str, Any], config: Any, count: int) -> list[dict[str, Any]]:
    """Train, and remove a quarter of the blocks some times. Collective."""
    from entprune_ds import comm
    from entprune_ds.engine.build import destroy_engine
    from entprune_ds.engine.resize import resize
    from entprune_ds.estimate import plan_of

    found, engine = [], trained(config)
    for _ in range(count):
        before = engine.kept_blocks
        kept = kept_after(case, before)
        cut = None if engine.cut is None else plan_of(config, comm.world_size(), len(kept)).cut  # as estimated
        engine, report = resize(engine, config, kept, cut)
        found.append({"before": before, "seconds": report.seconds, "bytes_state": report.bytes_state})
    destroy_engine(engine)
    return found


def worker(case: dict[str, Any], mode: str, folder: str) -> None:
    """One rank of a case."""
    import torch

    from entprune_ds import comm

    torch.set_num_threads(1)
    comm.init(timeout_seconds=300)
    found = rank_resizes(case, folder) if mode == "resize" else rank_peak(case, folder)
    Path(folder, f"result_{comm.rank()}").write_text(json.dumps(found))
    comm.barrier()
    os._exit(0)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]), *sys.argv[2:])
