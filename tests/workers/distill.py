"""Worker functions of test_distill.py: run on every rank by tests.ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from entprune_ds import comm
from entprune_ds.config import Config, DistillConfig
from entprune_ds.diffusion.objective import FlowObjective
from entprune_ds.engine.build import build_engine, destroy_engine
from entprune_ds.engine.resize import resize
from entprune_ds.engine.view import gather_full
from entprune_ds.interop.weights import open_weights
from entprune_ds.pruning.decision import PruneDecision
from entprune_ds.recovery import open_recovery
from entprune_ds.run_state import load_weights
from entprune_ds.teacher import Teacher, matching
from tests.tiny import tiny_config, tiny_draws
from tests.workers.resize_cost import Largest


def distill_config(teacher: str, zero_stage: int = 1, stages: int = 1, **distill: object) -> Config:
    """The tiny config with a teacher of its own shape, whose features weigh as much as the rest."""
    config = tiny_config(zero_stage)
    settings = DistillConfig(kind="features", teacher=teacher, feature_weight=1.0)
    return replace(
        config, train=replace(config.train, micro_batch_size=2), distill=replace(settings, **distill),  # type: ignore[arg-type]
        parallel=replace(config.parallel, pipe_stages=stages),
    )  # fmt: skip


def decision(step: int, before: tuple[int, ...], kept: tuple[int, ...]) -> PruneDecision:
    """A removal."""
    gone = tuple(b for b in before if b not in kept)
    return PruneDecision(
        check=0, step=step, criterion="explicit", kept_before=before, dropped=gone, kept_blocks=kept,
        order=(*gone, *kept), scores={}, candidates=[], chosen_depth=len(kept), forced=False, reason="",
        score_only=False,
    )  # fmt: skip


def trained(teacher: str, cases: list[tuple[int, int]], plan: list[tuple[int, list[int]]], **distill: object) -> list:
    """Per case (ZeRO stage, pipeline stages): terms of every step and a few weights.

    Args:
        plan: (steps, blocks that are kept in them) in turn.
    """
    found = []
    for zero_stage, stages in cases:
        config = distill_config(teacher, zero_stage, stages, **distill)
        engine = build_engine(config, config.model)
        load_weights(engine, Path(teacher), config.model)
        recovery, decisions, rows, step = open_recovery(config, engine, {}), [], [], 0
        for count, kept in plan:
            if tuple(kept) != engine.kept_blocks:
                decisions.append(decision(step, engine.kept_blocks, tuple(kept)))
                engine, _ = resize(engine, config, tuple(kept))
            for _ in range(count):
                draws = tiny_draws(config, step, engine.dp_rank, engine.dp_size)
                parts = draws.split(engine.ds.train_micro_batch_size_per_gpu()) if engine.reads_data else []
                loss = recovery.train_step(engine, parts, FlowObjective(), step, decisions)
                mean = comm.all_reduce_sum(loss.clone()).item() / comm.world_size()
                row = {"train/loss": mean} | recovery.metrics(engine)
                rows.append([row.get(f"train/{n}") for n in ("loss", "loss_plain", "loss_output", "loss_features")])
                assert engine.backbone.tap is None
                step += 1
        names = [n for n in engine.shapes if n.startswith((f"blocks.{engine.kept_blocks[0]}.", "final_layer."))]
        weights = {n: t.flatten().tolist() for n, t in gather_full(engine, names, "weight").items()}
        found.append({"rows": rows, "weights": weights, "beta": row.get("train/feature_weight")})
        destroy_engine(engine)
    return found


def placements(teacher: str, dtype: str) -> dict:
    """Whether a sharded teacher says what a whole one says, to the bit; and what each holds and makes."""
    source, config = open_weights(Path(teacher)), distill_config(teacher)
    draws = tiny_draws(config, 0, comm.rank(), comm.world_size())
    parts, matched = draws.split(2), matching((0, 2), source.model.blocks)
    seen, lessons, held = Largest(), {}, {}
    for name in ("whole", "sharded"):
        seen.part = name
        with seen:
            made = Teacher(source, getattr(torch, dtype), name == "sharded")
            lessons[name] = made.outputs(parts, matched, True)
        held[name] = made.nbytes
    nothing = made.outputs(parts[: comm.rank()], {}, comm.rank() == 1)  # ranks that need nothing share all the same
    equal = all(
        torch.equal(a.prediction, b.prediction) and all(torch.equal(a.features[k], b.features[k]) for k in matched)
        for a, b in zip(*lessons.values(), strict=True)
    )
    if comm.rank() == 1:
        equal &= torch.equal(nothing[0].prediction, lessons["whole"][0].prediction)
    block = sum(math.prod(s) for n, s in source.shapes.items() if n.startswith("blocks.0."))
    stem = sum(math.prod(s) for n, s in source.shapes.items() if not n.startswith("blocks."))
    return {
        "equal": equal and len(nothing) == comm.rank(), "held": held, "made": seen.made, "block": block, "stem": stem,
        "depth": len(source.model.blocks), "keys": sorted(lessons["sharded"][0].features),
    }  # fmt: skip
