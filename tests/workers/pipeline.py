"""Worker functions of test_pipeline.py: run on every rank by tests.ranks."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from entprune_ds.config import Config, config_from_dict
from entprune_ds.diffusion.objective import FlowObjective
from entprune_ds.engine.build import Engine, build_engine, destroy_engine, initialize_fresh
from entprune_ds.engine.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from entprune_ds.engine.resize import resize
from entprune_ds.engine.train_step import train_step
from entprune_ds.engine.view import gather_full
from entprune_ds.monitor.interface import NullMonitor
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.run_state import Run, open_stream, saved_cut, stream_state
from tests.tiny import tiny_config, tiny_draws
from tests.workers.resize import (
    STEPS_AFTER,
    STEPS_BEFORE,
    change_settings,
    fill,
    gathered_ema,
    public_state,
    settings,
)

GRAD_CLIP = 0.05


def pipe_config(zero_stage: int, dtype: str, stages: int, **model: object) -> Config:
    """The tiny config as a pipeline: micro-batches of 2 of a global batch of 8, clipping active in every step."""
    config = tiny_config(zero_stage, dtype, **model)
    train = replace(config.train, grad_clip=GRAD_CLIP, micro_batch_size=2)
    return replace(config, train=train, parallel=replace(config.parallel, pipe_stages=stages))


def train_steps(engine: Engine, config: Config, first: int, count: int) -> list[str]:
    """Train some steps; returns the losses of this data-parallel rank as exact hexadecimal text."""
    losses = []
    for step in range(first, first + count):
        draws = tiny_draws(config, step, engine.dp_rank, engine.dp_size)
        micro_batches = draws.split(engine.ds.train_micro_batch_size_per_gpu()) if engine.reads_data else []
        loss, _ = train_step(engine, micro_batches, FlowObjective().loss)
        engine.update_ema(config.train.ema_decay)
        losses.append(loss.item().hex())
    return losses


def save_state(engine: Engine, folder: str, name: str) -> None:
    """Write the state of this stage, as DeepSpeed's public calls give it."""
    state = public_state(engine)
    Path(folder, name).mkdir(exist_ok=True)
    if engine.dp_rank == 0:
        save_file(state, Path(folder, name, f"stage_{engine.pipe_stage}.safetensors"))
    dist.barrier()


