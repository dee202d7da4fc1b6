"""What leave-one-out scores cost: one sweep against brute force, and a whole check against training steps.

Two real ranks of this machine under ZeRO-3, everything in one run, medians over interleaved repeats. Brute force is the
full model and every model that lacks one block, each a batched pass without gradients over unsharded weights, its
blocks called on as many examples at once as the sweep's. Block evaluations (per draw) and gathers (per batch, of the
sharded model) are counted while both run; max_relative_difference compares their outputs in float64, relative to the
largest number of an output. *_cpu are of CPU time of the slowest rank: they stand on a busy machine too.

check_in_steps: seconds of the parts of `run_check` over those of a training step of --batch examples. The sweep scores
--check-draws draws and is scaled to the 1,024 of the defaults; NTK, ZiCo and agreeing, which is what is left of the
check, are timed once, over all candidates. ced_over_floor: the sweep over its floor, (depth + 1) / 2 forward passes a
draw, with forward passes of the unsharded model timed beside it. share_of_100k_steps: four checks as dear as this one,
of a run of 100,000 steps.

  python tools/bench_sweep.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.brute_force import Counted, OwnBlocks, brute_force, random_draws  # noqa: E402
from tools.check_cost import CHECKS, cost_of_a_check, interleaved  # noqa: E402


def bench_config(options: argparse.Namespace) -> Any:
    """The model, four checks down to half of it, ZeRO-3."""
    from entprune_ds.config import (
        Config,
        DataConfig,
        ModelConfig,
        ParallelConfig,
        PruneConfig,
        ScoreConfig,
        TrainConfig,
    )

    heads = max(1, options.width // 64)
    size = dict(depth=options.depth, hidden_size=options.width, num_heads=heads, input_size=8, num_classes=10)
    return Config(
        model=ModelConfig(**size), data=DataConfig(num_readers=2),
        train=TrainConfig(global_batch_size=options.batch),
        prune=PruneConfig(target_depth=options.depth // 2, num_checks=CHECKS),
        score=ScoreConfig(draws=options.check_draws, batch_size=options.check_draws // 2),
        parallel=ParallelConfig(ds_config="zero3_fp32"),
    )  # fmt: skip


def random_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random numbers everywhere: a fresh model would be the identity."""
    from entprune_ds.rng import generator_for

    return torch.randn(shape, generator=generator_for(0, name)) * 0.02


def against_brute_force(model: nn.Module, view: Any, config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Ratio of times, both counts, and the difference."""
    from entprune_ds.importance.stack_memory import stack_chunk
    from entprune_ds.importance.sweep import leave_one_out

    kept, chunk = config.model.blocks, stack_chunk(config.model, torch.float32)
    parts, (draws, _) = OwnBlocks(model), random_draws(config, options.draws, seed=1)
    seconds = interleaved(
        {
            "sweep": lambda: leave_one_out(parts, kept, *draws, chunk),
            "brute": lambda: brute_force(parts, kept, draws, chunk),
        },
        options.repeats,
    )
    few = tuple(column[:2] for column in draws)  # counts do not depend on their number
    counted, gathers = [], []
    for way in (leave_one_out, brute_force):
        arguments = (*few, chunk) if way is leave_one_out else (few, chunk)
        sharded, before = Counted(view), view.gathers
        way(sharded, kept, *arguments)  # type: ignore[operator]
        counted.append(sharded.samples // 2)
        gathers.append(view.gathers - before)
    double = OwnBlocks(model.double())
    wide = (few[0].double(), few[1].double(), few[2])
    a, b = leave_one_out(double, kept, *wide, chunk), brute_force(double, kept, wide, chunk)
    model.float()
    largest = b.abs().flatten(1).amax(1)
    return {
        "time_ratio": seconds["sweep"][0] / seconds["brute"][0],
        "time_ratio_cpu": seconds["sweep"][1] / seconds["brute"][1],
        "block_evaluations": counted[0], "block_evaluations_brute_force": counted[1],
        "gathers": gathers[0], "gathers_brute_force": gathers[1],
        "max_relative_difference": ((a - b).abs().flatten(1).amax(1) / largest).max().item(),
        "sweep_seconds": seconds["sweep"][0], "brute_force_seconds": seconds["brute"][0],
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures; equal on all ranks. Collective: two ranks call."""
    from entprune_ds import comm
    from entprune_ds.engine.build import build_engine, destroy_engine, fresh_state
    from entprune_ds.engine.state import write_state
    from entprune_ds.engine.view import ShardedView
    from entprune_ds.models.dit import DiT

    config = bench_config(options)
    engine = build_engine(replace(config, train=replace(config.train, micro_batch_size=options.micro)), config.model)

    def read(piece: Any) -> dict[str, Tensor]:
        return fresh_state(random_weight(piece.name, piece.shape).view(-1)[piece.start : piece.stop])

    write_state(engine.ds, engine.optimizer, engine.ema, 0, read)
    model = DiT(config.model).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(random_weight(name, tuple(parameter.shape)))
    found = against_brute_force(model, ShardedView(engine), config, options)
    found |= cost_of_a_check(engine, model, config, options)
    protocol = {k: v for k, v in vars(options).items() if k not in ("json", "out")}
    found["protocol"] = protocol | {"ranks": comm.world_size(), "threads": torch.get_num_threads()}
    destroy_engine(engine)
    return found


def parser() -> argparse.ArgumentParser:
    """The words of the command line."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--width", type=int, default=384)
    words.add_argument("--depth", type=int, default=28)
    words.add_argument("--draws", type=int, default=32, help="of a rank, sweep against brute force")
    words.add_argument("--check-draws", type=int, default=256, help="of all ranks, in two batches; a multiple of 4")
    words.add_argument("--batch", type=int, default=256, help="examples of a training step")
    words.add_argument("--micro", type=int, default=32, help="micro-batch of a rank")
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--json", action="store_true", help="print one line of JSON")
    words.add_argument("--out", default="", help=argparse.SUPPRESS)
    return words


def main() -> int:
    """Start two ranks of this file, and print what they found."""
    options = parser().parse_args()
    if "RANK" in os.environ:
        from entprune_ds import comm
        from entprune_ds.cli.common import leave

        comm.init(timeout_seconds=600)
        found = measure(options)
        if comm.is_main():
            Path(options.out).write_text(json.dumps(found))
        comm.barrier()
        comm.shutdown()
        leave(0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        threads = str(max(1, (os.cpu_count() or 1) // 2))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
        done = subprocess.run([*launch, *sys.argv[1:], "--out", str(out)], env=environment, stdout=sys.stderr)
        if done.returncode:
            return done.returncode
        found = json.loads(out.read_text())
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
