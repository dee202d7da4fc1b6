"""Worker functions of test_resize_cost.py: run on every rank by tests.ranks."""

from __future__ import annotations

import gc
import math
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import entprune_ds.engine.build as build_module
import entprune_ds.engine.resize as resize_module
from entprune_ds.config import Config
from entprune_ds.coordinator import run_check
from entprune_ds.engine.build import Engine, build_engine, destroy_engine, initialize_fresh
from entprune_ds.engine.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from entprune_ds.engine.resize import names_after, resize
from entprune_ds.engine.state import KEYS, state_tensor
from entprune_ds.engine.view import ShardedView
from entprune_ds.models.dit import DiT
from entprune_ds.pruning.surgery import Narrowing
from entprune_ds.rng import generator_for
from tests.tiny import tiny_config
from tests.workers.pipeline import train_steps

DEPTH = 28


def ten_resizes(zero_stage: int, dtype: str) -> list[dict]:
    """What is alive after each of ten removals in one process; the state is a tenth of what the process holds."""
    config = tiny_config(zero_stage, dtype, depth=DEPTH, hidden_size=128)
    engine = build_engine(config, config.model)
    initialize_fresh(engine, 0)
    found = []
    for cycle in range(10):
        train_steps(engine, config, cycle, 1)
        engine, _ = resize(engine, config, engine.kept_blocks[:-1])
        train_steps(engine, config, cycle, 1)
        found.append(alive(engine))
    return found


def alive(engine: Engine) -> dict:
    """Counts of everything that a resize could leave behind."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    gc.collect()
    objects = gc.get_objects()
    tensors = {t.untyped_storage()._cdata: t for t in objects if isinstance(t, torch.Tensor)}
    return {
        "engines": sum(isinstance(o, DeepSpeedEngine) for o in objects),
        "old_parameters": sum(isinstance(o, torch.nn.Parameter) for o in objects) - len(engine.shapes),
        "models": sum(isinstance(o, DiT) for o in objects),
        "hooks": hooks(engine.ds.module),
        "groups": len(dist.distributed_c10d._world.pg_map),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "python_threads": threading.active_count(),
        "rss": psutil.Process().memory_info().rss,
        "tensors": sum(t.untyped_storage().nbytes() for t in tensors.values()),
        "parameters": sum(math.prod(s) for s in engine.shapes.values()),
    }


def hooks(root: torch.nn.Module) -> list:
    """Hooks of every module and parameter; blocks that have the same are one line."""
    counts = {
        (re.sub(r"^blocks\.\d+", "block", name), kind, len(of_kind))
        for name, owner in [*root.named_modules(), *root.named_parameters()]
        for kind in dir(owner)
        if kind.endswith("_hooks") and hasattr(of_kind := getattr(owner, kind), "__len__") and len(of_kind)
    }
    return sorted(map(list, counts))


class Made(TorchDispatchMode, ABC):
    """Tells `note` of every tensor that an operation makes; one that shares memory with what it was given is none."""

    part = "resize"
    """What is going on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in tree_leaves(out):
            real = isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"
            if real and leaf.untyped_storage()._cdata not in given:
                self.note(leaf, str(func))
        return out

    @abstractmethod
    def note(self, tensor: torch.Tensor, where: str) -> None:
        """Take a tensor into account, and the operation that made it."""

    def named(self, module: Any, name: str, part: str) -> AbstractContextManager:
        """While this lasts, what a function of a module does is a part of its own."""
        function: Callable = getattr(module, name)

        def in_part(*args: Any, **kwargs: Any) -> Any:
            outer, self.part = self.part, part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = outer

        return mock.patch.object(module, name, in_part)