def load_state(folder: str | Path, name: str) -> dict[str, torch.Tensor]:
    """The state of all stages."""
    files = sorted(Path(folder, name).glob("stage_*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def live(folder: str, zero_stage: int, dtype: str, cuts: list[list[int]], removals: list[list[int]]) -> dict:
    """Train, write the state by public calls, resize with the next cut (several times), go on for 20 steps."""
    config = pipe_config(zero_stage, dtype, len(cuts[0]))
    engine = build_engine(config, config.model, tuple(cuts[0]))
    initialize_fresh(engine, config.run.seed)
    before, traffic, ema_kept, settings_kept = [], [], True, True
    for kept, cut in zip(removals, cuts[1:], strict=True):
        before += train_steps(engine, config, len(before), STEPS_BEFORE)
        change_settings(engine.optimizer)
        ema, set_before = gathered_ema(engine), settings(engine)
        save_state(engine, folder, "before")
        engine, report = resize(engine, config, tuple(kept), tuple(cut))
        traffic.append([report.bytes_state, report.bytes_minimum])
        after = gathered_ema(engine)
        ema_kept &= all(torch.equal(ema[n], after[n]) for n in after) and engine.ema_count == 0
        settings_kept &= settings(engine) == set_before
    losses = train_steps(engine, config, len(before), STEPS_AFTER)
    save_state(engine, folder, "live")
    found = {"before": before, "after": losses, "traffic": traffic, "held": sum(p.numel for p in engine.pieces)}
    return found | {"ema_kept": ema_kept, "settings_kept": settings_kept}


def fresh(folder: str, zero_stage: int, dtype: str, cut: list[int], kept_blocks: list[int], steps: int,
          mutations: list[str]) -> dict:  # fmt: skip
    """Another launch: build the pruned depth with that cut, set its state, train 20 steps; once per mutation."""
    config, losses = pipe_config(zero_stage, dtype, len(cut)), {}
    for mutation in mutations:
        engine = build_engine(config, replace(config.model, kept_blocks=tuple(kept_blocks)), tuple(cut))
        change_settings(engine.optimizer)
        fill(engine, load_state(folder, "before"), steps, mutation)
        losses[mutation] = train_steps(engine, config, steps, STEPS_AFTER)
        save_state(engine, folder, f"fresh_{mutation}")
        destroy_engine(engine)
    return losses


def trained(folder: str, zero_stage: int, stages: int, steps: int) -> dict:
    """Train with activation checkpointing; then take the pipeline apart ten times, with counts of what is alive."""
    config = pipe_config(zero_stage, "fp32", stages, activation_checkpointing=True)
    groups = len(dist.distributed_c10d._world.pg_map)
    engine = build_engine(config, config.model)
    initialize_fresh(engine, config.run.seed)
    losses = train_steps(engine, config, 0, steps)
    weights = {n: gather_full(engine, [n], "weight")[n].cpu() for n in engine.shapes}
    if dist.get_rank() == 0:
        save_file(weights, Path(folder, "weights.safetensors"))
    counts, traffic, first_cut = [], [], engine.cut
    for cycle in range(10):
        cut = [(1, 3), (2, 2)][cycle % 2] if first_cut == (2, 2) else [(2, 2), first_cut][cycle % 2]
        engine, report = resize(engine, config, engine.kept_blocks, cut)
        traffic.append([report.bytes_state, report.bytes_minimum])
        train_steps(engine, config, steps + cycle, 1)
        counts.append(_alive())
    destroy_engine(engine)
    del engine
    return {"losses": losses, "counts": counts, "traffic": traffic, "groups": groups, "left": _alive()}


def _alive() -> dict[str, int]:
    """Counts of everything that a rebuild could leave behind in this process, and its resident memory."""
    gc.collect()
    objects = gc.get_objects()
    names = [type(o).__name__ for o in objects]
    modules = [o for o in objects if isinstance(o, torch.nn.Module)]
    parameters = [o for o in objects if isinstance(o, torch.nn.Parameter)]
    of_modules = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_parameters = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return {
        "groups": len(dist.distributed_c10d._world.pg_map),
        "engines": names.count("PipelineEngine"),
        "models": names.count("StagedDiT"),
        "grids": names.count("PipelineParallelGrid"),
        "parameters": len(parameters),
        "module_hooks": sum(len(getattr(m, kind)) for m in modules for kind in of_modules),
        "parameter_hooks": sum(len(getattr(p, kind) or ()) for p in parameters for kind in of_parameters),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "rss": psutil.Process().memory_info().rss,
    }


def carry(source: str, out: str, zero_stage: int, stages: int) -> list[int] | None:
    """Resume the checkpoint of a training on this topology and save it again; returns the cut."""
    found = read_checkpoint(Path(source))
    record = found.manifest["record"]
    config = config_from_dict(record["config"])
    parallel = replace(config.parallel, ds_config=f"zero{zero_stage}_fp32", zero_stage=None, pipe_stages=stages)
    config = replace(config, parallel=parallel)
    model = replace(config.model, kept_blocks=found.kept_blocks)
    engine = build_engine(config, model, *saved_cut(config, found))
    load_checkpoint(engine, found)
    decisions = [PruneDecision.from_json(d) for d in record["decisions"]]
    run = Run(config, engine, open_stream(config, engine), NullMonitor(), found.step, decisions)
    run.stream.load_state(record["stream"])
    record |= {"stream": stream_state(run), "decisions": [d.to_json() for d in run.decisions]}
    save_checkpoint(engine, Path(out), run.step, record)
    run.stream.close()
    return None if engine.cut is None else list(engine.cut)


def options(**model: bool) -> dict:
    """Losses around a resize with options of the blocks switched on, and the numbers of compiled graphs."""
    from torch._dynamo.utils import counters

    config = pipe_config(1, "fp32", 2, **model)
    engine = build_engine(config, config.model, (2, 2))
    initialize_fresh(engine, config.run.seed)
    losses = train_steps(engine, config, 0, 3)
    graphs = [counters["stats"]["unique_graphs"]]
    engine, _ = resize(engine, config, (0, 2, 3))
    losses += train_steps(engine, config, 3, 3)
    return {"losses": losses, "graphs": [*graphs, counters["stats"]["unique_graphs"]]}
