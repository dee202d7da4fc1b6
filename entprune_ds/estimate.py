"""What a run will need: the memory of a rank, for any world size; nothing is launched.

What DeepSpeed and we hold by design is counted. What comes on top (buckets, copies in flight, what the allocator keeps)
is proportional to the parameters, at a rate that tools/measure_memory.py has measured and keeps in estimate.json.
Bytes are those above a process that has only imported everything; torch.compile is not accounted for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from entprune_ds.config import Config, ModelConfig
from entprune_ds.engine.balance import Cut, layer_parameters
from entprune_ds.engine.ds_config import (
    accumulates_in_fp32,
    batch_plan,
    offloads,
    read_ds_config,
    stages_at,
    training_dtype,
)
from entprune_ds.engine.layer_costs import saved_bytes
from entprune_ds.models.dit import DiT, build_block

CONSTANTS = Path(__file__).with_name("estimate.json")


@dataclass(frozen=True)
class Plan:
    """A run laid over its ranks, at one depth."""

    zero: dict[str, Any]
    """zero_optimization of the DeepSpeed configuration."""
    dtype: torch.dtype
    accumulates_fp32: bool
    offload: bool
    dp_size: int
    micro_batch: int
    accumulation: int
    cut: Cut
    """Blocks per pipeline stage; one entry without a pipeline."""

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the run."""
        return int(self.zero["stage"])

    @property
    def key(self) -> str:
        """Name of its rates in estimate.json, e.g. zero1_bf16."""
        return f"zero{self.zero_stage}_{'bf16' if self.dtype == torch.bfloat16 else 'fp32'}"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank while it trains."""

    weights: int
    gradients: int
    master: int
    """fp32 weights beside those of the forward pass."""
    moments: int
    ema: int
    activations: int
    gathered: int
    """ZeRO-3: whole parameters that are on the rank at the same time."""
    buffers: int
    reserved: int
    """What DeepSpeed's bucket for gradients takes on a GPU beside the total: there it is allocated whole."""
    offloaded: bool
    """Whether master weights, moments and EMA lie in host memory."""

    @property
    def host(self) -> int:
        """Bytes in host memory when the optimizer is offloaded."""
        return self.master + self.moments + self.ema if self.offloaded else 0

    @property
    def total(self) -> int:
        """All of it, in host and device memory."""
        parts = (self.weights, self.gradients, self.master, self.moments, self.ema, self.activations, self.gathered)
        return sum(parts) + self.buffers


def load_constants() -> dict[str, Any]:
    """The measured constants that are shipped."""
    return json.loads(CONSTANTS.read_text())