class Largest(Made):
    """By part, elements of the largest tensors and the operations that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, list] = defaultdict(list)

    def note(self, tensor, where):
        self.made[self.part] = sorted([*self.made[self.part], [tensor.numel(), where]], reverse=True)[:5]


def topology(zero_stage: int, pipe_stages: int, ds_config: str, **model: object) -> Config:
    """The tiny config with another model and DeepSpeed configuration."""
    config = tiny_config(zero_stage, **model)
    return replace(config, parallel=replace(config.parallel, ds_config=ds_config, pipe_stages=pipe_stages))


def largest(zero_stage: int, pipe_stages: int, ds_config: str, folder: str) -> dict:
    """Largest tensors in a resize, a pruning check, a checkpoint and its loading; sizes to compare them with."""
    config = topology(zero_stage, pipe_stages, ds_config, depth=12, hidden_size=64)
    prune = replace(config.prune, target_depth=9, num_checks=1, criterion="loss")
    prune = replace(prune, ntk_samples=2, ntk_repeats=2, zico_batches=4, zico_batch_size=2)
    config = replace(config, prune=prune, score=replace(config.score, draws=16, batch_size=8))
    engine = build_engine(config, config.model)
    initialize_fresh(engine, 0)
    train_steps(engine, config, 0, 1)
    seen, before = Largest(), engine.layout
    with seen, seen.named(resize_module, "build_engine", "build"):
        narrow = {5: Narrowing(heads=(1,), channels=tuple(range(0, 256, 3)))}
        engine, _ = resize(engine, config, engine.kept_blocks[2:], narrow=narrow)
    train_steps(engine, config, 1, 1)
    seen.part = "score"
    with seen:
        decision, _ = run_check(ShardedView(engine), engine.kept_blocks, config, 0, 1, 10, examples_of(config))
    seen.part = "save"
    with seen:
        path = save_checkpoint(engine, Path(folder), 1, {})
    seen.part = "load"
    with seen:
        load_checkpoint(engine, read_checkpoint(path))
    block = sum(math.prod(s) for n, s in engine.shapes.items() if n.startswith(f"blocks.{engine.kept_blocks[0]}."))
    partition, old = (max(sum(r[2] - r[1] for r in ranges) for ranges in side) for side in (engine.layout, before))
    return {
        "made": seen.made, "whole": sum(math.prod(s) for s in engine.shapes.values()), "block": block,
        "partition": partition, "old": old, "replica": sum(p.numel() for p in engine.ds.module.parameters()),
        "dropped": len(decision.dropped),
    }  # fmt: skip


def examples_of(config: Config) -> Callable[[str, int], tuple[torch.Tensor, torch.Tensor]]:
    """Synthetic calibration examples, equal on all ranks."""
    m = config.model

    def examples(purpose: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (count, m.in_channels, m.input_size, m.input_size)
        return torch.randn(shape, generator=generator_for(7, purpose, 0)), torch.arange(count) % m.num_classes

    return examples


class State(Made):
    """By part, the most fp32 elements alive at once: weights, moments, EMA, wherever they are.

    The forward weights are bf16, but for the moment in which a module is made: those are left out.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peaks: dict[str, int] = defaultdict(int)
        for piece in engine.pieces:
            for key in KEYS:
                self.note(state_tensor(piece, key, engine.optimizer, engine.ema), "")

    def note(self, tensor, where):
        if tensor.dtype != torch.float32 or self.part == "module":
            return
        storage = tensor.untyped_storage()
        self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes() // 4)
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peaks[self.part] = max(self.peaks[self.part], sum(numel for _, numel in self.alive.values()))


def state_alive(zero_stage: int, pipe_stages: int, ds_config: str) -> dict:
    """Elements of state that this rank holds in the parts of a resize; sizes to compare them with."""
    config = topology(zero_stage, pipe_stages, ds_config, depth=12, hidden_size=64)
    cuts = ((6, 6), (4, 4)) if pipe_stages > 1 else (None, None)
    engine = build_engine(config, config.model, cuts[0])
    initialize_fresh(engine, 0)
    train_steps(engine, config, 0, 1)
    kept = engine.kept_blocks[4:]
    names, old = set(names_after(engine, kept)), engine.pieces[:]
    sizes = {"old": sum(p.numel for p in old), "parked": sum(p.numel for p in old if p.name in names)}
    del old
    seen = State(engine)
    sizes["counted"] = sum(numel for _, numel in seen.alive.values())
    parts = [(resize_module, "build_engine", "build"), (resize_module, "fill", "fill")]
    parts += [(build_module, "_whole", "module"), (build_module, "_staged", "module")]
    with seen, seen.named(*parts[0]), seen.named(*parts[1]), seen.named(*parts[2]), seen.named(*parts[3]):
        engine, _ = resize(engine, config, kept, cuts[1])
    block = sum(math.prod(s) for n, s in engine.shapes.items() if n.startswith(f"blocks.{kept[0]}."))
    return {"peaks": seen.peaks, "block": block, "new": sum(p.numel for p in engine.pieces), **sizes}


class Replicated(TorchDispatchMode):
    """Bytes of DeepSpeed's broadcasts and all-gathers that this rank receives; the root of a broadcast its share."""

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size, self.bytes = group_size, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d.broadcast_"):
            self.bytes += sum(t.nbytes for t in args[0]) * (self.group_size - 1) / self.group_size
        if str(func).startswith("c10d._allgather_base_"):
            self.bytes += args[0].nbytes - args[1].nbytes
        return func(*args, **(kwargs or {}))


def replicated(cases: list[tuple[int, int, str]]) -> list[list[float]]:
    """Per (ZeRO stage, pipeline stages, DeepSpeed configuration): bytes that a resize reports, and this rank's."""
    found = []
    for zero_stage, pipe_stages, ds_config in cases:
        config = topology(zero_stage, pipe_stages, ds_config)
        engine = build_engine(config, config.model)
        initialize_fresh(engine, 0)
        with Replicated(engine.dp_size) as seen:
            engine, report = resize(engine, config, (0, 2, 3))
        found.append([report.bytes_framework, seen.bytes])
        destroy_engine(engine)
    return found
