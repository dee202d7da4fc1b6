"""How long a comparison will take: from what a step and a sample cost on this machine, and from rows that are done."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from entprune_ds.cli.compare_plan import Row, removals, row_config
from entprune_ds.config import Config, ModelConfig
from entprune_ds.importance.criteria import CRITERIA
from entprune_ds.models.dit import DiT

START_SECONDS, LEG_SECONDS, FIGURES_SECONDS, WORKER_SECONDS = 1.0, 1.0, 2.5, 20.0
"""Of a row besides steps and samples: latency and cleaning up, each call of the trainer, FID and KID; of a worker."""
REPEATS = 2


@dataclass(frozen=True)
class Pace:
    """Seconds on one thread of this machine."""

    step: Callable[[int], float]
    """Of a training step at a depth."""
    sample: float
    """Of the samples of one evaluation at the target depth, with one sampler step."""
    score: float
    """Of one sweep over score.draws of the base."""


def measure_pace(config: Config, model: ModelConfig) -> Pace:
    """Time a few steps and passes, one thread, a second or two in all."""
    target, depth = config.prune.target_depth or 1, len(model.blocks)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shallow, deep = model.keeping(model.blocks[:target]), model.keeping(model.blocks)
        batch = min(config.train.global_batch_size, 64)
        low, high = (_seconds(net, batch, backward=True) / batch for net in (shallow, deep))
        forward = _seconds(shallow, batch, backward=False) / batch
    finally:
        torch.set_num_threads(before)
    per_block = (high - low) / max(1, depth - target)
    examples = config.train.global_batch_size

    def step(at: int) -> float:
        return examples * (low + (at - target) * per_block)

    sweep = config.score.draws * depth * (depth + 1) / 2 * forward / target
    return Pace(step, config.sample.num_samples * forward, sweep)


def row_seconds(config: Config, row: Row, model: ModelConfig, pace: Pace) -> float:
    """Rough seconds of a row; a criterion that measures something of its own is taken to cost one sweep."""
    compare, settings = config.compare, row_config(config, row, model, Path(config.compare.out))
    checks = removals(settings)
    stops = {compare.recovery_steps} | ({compare.long_steps} if row.long else set())
    evaluations = len(stops) + compare.equal_compute
    legs = evaluations + compare.equal_compute + (1 if row.probes else 0)
    depth, target = len(model.blocks), row.target_depth
    phase = checks[-1]
    steps = phase * pace.step((depth + target) // 2) + (max(stops) - phase) * pace.step(target)
    if settings.distill.kind != "none":
        steps += max(stops) * pace.step(depth) / 3  # the teacher's forward passes
    criterion = CRITERIA.get(settings.prune.criterion)
    scored = criterion is None or criterion.needs_sweep or criterion.measure is not None
    passes = evaluations * settings.sample.num_steps + sum(row.samplings)
    seconds = START_SECONDS + legs * LEG_SECONDS + steps + scored * len(checks) * pace.score
    return seconds + passes * pace.sample * target / (config.prune.target_depth or 1) + evaluations * FIGURES_SECONDS


def _seconds(m: ModelConfig, batch: int, backward: bool) -> float:
    """CPU seconds of one pass of a batch, the fastest of some: as on a machine that has nothing else to do."""
    net = DiT(m)
    z_t, t = torch.zeros(batch, m.in_channels, m.input_size, m.input_size), torch.zeros(batch)
    labels, times = torch.zeros(batch, dtype=torch.int64), []
    for _ in range(REPEATS + 1):
        begin = time.process_time()
        with torch.set_grad_enabled(backward):
            out = net(z_t, t, labels)
            if backward:
                out.square().mean().backward()
        times.append(time.process_time() - begin)
    return min(times)


def correction(done: Sequence[tuple[float, float]]) -> float:
    """Factor of the estimates that finished rows, (estimated, taken) seconds, suggest; 1 without any."""
    return statistics.median(taken / estimated for estimated, taken in done) if done else 1.0
