"""What a teacher costs: time of a training step with it over one without, in one run, and its memory on a rank.

Two ranks under ZeRO train a pruned model in turn: plain, with the teacher's output, and with its hidden states, the
teacher sharded and whole. ratio is the median over rounds of step time / plain step time of the same round; cpu_ratio
that of the busiest rank's CPU time, which stands on a busy machine too. Without gathers and losses a teacher would cost
its forward pass: floor is 1 + depth of the teacher / (3 x depth of the student), a step being three forward passes.

  python tools/bench_distill.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def parsed() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12, help="blocks of the teacher")
    parser.add_argument("--kept", type=int, default=6, help="blocks of the student")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step on each rank")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind, in turn")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Start two ranks of this file, print what rank 0 found."""
    options = parsed()
    if "RANK" in os.environ:
        worker(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        done = subprocess.run([*launch, *sys.argv[1:], "--out", str(out)], env=environment, stdout=sys.stderr)
        if done.returncode:
            return done.returncode
        found = json.loads(out.read_text())
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))
    return 0


def worker(options: argparse.Namespace) -> None:
    """One rank: train each kind in turn; rank 0 writes the result."""
    import torch

    from entprune_ds import comm
    from entprune_ds.config import Config, DataConfig, DistillConfig, ModelConfig, ParallelConfig, TrainConfig
    from entprune_ds.diffusion.objective import FlowObjective
    from entprune_ds.engine.build import build_engine, initialize_fresh
    from entprune_ds.estimate_teacher import teacher_memory
    from entprune_ds.interop.source import Source
    from entprune_ds.models.dit import initial_tensor
    from entprune_ds.models.registry import parameter_shapes
    from entprune_ds.recovery import Distillation, PlainRecovery
    from entprune_ds.teacher import Teacher

    comm.init(timeout_seconds=600)
    whole = ModelConfig(depth=options.depth, hidden_size=options.width, num_heads=options.width // 32, input_size=16)
    kept = tuple(i * options.depth // options.kept for i in range(options.kept))
    batch = options.micro_batch * options.accumulation
    config = Config(
        model=whole.keeping(kept), data=DataConfig(num_readers=2),
        train=TrainConfig(global_batch_size=batch * comm.world_size(), micro_batch_size=options.micro_batch),
        parallel=ParallelConfig(ds_config=f"zero{options.zero_stage}_fp32"), distill=DistillConfig(start=0),
    )  # fmt: skip
    engine = build_engine(config, config.model)
    initialize_fresh(engine, seed=0)
    shapes = parameter_shapes(whole)
    source = Source(whole, lambda name: initial_tensor(name, shapes[name], 1), {})
    kinds: dict[str, Any] = {"plain": PlainRecovery()}
    memory = {}
    for placement in ("sharded", "whole"):
        teacher = Teacher(source, torch.float32, placement == "sharded")
        for kind in ("output", "features"):
            of_kind = replace(config, distill=replace(config.distill, kind=kind, placement=placement))
            kinds[f"{kind} {placement}"] = Distillation(of_kind, teacher)
            estimated = teacher_memory(of_kind, whole, comm.world_size())
            memory[f"{kind} {placement}"] = {"weights": teacher.nbytes, "activations_estimated": estimated.activations}
    objective, slots = FlowObjective(), range(batch)
    latents = torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(comm.rank()))
    draws = objective.make_draws(latents, torch.zeros(batch).long(), slots, seed=0, purpose="train", step=0)
    parts, seconds = draws.split(options.micro_batch), {name: [] for name in kinds}  # type: ignore[var-annotated]
    for number in range(options.rounds + 1):
        for name, recovery in kinds.items():
            comm.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            recovery.train_step(engine, parts, objective, 0, [])
            cpu = time.process_time() - cpu
            comm.barrier()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - start, max(comm.all_gather_json(cpu))))
    if comm.is_main():
        found = {name: ratios(seconds[name], seconds["plain"]) | memory.get(name, {}) for name in kinds}
        block = sum(t.numel() for t in teacher.shares.values()) // options.depth * 4
        found |= {
            "floor": round(1 + options.depth / (3 * options.kept), 3),
            "student_weights": sum(p.numel() for p in engine.ds.module.parameters()) * 4, "block": block,
            "protocol": {k: v for k, v in vars(options).items() if k not in ("out", "json")} | {"ranks": 2},
        }  # fmt: skip
        Path(options.out).write_text(json.dumps(found))
    comm.shutdown()


def ratios(seconds: list[tuple[float, float]], plain: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians over the rounds: of the step, and of its ratio to the plain one of the same round."""
    ratio, cpu = (
        statistics.median(ours[i] / theirs[i] for ours, theirs in zip(seconds, plain, strict=True)) for i in (0, 1)
    )
    step = statistics.median(wall for wall, _ in seconds)
    return {"ratio": round(ratio, 3), "cpu_ratio": round(cpu, 3), "step_seconds": round(step, 3)}


if __name__ == "__main__":
    sys.exit(main())
