"""The parts of a pruning check in training steps, for tools/bench_sweep.py."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tools.brute_force import random_draws

DEFAULT_DRAWS, CHECKS, RUN_STEPS = 1024, 4, 100_000


def clock(call: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of the slowest rank. Collective."""
    from entprune_ds import comm

    comm.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    mine = [time.perf_counter() - wall, time.process_time() - cpu]
    slowest = [max(seconds) for seconds in zip(*comm.all_gather_json(mine), strict=True)]
    return slowest[0], slowest[1]


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median wall-clock and CPU seconds of each call, taken in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in calls if turn % 2 else reversed(calls):
            found[name].append(clock(calls[name]))
    return {n: (statistics.median(w for w, _ in f), statistics.median(c for _, c in f)) for n, f in found.items()}


def timed_parts(names: Sequence[str], check: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """Seconds of functions of a check while it runs, and of the whole. Collective."""
    from entprune_ds import coordinator, ranking

    spent = {name: [0.0, 0.0] for name in names}
    rooms = {name: ranking if name in vars(ranking) else coordinator for name in names}
    originals = {name: vars(room)[name] for name, room in rooms.items()}

    def timing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return originals[name](*args, **kwargs)
            finally:
                spent[name][0] += time.perf_counter() - wall
                spent[name][1] += time.process_time() - cpu

        return call

    try:
        for name in names:
            setattr(rooms[name], name, timing(name))
        whole = clock(check)
    finally:
        for name in names:
            setattr(rooms[name], name, originals[name])
    return {name: (s[0], s[1]) for name, s in spent.items()} | {"whole": whole}


def cost_of_a_check(engine: Any, model: nn.Module, config: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The parts of a check in training steps, and the sweep over its floor."""
    from entprune_ds import comm, coordinator, ranking
    from entprune_ds.diffusion.objective import build_objective
    from entprune_ds.engine.train_step import train_step
    from entprune_ds.engine.view import ShardedView

    objective, half = build_objective(config.model, config.diffusion), options.batch // 2
    _, latents = random_draws(config, half, seed=2 + comm.rank())
    labels, slots = torch.zeros(half, dtype=torch.int64), range(comm.rank() * half, (comm.rank() + 1) * half)
    micro = objective.make_draws(latents, labels, slots, seed=0, purpose="bench", step=0).split(
        engine.ds.train_micro_batch_size_per_gpu()
    )
    share, _ = random_draws(config, options.check_draws // 4, seed=4)  # of one of two batches, on one of two ranks

    @torch.no_grad()
    def forwards() -> None:
        for _ in range(2):
            model(*share)

    def examples(purpose: str, count: int) -> tuple[Tensor, Tensor]:
        (_, _, of_count), data = random_draws(config, count, seed=3)
        return data, of_count

    def sweep() -> object:
        m = ranking.measuring(ShardedView(engine), engine.kept_blocks, config, 0, examples)
        return ranking.measure_sweep(m, entropy_needed=True)

    def check() -> object:
        view = ShardedView(engine)
        return coordinator.run_check(view, engine.kept_blocks, config, 0, 0, len(config.model.blocks), examples)

    names = ("measure_sweep", "ntk_score", "zico_score")

    def step() -> object:
        return train_step(engine, micro, objective.loss)

    clock(step)  # to warm up
    calls: dict[str, Callable[[], object]] = {"step": step, "forwards": forwards, "sweep": sweep}
    medians = interleaved(calls, options.repeats)
    wall, cpu = ({name: seconds[kind] for name, seconds in medians.items()} for kind in (0, 1))
    scaled, once = DEFAULT_DRAWS / options.check_draws, {n: s[0] for n, s in timed_parts(names, check).items()}
    agreeing = once["whole"] - sum(once[name] for name in names)
    parts = {"sweep": wall["sweep"] * scaled, "ntk": once["ntk_score"], "zico": once["zico_score"]}
    steps = {name: seconds / wall["step"] for name, seconds in (parts | {"agreeing": agreeing}).items()}
    total, floor = sum(steps.values()), (config.model.depth + 1) / 2
    return {
        "check_in_steps": steps | {"total": total}, "share_of_100k_steps": CHECKS * total / RUN_STEPS,
        "ced_over_floor": wall["sweep"] / (floor * wall["forwards"]),
        "ced_over_floor_cpu": cpu["sweep"] / (floor * cpu["forwards"]),
        "floor_in_steps": floor * wall["forwards"] * scaled / wall["step"],
        "step_seconds": wall["step"], "check_seconds": once["whole"],
    }  # fmt: skip
