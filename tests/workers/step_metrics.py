"""Worker functions of test_step_metrics.py."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from entprune_ds import comm
from entprune_ds.diffusion.objective import build_objective
from entprune_ds.engine.block_norms import block_norms
from entprune_ds.engine.build import build_engine, destroy_engine, initialize_fresh
from entprune_ds.engine.train_step import train_step
from entprune_ds.engine.view import ShardedView
from tests.tiny import tiny_config, tiny_draws


def norms(cases: list[tuple[str, int]]) -> list[dict]:
    """Norms after two steps on each topology (ds_config, stages); the batch is the same everywhere."""
    found = []
    for name, stages in cases:
        config = tiny_config()
        config = replace(config, parallel=replace(config.parallel, ds_config=name, pipe_stages=stages))
        config = replace(config, train=replace(config.train, micro_batch_size=4))
        engine = build_engine(config, config.model)
        initialize_fresh(engine, config.run.seed)
        objective = build_objective(config.model, config.diffusion)
        for step in range(2):
            draws = tiny_draws(config, step, engine.dp_rank, engine.dp_size).split(4)
            train_step(engine, draws, objective.loss)
            engine.update_ema(0.9)
        batch = tiny_draws(config, 99, 0, 1)
        found.append({str(b): list(values) for b, values in block_norms(ShardedView(engine), batch).items()})
        destroy_engine(engine)
    return found


def gradient_norms(cases: list[tuple[str, int]]) -> list[list[float | None]]:
    """Gradient norm of two steps on each topology (ds_config, stages), as it is logged, at two micro-batches a step."""
    found = []
    for name, stages in cases:
        config = tiny_config()
        config = replace(config, parallel=replace(config.parallel, ds_config=name, pipe_stages=stages))
        size = config.train.global_batch_size * stages // comm.world_size() // 2
        config = replace(config, train=replace(config.train, micro_batch_size=size))
        engine = build_engine(config, config.model)
        initialize_fresh(engine, config.run.seed)
        objective = build_objective(config.model, config.diffusion)
        norms = []
        for step in range(2):
            draws = tiny_draws(config, step, engine.dp_rank, engine.dp_size).split(size)
            train_step(engine, draws, objective.loss)
            norm = engine.ds.get_global_grad_norm()
            norms.append(None if norm is None else float(norm))
        found.append(norms)
        destroy_engine(engine)
    return found


def split(cases: list[tuple[str, int, int]], late: float) -> list[dict]:
    """Parts of three steps after a warm-up on each topology (ds_config, stages, micro-batches); rank 1 comes late."""
    found = []
    for name, stages, micro_batches in cases:
        config = tiny_config()
        config = replace(config, parallel=replace(config.parallel, ds_config=name, pipe_stages=stages))
        size = config.train.global_batch_size * stages // comm.world_size() // micro_batches
        config = replace(config, train=replace(config.train, micro_batch_size=size))
        engine = build_engine(config, config.model)
        initialize_fresh(engine, config.run.seed)
        objective = build_objective(config.model, config.diffusion)
        for step in range(4):
            if step == 1:
                comm.barrier()
                engine.parts.restart()
            with engine.parts.part("data"):
                draws = tiny_draws(config, step, engine.dp_rank, engine.dp_size).split(size)
            if comm.rank() == 1:
                time.sleep(late)
            train_step(engine, draws, objective.loss)
            engine.update_ema(0.9)
        seconds, parts = engine.parts.take()
        found.append({"seconds": seconds, "parts": parts})
        destroy_engine(engine)
    return found


def train(folder: str, runs: list[list[str]]) -> list[int]:
    """Trainings one after the other, with the working folder somewhere harmless."""
    from entprune_ds.cli.train import main

    Path(folder).mkdir(exist_ok=True)
    return [main(words) for words in runs]
