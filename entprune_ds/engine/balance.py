"""Which blocks go on which pipeline stage: the contiguous cut whose slowest stage is fastest, by measured cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig
from entprune_ds.engine.ds_config import read_ds_config, training_dtype
from entprune_ds.engine.layer_costs import LayerCosts
from entprune_ds.models.registry import parameter_shapes

Cut = tuple[int, ...]
"""Blocks per pipeline stage; the stem is on the first stage, the head on the last."""

FREE_SHARE = 0.9
"""Part of a GPU's memory that a stage may fill."""


def best_cut(
    costs: Sequence[int], memory: Sequence[int], num_stages: int, limit: int | None = None,
    present: Sequence[int] | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """Layers per stage of the contiguous cut whose most expensive stage is cheapest; exact, by dynamic programming.

    Args:
        costs: of every layer; integers, so that equal sums are equal.
        memory: bytes of every layer.
        num_stages: stages, each of at least one layer.
        limit: most bytes of one stage; None means no limit.
        present: stage that holds each layer now. Among equal cuts the one that moves the fewest bytes wins, then the
            one with fewer layers on the first stage where they differ.

    Raises:
        ValueError: when no cut exists within the limit.
    """
    layers, cost_to, memory_to = len(costs), [0, *accumulate(costs)], [0, *accumulate(memory)]
    moves = [
        [0, *accumulate(m if present is not None and present[i] != stage else 0 for i, m in enumerate(memory))]
        for stage in range(num_stages)
    ]

    def allowed(first: int, last: int) -> bool:
        return limit is None or memory_to[last] - memory_to[first] <= limit

    slowest: dict[int, int] = {0: 0}  # layers so far -> cheapest possible most expensive stage
    for _ in range(num_stages):
        slowest = {
            last: min(max(slowest[first], cost_to[last] - cost_to[first]) for first in choices)
            for last in range(1, layers + 1)
            if (choices := [first for first in range(last) if first in slowest and allowed(first, last)])
        }
    if layers not in slowest:
        raise ValueError(f"no cut of {layers} layers into {num_stages} stages keeps each within {limit} bytes.")
    bound = slowest[layers]
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # layers so far -> (bytes moved, layers per stage)
    for stage in range(num_stages):
        best = {
            last: min(
                (best[first][0] + moves[stage][last] - moves[stage][first], (*best[first][1], last - first))
                for first in choices
            )
            for last in range(1, layers + 1)
            if (
                choices := [
                    first
                    for first in range(last)
                    if first in best and allowed(first, last) and cost_to[last] - cost_to[first] <= bound
                ]
            )
        }
    return best[layers][1]


def stage_costs(costs: LayerCosts, model_config: ModelConfig, cut: Cut) -> list[int]:
    """Nanoseconds of every stage."""
    stem, *blocks, head = costs.of_layers(model_config)
    per_stage = [sum(blocks[stop - count : stop]) for count, stop in zip(cut, accumulate(cut), strict=True)]
    per_stage[0] += stem
    per_stage[-1] += head
    return per_stage


def cut_by_cost(
    config: Config, model_config: ModelConfig, num_stages: int, dp_size: int, costs: LayerCosts,
    present: dict[int, int] | None = None,
) -> Cut:  # fmt: skip
    """Blocks per stage at the depth of `model_config`. A pure function, equal on all ranks.

    Args:
        present: stage that holds each block now, when the stages stay on their ranks.

    Raises:
        DistributedError: on all ranks, when no cut fits the memory of the device, with a remedy.
    """
    blocks = model_config.blocks
    where = None if present is None else [0, *(present[b] for b in blocks), num_stages - 1]
    memory = _layer_bytes(config, model_config, dp_size)
    in_flight = num_stages * costs.activation_bytes  # one forward, one backward: the first stage keeps that many
    try:
        layers = best_cut(
            costs.of_layers(model_config), [m + in_flight for m in memory], num_stages, _memory_limit(), where
        )
    except ValueError as problem:
        remedy = "Raise `parallel.pipe_stages`, lower train.micro_batch_size, or set model.activation_checkpointing."
        raise comm.DistributedError(f"{problem} {remedy}") from problem
    return (layers[0] - 1, *layers[1:-1], layers[-1] - 1)


def check_cut(cut: Cut | None, num_stages: int, depth: int) -> None:
    """Refuse a cut that does not fit the stages and the depth.

    Raises:
        ValueError: unless every stage is there and every block on one, at least one on those in the middle; or unless
            None stands for a single stage.
    """
    fits = num_stages == 1 if cut is None else len(cut) == num_stages > 1 and sum(cut) == depth
    if not fits or (cut is not None and (min(cut) < 0 or 0 in cut[1:-1])):
        message = f"the cut {list(cut or ())} does not give {depth} blocks to {num_stages} stages, at least one to "
        raise ValueError(message + "every stage in the middle.")


def _layer_bytes(config: Config, model_config: ModelConfig, dp_size: int) -> list[int]:
    """Weights, gradients, moments and EMA of stem, blocks and head on one rank."""
    ds = read_ds_config(config)
    item = training_dtype(ds).itemsize
    sharded = dp_size if ds["zero_optimization"]["stage"] or item == 2 else 1  # bf16 pipelines shard at stage 0 too
    per_element = 2 * item + 16 / sharded
    return [int(count * per_element) for count in layer_parameters(model_config)]


def layer_parameters(model_config: ModelConfig) -> list[int]:
    """Parameters of stem, blocks and head."""
    counts: dict[str | int, int] = dict.fromkeys(["stem", *model_config.blocks, "head"], 0)
    for name, shape in parameter_shapes(model_config).items():
        top, *rest = name.split(".")
        counts[int(rest[0]) if top == "blocks" else "head" if top == "final_layer" else "stem"] += math.prod(shape)
    return list(counts.values())


def _memory_limit() -> int | None:
    """Bytes of this rank's GPU that a stage may fill; a CPU has no limit of its own."""
    device = comm.device()
    return int(FREE_SHARE * torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
