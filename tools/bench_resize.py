"""What a live resize costs, against our own checkpoint + relaunch + load, on two ranks of this machine.

A model of width 384 goes from 28 to 14 blocks in four removals. Both figures reach from the end of the last
step before a removal to the end of the first step after it, without scoring: `resize` stays in its processes;
`relaunch` saves a checkpoint, ends them, starts new ones and loads (warm caches, files not verified).
Both contain one training step, which is most of a resize on a slow machine; *_overhead_seconds are without it.

  python tools/bench_resize.py --json      bf16, as the XL presets train; --precision fp32 for the other
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.local_ranks import on_ranks  # noqa: E402

WORLD_SIZE = 2
DEPTHS = (28, 24, 21, 17, 14)
STEPS = 4
"""Training steps at every depth; the first one after a removal belongs to the removal."""
MODES = {"zero1": ("zero1", 1), "zero2": ("zero2", 1), "zero3": ("zero3", 1), "pipeline": ("zero1", WORLD_SIZE)}
"""ds_config without its precision, pipeline stages."""


def kept_at(depth: int) -> tuple[int, ...]:
    """Original indices that remain at a depth: blocks leave all over the model."""
    kept = tuple(range(DEPTHS[0]))
    for target in [d for d in DEPTHS if depth <= d < DEPTHS[0]]:
        count = len(kept) - target
        gone = {kept[(2 * i + 1) * len(kept) // (2 * count)] for i in range(count)}
        kept = tuple(b for b in kept if b not in gone)
    return kept


def bench_config(mode: str, width: int, precision: str) -> Any:
    """64 tokens, micro-batch 8 on every data-parallel rank."""
    from entprune_ds.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig

    model = ModelConfig(depth=DEPTHS[0], hidden_size=width, num_heads=6, input_size=16, patch_size=2)
    name, stages = MODES[mode]
    parallel = ParallelConfig(ds_config=f"{name}_{precision}", pipe_stages=stages)
    train = TrainConfig(global_batch_size=8 * WORLD_SIZE // parallel.pipe_stages)
    return Config(model=model, data=DataConfig(num_readers=WORLD_SIZE), train=train, parallel=parallel)


def steps_of(engine: Any, config: Any, count: int) -> list[float]:
    """Train some steps on random data; the wall-clock times at which they ended on the slowest rank."""
    from entprune_ds import comm
    from entprune_ds.diffusion.objective import build_objective
    from entprune_ds.engine.train_step import train_step

    model, objective = config.model, build_objective(config.model, config.diffusion)
    generator, ends = torch.Generator().manual_seed(engine.dp_rank), []
    for step in range(count):
        latents = torch.randn(8, model.in_channels, model.input_size, model.input_size, generator=generator)
        draws = objective.make_draws(latents, torch.arange(8), range(8), seed=0, purpose="bench", step=step)
        train_step(engine, [draws], objective.loss)
        engine.update_ema(config.train.ema_decay)
        comm.barrier()
        ends.append(time.time())
    return ends


def live(config: Any, folder: Path) -> dict[str, Any]:
    """One job that goes through all removals; leaves the cuts of its pipeline for the jobs of the other way."""
    from entprune_ds import comm
    from entprune_ds.engine.build import build_engine, initialize_fresh
    from entprune_ds.engine.resize import resize

    engine = build_engine(config, config.model)
    initialize_fresh(engine, seed=0)
    ends, seconds, reports, steps, cuts = steps_of(engine, config, STEPS), [], [], [], [engine.cut]
    for depth in DEPTHS[1:]:
        before = ends[-1]
        engine, report = resize(engine, config, kept_at(depth))
        ends = steps_of(engine, config, STEPS)
        seconds.append(ends[0] - before)
        steps.append([b - a for a, b in itertools.pairwise(ends)])
        reports.append(report)
        cuts.append(engine.cut)
    if comm.is_main():
        (folder / "cuts.json").write_text(json.dumps(cuts))
    return {
        "resize_seconds": seconds, "step_seconds": steps, "parts": [vars(r) for r in reports],
        "bytes_state": [r.bytes_state for r in reports], "bytes_minimum": [r.bytes_minimum for r in reports],
    }  # fmt: skip


def relaunched(config: Any, folder: Path, index: int) -> dict[str, Any]:
    """The job at DEPTHS[index]: loads what the one before has left, trains, and saves for the one after it."""
    from entprune_ds.engine.build import build_engine, initialize_fresh
    from entprune_ds.engine.checkpoint import range_reader, read_checkpoint, save_checkpoint
    from entprune_ds.engine.state import write_state

    cut = json.loads((folder / "cuts.json").read_text())[index]  # as decisions record it: nothing is measured again
    engine = build_engine(config, replace(config.model, kept_blocks=kept_at(DEPTHS[index])), cut and tuple(cut))
    if index:
        found = read_checkpoint(folder / f"step_{index - 1:08d}")
        read = range_reader(found)
        step = found.manifest["adam_step"]
        write_state(engine.ds, engine.optimizer, engine.ema, step, lambda p: read(p.name, p.start, p.stop))
    else:
        initialize_fresh(engine, seed=0)
    ends = steps_of(engine, config, STEPS)
    save_checkpoint(engine, folder, index, {})
    return {"first": ends[0], "last": ends[-1], "step": statistics.median(b - a for a, b in itertools.pairwise(ends))}


def job(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run this file on all ranks; what rank 0 returned."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result")
        command = [sys.executable, __file__, "--result", str(result), *arguments]
        return on_ranks(command, WORLD_SIZE, threads, result, 600)


def worker(options: argparse.Namespace) -> None:
    """One rank of a job."""
    from entprune_ds import comm

    comm.init(timeout_seconds=300)
    folder, config = Path(options.folder), bench_config(options.modes[0], options.width, options.precision)
    result = live(config, folder) if options.index is None else relaunched(config, folder, options.index)
    if comm.is_main():
        Path(options.result).write_text(json.dumps(result))
    os._exit(0)  # as fast as a relaunch can be: nothing is taken apart


def measure(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways through the four removals; medians."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--modes", mode, "--width", str(options.width), "--precision", options.precision, "--folder", folder]
        found = job(words, options.threads)
        jobs = [job([*words, "--index", str(i)], options.threads) for i in range(len(DEPTHS))]
    seconds, steps = found["resize_seconds"], [statistics.median(s) for s in found["step_seconds"]]
    relaunches = [b["first"] - a["last"] for a, b in itertools.pairwise(jobs)]
    resize, relaunch, step = (statistics.median(s) for s in (seconds, relaunches, steps))
    resize_overhead = statistics.median(s - step for s, step in zip(seconds, steps, strict=True))
    overhead = statistics.median(s - b["step"] for s, b in zip(relaunches, jobs[1:], strict=True))
    if options.parts:
        print(json.dumps(found), file=sys.stderr)
    return {
        "mode": mode, "precision": options.precision,
        "resize_seconds": resize, "relaunch_seconds": relaunch, "step_seconds": step,
        "relaunch_over_resize": relaunch / resize, "resize_in_steps": resize / step,
        "resize_overhead_seconds": resize_overhead, "relaunch_overhead_seconds": overhead,
        "overhead_ratio": overhead / resize_overhead,
        "bytes_state": sum(found["bytes_state"]), "bytes_minimum": sum(found["bytes_minimum"]),
    }  # fmt: skip


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), help="what to measure")
    parser.add_argument("--width", type=int, default=384, help="width of the model")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="of the forward pass")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) // WORLD_SIZE), help="per rank")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--parts", action="store_true", help="every removal, on standard error")
    for hidden in ("--result", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        worker(options)
    rows = [measure(mode, options) for mode in options.modes]
    if options.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