def plan_of(config: Config, world_size: int, depth: int | None = None) -> Plan:
    """How a run lies on `world_size` ranks, with `depth` blocks or those of the model.

    Pipelines are cut evenly: what the layers cost is measured at the start of a run.

    Raises:
        ValueError: when batch, pipeline and ranks do not fit together.
    """
    values, depth = read_ds_config(config), len(config.model.blocks) if depth is None else depth
    stages = stages_at(config, world_size, depth)
    micro, accumulation = batch_plan(config, world_size // stages, depth)
    dtype = training_dtype(values)
    cut = tuple(depth // stages + (stage < depth % stages) for stage in range(stages))
    return Plan(
        values["zero_optimization"], dtype, accumulates_in_fp32(values) or dtype == torch.float32,
        offloads(values), world_size // stages, micro, accumulation, cut,
    )  # fmt: skip


def rank_memory(config: Config, world_size: int, rates: dict[str, Any]) -> list[Memory]:
    """Memory of a rank of every pipeline stage; one entry without a pipeline.

    Args:
        rates: `memory` of estimate.json; the result is linear in them.
    """
    plan = plan_of(config, world_size)
    stem, *blocks, head = layer_parameters(config.model)
    bounds = [0, *accumulate(plan.cut)]
    found = []
    for stage, (first, last) in enumerate(pairwise(bounds)):
        parameters = sum(blocks[first:last]) + stem * (stage == 0) + head * (stage == len(plan.cut) - 1)
        held, block = activation_bytes(config.model, plan, stage)
        activations = held + rates["working_blocks"] * block
        found.append(_memory(plan, parameters, max(blocks), activations, rates))
    return found


def _memory(plan: Plan, parameters: int, block: int, activations: float, rates: dict[str, Any]) -> Memory:
    item, zero_stage = plan.dtype.itemsize, plan.zero_stage
    part = parameters / plan.dp_size if zero_stage else parameters  # of the optimizer state
    kept = 4 if plan.accumulates_fp32 else item
    gathered = gathered_parameters(plan.zero, parameters, block) if zero_stage == 3 else 0
    released = parameters - gathered if zero_stage == 3 else 0
    bucket, rate = int(plan.zero.get("reduce_bucket_size", 5e8)), rates["buffers"][plan.key]
    buffers = (
        rate["replicated"] * min(parameters, bucket) + rate["sharded"] * part + rates["released"] * item * released
    )
    has_bucket = zero_stage > (item == 2 and plan.accumulates_fp32) and plan.zero.get("contiguous_gradients", True)
    unused = max(0, bucket - parameters) if has_bucket else 0  # BF16_Optimizer, of ZeRO-1 in bf16, has none
    twice = 2 if plan.zero.get("overlap_comm", zero_stage == 3) else 1
    return Memory(
        weights=int(item * (part if zero_stage == 3 else parameters)),
        gradients=int(kept * (parameters if zero_stage < 2 else part)),
        master=0 if zero_stage == 0 and item == 4 else int(4 * part),
        moments=int(8 * part),
        ema=int(4 * part),
        activations=int(activations),
        gathered=item * gathered,
        buffers=int(buffers),
        reserved=twice * item * unused,
        offloaded=plan.offload,
    )


def gathered_parameters(zero: dict[str, Any], parameters: int, block: int) -> int:
    """Parameters that ZeRO-3 holds whole at its peak, the last block of the forward pass.

    What the backward pass will want again within stage3_max_reuse_distance stays: half of the distance lies behind.
    Prefetching adds its bucket, within stage3_max_live_parameters; the block at work is needed anyway.
    """
    stays = int(zero.get("stage3_max_reuse_distance", 1e9)) // 2
    live = max(0, int(zero.get("stage3_max_live_parameters", 1e9)) - stays)
    return min(parameters, stays + min(live, int(zero.get("stage3_prefetch_bucket_size", 5e7))) + block)


def activation_bytes(model: ModelConfig, plan: Plan, pipe_stage: int) -> tuple[int, int]:
    """What the backward passes of one pipeline stage wait for, of all its micro-batches in flight; one block's part.

    The second figure is what a block keeps of a micro-batch: the unit of what is at work at the same time.
    """
    block, ends = example_activations(replace(model, weights="", kept_blocks=None, depth=1), plan.dtype)
    tokens = (model.input_size // model.patch_size) ** 2
    carried = (tokens + 1) * model.hidden_size * plan.dtype.itemsize  # tokens and conditioning between two blocks
    stages = len(plan.cut)
    held = plan.cut[pipe_stage] * (carried if model.activation_checkpointing else block)
    held += ends if pipe_stage in (0, stages - 1) else 0
    held += 2 * carried if stages > 1 else 0
    return plan.micro_batch * min(stages - pipe_stage, plan.accumulation) * held, plan.micro_batch * block


@cache
def example_activations(model: ModelConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the backward pass keeps of one example: of a block, of stem and head together."""
    with torch.device("meta"):
        ends, block = DiT(replace(model, kept_blocks=())), build_block(replace(model, block_widths=()), 0)
    for module in (ends, block):
        module.to_empty(device="cpu").to(dtype)
    tokens, width = ends.side**2, model.hidden_size
    x = torch.zeros(1, tokens, width, dtype=dtype, requires_grad=True)
    c = torch.zeros(1, width, dtype=dtype, requires_grad=True)
    z_t = torch.zeros(1, model.in_channels, model.input_size, model.input_size, dtype=dtype)
    t, labels = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    return saved_bytes(block, x, c), saved_bytes(ends, z_t, t, labels)
