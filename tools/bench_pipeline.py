"""What cutting a pipeline again by measured cost is worth after uneven removals.

Two stages are measured: half of the first stage's blocks are removed, and the same model trains in turn with the old
cut (nothing moved) and with the new one. Four stages are computed: costs of the stages from the measured costs of the
layers, and the length of DeepSpeed's own 1F1B schedule, with backward passes of twice the forward. imbalance is the
slowest stage over the mean, optimum the least that any contiguous cut has, by_parameters that of DeepSpeed's cut.
throughput_gain is of wall time; throughput_gain_cpu, of the busiest rank's CPU time, stands on a busy machine too, but
knows nothing of bubbles.

  python tools/bench_pipeline.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def parsed() -> argparse.Namespace:
    """The words of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=16, help="blocks before the removal")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=16, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=1, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each cut, in turn")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--out", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Start two ranks of this file, print what rank 0 found."""
    options = parsed()
    if "RANK" in os.environ:
        worker(options)
        return 0
    import tempfile

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
    """One rank: measure two stages, compute four; rank 0 writes the result."""
    from entprune_ds import comm
    from entprune_ds.config import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
    from entprune_ds.engine.balance import stage_costs
    from entprune_ds.engine.build import build_engine, initialize_fresh
    from entprune_ds.engine.resize import next_cut, resize

    comm.init(timeout_seconds=600)
    depth, half = options.depth, options.depth // 2
    model = ModelConfig(depth=depth, hidden_size=options.width, num_heads=options.width // 32, input_size=16)
    batch = options.micro_batch * options.accumulation
    config = Config(
        model=model, data=DataConfig(num_readers=1),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=options.micro_batch),
        parallel=ParallelConfig(ds_config="zero1_fp32", pipe_stages=2),
    )  # fmt: skip
    engine = build_engine(config, model, (half, depth - half))
    initialize_fresh(engine, seed=0)
    kept = tuple(range(half // 2, depth))  # half of the first stage's blocks are gone
    pruned = engine.model_config.keeping(kept)
    new, old = next_cut(engine, config, pruned), (half - half // 2, depth - half)
    costs = engine.costs
    assert new is not None and costs is not None
    engine, _ = resize(engine, config, kept, old)
    seconds: dict[tuple[int, ...], list[tuple[float, float]]] = {old: [], new: []}
    for _ in range(options.rounds):
        for cut in seconds:
            if engine.cut != cut:
                engine, _ = resize(engine, config, kept, cut)
            seconds[cut].append(round_seconds(engine, config, options.steps))
    if comm.is_main():
        medians, cpu = (
            {cut: statistics.median(times[kind] for times in rounds) for cut, rounds in seconds.items()}
            for kind in (0, 1)
        )
        lengths = {cut: schedule_length(stage_costs(costs, pruned, cut), options.accumulation) for cut in seconds}
        found = compared(pruned, costs, new, old) | {
            "throughput_gain": round(medians[old] / medians[new], 3),
            "throughput_gain_computed": round(lengths[old] / lengths[new], 3),
            "throughput_gain_cpu": round(cpu[old] / cpu[new], 3),
            "step_seconds": {"no_recut": round(medians[old], 3), "recut": round(medians[new], 3)},
            "step_cpu_seconds_of_slowest_rank": {"no_recut": round(cpu[old], 3), "recut": round(cpu[new], 3)},
            "layer_milliseconds": {n: round(getattr(costs, n) / 1e6, 2) for n in ("stem", "block", "head")},
            "four_stages_computed": four_stages(config, replace(model, depth=28), costs, options.accumulation),
        }
        Path(options.out).write_text(json.dumps(found))
    comm.shutdown()


def round_seconds(engine: Any, config: Any, steps: int) -> tuple[float, float]:
    """Seconds of one step, over several after one to warm up, and CPU seconds of the rank that works most."""
    import torch

    from entprune_ds import comm
    from entprune_ds.diffusion.objective import FlowObjective
    from entprune_ds.engine.train_step import train_step

    objective, m, batch = FlowObjective(), config.model, config.train.global_batch_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, m.in_channels, m.input_size, m.input_size, generator=generator)
    labels = torch.randint(m.num_classes, (batch,), generator=generator)
    draws = objective.make_draws(latents, labels, range(batch), seed=0, purpose="train", step=0)
    micro_batches = draws.split(config.train.micro_batch_size)
    train_step(engine, micro_batches, objective.loss)
    comm.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        train_step(engine, micro_batches, objective.loss)
    cpu = time.process_time() - cpu
    comm.barrier()
    seconds = time.perf_counter() - start
    return seconds / steps, max(comm.all_gather_json(cpu)) / steps


def four_stages(config: Any, model: Any, costs: Any, micro_batches: int) -> dict[str, Any]:
    """28 blocks, 7 a stage; 5 of the second stage and 3 of the last go. Nothing is run."""
    from entprune_ds.engine.balance import cut_by_cost, stage_costs

    gone, old = {7, 8, 9, 10, 11, 25, 26, 27}, (7, 2, 7, 4)
    kept = tuple(b for b in range(28) if b not in gone)
    stage_of = {b: b // 7 for b in kept}
    model = model.keeping(kept)
    new = cut_by_cost(config, model, 4, 1, costs, stage_of)
    lengths = {cut: schedule_length(stage_costs(costs, model, cut), micro_batches) for cut in (old, new)}
    return compared(model, costs, new, old) | {
        "stage_milliseconds": [round(cost / 1e6, 2) for cost in stage_costs(costs, model, new)],
        "schedule_milliseconds": {"no_recut": round(lengths[old] / 1e6), "recut": round(lengths[new] / 1e6)},
        "throughput_gain": round(lengths[old] / lengths[new], 3),
    }


def compared(model: Any, costs: Any, new: tuple, old: tuple) -> dict[str, Any]:
    """Imbalance of the new cut, of the best there is, of DeepSpeed's and of the old one, with the cuts."""
    from deepspeed.runtime.utils import partition_balanced

    from entprune_ds.engine.balance import layer_parameters, stage_costs

    layers, stages = costs.of_layers(model), len(new)
    mean = sum(layers) / stages

    def imbalance(bounds: list[int]) -> float:
        return round(max(sum(layers[a:b]) for a, b in pairwise(bounds)) / mean, 3)

    weights = layer_parameters(model)
    by_parameters = [int(bound) for bound in partition_balanced(weights=weights, num_parts=stages)]
    every = ([0, *inner, len(layers)] for inner in combinations(range(1, len(layers)), stages - 1))
    return {
        "imbalance": round(max(stage_costs(costs, model, new)) / mean, 3),
        "optimum": min(map(imbalance, every)),
        "by_parameters": imbalance(by_parameters),
        "no_recut": round(max(stage_costs(costs, model, old)) / mean, 3),
        "blocks_per_stage": {"recut": new, "no_recut": old},
        "layers_per_stage_by_parameters": [b - a for a, b in pairwise(by_parameters)],
    }


def schedule_length(costs: list[int], micro_batches: int) -> float:
    """Time of a step under DeepSpeed's 1F1B schedule, traffic apart: a third of a stage's cost is its forward pass."""
    from deepspeed.runtime.pipe import schedule

    kinds, stages = (schedule.ForwardPass, schedule.BackwardPass), len(costs)
    orders = []
    for stage, cost in enumerate(costs):
        steps = schedule.TrainSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
        passes = [type(command) for step in steps for command in step if isinstance(command, kinds)]
        numbered = [(kind, passes[:place].count(kind)) for place, kind in enumerate(passes)]
        orders.append([(kind, number, cost / 3 if kind is kinds[0] else cost * 2 / 3) for kind, number in numbered])
    done: dict[tuple[int, type, int], float] = {}
    clocks, places = [0.0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                kind, number, cost = order[places[stage]]
                before = stage - 1 if kind is kinds[0] else stage + 1  # whose pass this one waits for
                if 0 <= before < stages and (before, kind, number) not in done:
                    break
                clocks[stage] = max(clocks[stage], done.get((before, kind, number), 0.0)) + cost
                done[stage, kind, number] = clocks[stage]
                places[stage] += 1
    return max(clocks)


if __name__ == "__main__":
    sys.exit(main())
