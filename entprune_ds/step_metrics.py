"""Metrics of the training step beside the loss: where its time goes, how well the devices are used, what blocks do."""

from __future__ import annotations

import socket

import torch

from entprune_ds import comm
from entprune_ds.data.stream import Stream
from entprune_ds.diffusion.objective import Draws
from entprune_ds.engine.block_norms import block_norms
from entprune_ds.engine.device_use import memory, peak_tflops, step_flops
from entprune_ds.engine.step_parts import PARTS
from entprune_ds.engine.view import ShardedView
from entprune_ds.logs import get_logger
from entprune_ds.run_state import Run
from entprune_ds.slow_ranks import due, find_slow, rank_times, summary

log = get_logger()

BLOCK_EXAMPLES = 16
"""Examples of the fixed batch that block norms are measured on."""
ALWAYS_SHOWN = ("data", "forward", "backward", "optimizer", "communication")


def step_values(run: Run) -> dict[str, float]:
    """train/ values since the last log: throughput, time split, MFU, memory, bubble share, slow ranks. Collective.

    Times are means over steps, those of parts over ranks too; memory is that of the rank that has most.
    train/seconds_other is the rest: logging, validation, checkpoints and samples between the steps, and Python.
    """
    config, engine = run.config, run.engine
    seconds, parts = engine.parts.take()
    busy = sum(value for name, value in parts.items() if name != "hidden")
    used = memory()
    mine = [*parts.values(), seconds - busy, *used.values()]
    every = torch.stack(comm.all_gather(torch.tensor(mine, dtype=torch.float64, device=comm.device())))  # (ranks, K)
    means = dict(zip((*PARTS, "other"), every.mean(dim=0).tolist(), strict=False))
    values = {"train/step_seconds": seconds, "train/examples_per_second": config.train.global_batch_size / seconds}
    values |= {f"train/seconds_{n}": v for n, v in means.items() if n in (*ALWAYS_SHOWN, "other") or v > 0}
    values |= dict(zip(used, every[:, -len(used) :].amax(dim=0).tolist(), strict=True))
    if engine.cut is not None:  # the reduction of gradients among replicas is in it
        whole = sum(value for name, value in means.items() if name not in ("hidden", "other"))
        values["train/bubble_share"] = means["communication"] / whole if whole > 0 else 0.0
    if due(run.step, config.monitor.log_every, config.monitor.slow_every):
        hosts = comm.all_gather_json(socket.gethostname())
        times = rank_times(hosts, [dict(zip(PARTS, row, strict=False)) for row in every.tolist()])
        values |= summary(times)
        for text in find_slow(times, config.monitor.slow_factor).values():
            log.warning("step %d: %s", run.step, text)
    peak = peak_tflops(config.monitor.peak_tflops, engine.dtype)
    if peak is not None:
        flops = step_flops(engine.model_config, config.train.global_batch_size)
        values["train/mfu"] = flops / (seconds * peak * 1e12 * comm.world_size())
    return values


def log_blocks(run: Run) -> None:
    """Log the norms of every block on a fixed batch, where monitor.blocks_every asks for it now. Collective, inert."""
    every = run.config.monitor.blocks_every
    if not every or run.step % every:
        return
    if run.fixed_batch is None:
        run.fixed_batch = fixed_batch(run)
    found = block_norms(ShardedView(run.engine), run.fixed_batch)
    values = {f"train/{name}/block_{b:02d}": v for b, norms in found.items() for name, v in norms._asdict().items()}
    run.monitor.log(run.step, values)


def fixed_batch(run: Run) -> Draws:
    """Examples with noise and t that stay the same for the whole run, on any number of ranks.

    Raises:
        RankError: the shards cannot be read.
    """
    config = run.config
    try:
        stream = Stream(
            config.data.shards, seed=config.run.seed, num_readers=1, shuffle_buffer=BLOCK_EXAMPLES,
            global_batch_size=BLOCK_EXAMPLES, purpose="monitor", latent_scale=config.data.latent_scale,
            max_skipped=config.data.max_skipped, allow_pipe=config.data.allow_pipe,
        )  # fmt: skip
        batch = stream.next_batch()
    except (ValueError, OSError) as problem:
        raise comm.RankError(f"monitor.blocks_every: {problem}") from problem
    return run.objective.make_draws(
        batch.latents, batch.labels, batch.slots, seed=config.run.seed, purpose="monitor", step=0
    )
