"""What the next removal will take, for any world size: state that travels, state that is parked, seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from entprune_ds.config import Config, ModelConfig
from entprune_ds.engine.transfer import BYTES_PER_ELEMENT, Range, missing_bytes
from entprune_ds.estimate import Plan, plan_of
from entprune_ds.models.registry import parameter_shapes
from entprune_ds.pruning.schedule import blocks_per_check

ALIGNMENT = 2
"""DeepSpeed pads flat groups to a multiple of this many elements per rank."""


@dataclass(frozen=True)
class ResizeEstimate:
    """What the removal of some blocks will take."""

    depth: int
    """Blocks that remain."""
    parked: int
    """Bytes of state that a rank parks, at most."""
    moved: int
    """Bytes of state that all ranks send each other."""
    seconds: float


def resize_estimate(config: Config, world_size: int, constants: dict[str, Any]) -> ResizeEstimate | None:
    """The first removal at its largest; None when nothing will be removed, or by a mask that is not known yet.

    Which blocks go is known only then: here they lie evenly over the depth.
    """
    depth, prune = len(config.model.blocks), config.prune
    if prune.target_depth is None or prune.score_only or config.soft.every:
        return None
    count = min(blocks_per_check(prune, depth), depth - prune.target_depth)
    return removal_estimate(config, world_size, evenly(config.model.blocks, count), constants)


def evenly(blocks: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The blocks that remain when `count` go, evenly over the depth."""
    gone = {blocks[(2 * i + 1) * len(blocks) // (2 * count)] for i in range(count)}
    return tuple(b for b in blocks if b not in gone)


def removal_estimate(
    config: Config, world_size: int, kept: tuple[int, ...], constants: dict[str, Any]
) -> ResizeEstimate:
    """What it takes to go on with these blocks."""
    model, rates = replace(config.model, kept_blocks=kept), constants["resize"]
    old, new = plan_of(config, world_size), plan_of(config, world_size, len(kept))
    names = parameter_shapes(model)
    have = [[r for r in ranges if r[0] in names] for ranges in partitions(config.model, old)]
    want = partitions(model, new)
    received = [missing_bytes([a], [b]) for a, b in zip(have, want, strict=True)]
    largest = max(sum(math.prod(names[n]) for n in part) for part in _stage_names(model, new))
    cost = rates["pipeline" if len(old.cut) > 1 else f"zero{old.zero_stage}"]
    seconds = cost["seconds"] + cost["seconds_per_parameter"] * largest + rates["seconds_per_byte"] * max(received)
    parked = BYTES_PER_ELEMENT * max(sum(stop - start for _, start, stop in ranges) for ranges in have)
    return ResizeEstimate(len(kept), parked, sum(received), seconds)


def partitions(model: ModelConfig, plan: Plan) -> list[list[Range]]:
    """(name, start, stop) of the state that every rank holds; ranks are stage-major, as in engine.layout."""
    shapes, found = parameter_shapes(model), []
    for names in _stage_names(model, plan):
        sizes = {name: math.prod(shapes[name]) for name in names}
        starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        unit = ALIGNMENT * plan.dp_size
        length = -(-sum(sizes.values()) // unit) * ALIGNMENT  # of a rank's part of the flat group at ZeRO-1/2
        for rank in range(plan.dp_size):
            if plan.zero_stage == 0:
                ranges = [(n, 0, size) for n, size in sizes.items()]
            elif plan.zero_stage == 3:
                ranges = [_overlap(n, 0, size, rank, -(-size // plan.dp_size)) for n, size in sizes.items()]
            else:
                ranges = [_overlap(n, starts[n], size, rank, length) for n, size in sizes.items()]
            found.append([(n, start, stop) for n, start, stop in ranges if start < stop])
    return found


def _overlap(name: str, offset: int, size: int, rank: int, length: int) -> Range:
    """Elements on one rank of a parameter that lies at `offset` of something cut into equal lengths."""
    return name, max(0, rank * length - offset), min(size, (rank + 1) * length - offset)


def _stage_names(model: ModelConfig, plan: Plan) -> list[list[str]]:
    """Names of the parameters of every pipeline stage."""
    stages = [stage for stage, count in enumerate(plan.cut) for _ in range(count)]
    stage_of = {"final_layer": len(plan.cut) - 1} | dict(zip(map(str, model.blocks), stages, strict=True))
    found: list[list[str]] = [[] for _ in plan.cut]
    for name in parameter_shapes(model):
        top, second = name.split(".")[:2]
        found[stage_of.get(second if top == "blocks" else top, 0)].append(name)
    return found
