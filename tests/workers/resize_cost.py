"""Worker functions of test_resize_cost.py: run on every rank by tests.ranks."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from entprune_ds import comm
from entprune_ds.engine.build import build_engine, initialize_fresh
from entprune_ds.engine.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from entprune_ds.engine.resize import resize
from entprune_ds.engine.view import ShardedView
from entprune_ds.models.dit import DiT
from entprune_ds.pruning.surgery import Narrowing
from tests.tiny import tiny_config, tiny_draws
from tests.workers.resize import train_steps

DEPTH = 28


def ten_resizes(zero_stage: int, dtype: str) -> list[dict]:
    """What is alive after each of ten removals in one process."""
    config = tiny_config(zero_stage, dtype, depth=DEPTH, hidden_size=32)
    engine = build_engine(config, config.model)
    initialize_fresh(engine, 0)
    found = []
    for cycle in range(10):
        train_steps(engine, config, cycle, 1)
        engine, _ = resize(engine, config, engine.kept_blocks[:-1])
        train_steps(engine, config, cycle, 1)
        found.append(alive(engine))
    return found


def alive(engine) -> dict:
    """Counts of everything that a resize could leave behind."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    gc.collect()
    objects = gc.get_objects()
    root = engine.ds.module
    hooks = (root._forward_hooks, root._forward_pre_hooks, root._backward_hooks, root._backward_pre_hooks)
    return {
        "engines": sum(isinstance(o, DeepSpeedEngine) for o in objects),
        "old_parameters": sum(isinstance(o, torch.nn.Parameter) for o in objects) - len(engine.shapes),
        "models": sum(isinstance(o, DiT) for o in objects),
        "root_hooks": sum(len(h) for h in hooks),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "python_threads": threading.active_count(),
        "rss": psutil.Process().memory_info().rss,
    }


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and where it came from."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.where = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta" and leaf.numel() > self.numel:
                self.numel, self.where = leaf.numel(), str(func)
        return out


def largest(zero_stage: int, ds_config: str, folder: str) -> dict:
    """Largest tensor in a resize, a block-wise sweep, a checkpoint and its loading; sizes to compare it with."""
    from dataclasses import replace

    config = tiny_config(zero_stage, depth=12, hidden_size=64)
    config = replace(config, parallel=replace(config.parallel, ds_config=ds_config))
    engine = build_engine(config, config.model)
    initialize_fresh(engine, 0)
    train_steps(engine, config, 0, 1)
    found, before = {}, engine.layout
    with Largest() as seen:
        narrow = {5: Narrowing(heads=(1,), channels=tuple(range(0, 256, 3)))}
        engine, _ = resize(engine, config, engine.kept_blocks[2:], narrow=narrow)
    found["resize"] = [seen.numel, seen.where]
    whole = sum(torch.Size(s).numel() for s in engine.shapes.values())
    first = engine.kept_blocks[0]
    block = sum(torch.Size(s).numel() for n, s in engine.shapes.items() if n.startswith(f"blocks.{first}."))
    with Largest() as seen:
        draws = tiny_draws(config, 0, comm.rank(), comm.world_size())
        ShardedView(engine)(draws.z_t, draws.t, draws.labels)
    found["score"] = [seen.numel, seen.where]
    with Largest() as seen:
        path = save_checkpoint(engine, Path(folder), 1, {})
    found["save"] = [seen.numel, seen.where]
    with Largest() as seen:
        load_checkpoint(engine, read_checkpoint(path))
    found["load"] = [seen.numel, seen.where]
    partition, old = (max(sum(r[2] - r[1] for r in ranges) for ranges in side) for side in (engine.layout, before))
    return {"found": found, "whole": whole, "block": block, "partition": partition, "old": old}
