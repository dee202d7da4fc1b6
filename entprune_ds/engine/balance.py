"""Which blocks go on which pipeline stage: the contiguous cut whose slowest stage is fastest, by measured cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig
from entprune_ds.engine.ds_config import batch_plan, read_ds_config
from entprune_ds.models.dit import DiT, build_block
from entprune_ds.models.registry import parameter_shapes

Cut = tuple[int, ...]
"""Blocks per pipeline stage; the stem is on the first stage, the head on the last."""

REPEATS = 5
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


@dataclass(frozen=True)
class LayerCosts:
    """Nanoseconds of one forward and backward pass of each kind of layer, and bytes of its activations."""

    stem: int
    block: int
    head: int
    activation_bytes: int = 0
    """Of one block and micro-batch; those of stem and head are less."""
    micro_batch: int = 0
    """Examples that the times are for."""
    narrow: tuple[tuple[int, int, int], ...] = ()
    """Heads, MLP channels and nanoseconds of each kind of narrow block."""

    def of_layers(self, model_config: ModelConfig) -> list[int]:
        """Stem, blocks, head."""
        of_widths = {(heads, channels): cost for heads, channels, cost in self.narrow}
        return [self.stem, *(of_widths.get(model_config.widths(b), self.block) for b in model_config.blocks), self.head]

    def know(self, model_config: ModelConfig, micro_batch: int) -> bool:
        """Whether the times are those of these blocks and this micro-batch."""
        known = {kind[:2] for kind in self.narrow}
        return self.micro_batch == micro_batch and {kind[1:] for kind in model_config.block_widths} <= known


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
    sharded = dp_size if ds["zero_optimization"]["stage"] else 1
    per_element = 2 * training_dtype(ds).itemsize + 16 / sharded
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


def training_dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Precision of the training forward pass."""
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def measure_costs(config: Config, model_config: ModelConfig, num_stages: int, repeats: int = REPEATS) -> LayerCosts:
    """Time stem, head and every kind of block on the training micro-batch. Collective: the median over ranks.

    Process CPU time, CUDA events on a GPU. Inert: layers of its own, no RNG, no .grad, no hooks of the engine.
    """
    micro, _ = batch_plan(config, comm.world_size() // num_stages)
    device, dtype, m = comm.device(), training_dtype(read_ds_config(config)), model_config
    with torch.device("meta"):
        stem = DiT(m.keeping(()))
        kinds = {m.widths(index): build_block(m, index) for index, _, _ in m.block_widths}
        block = build_block(replace(m, block_widths=()), 0)
    for module in (stem, block, *kinds.values()):
        module.to_empty(device=device).to(dtype)
        _fill([*module.parameters(), *module.buffers()])
    if m.compile:
        for kind in (block, *kinds.values()):
            kind.compile()
    tokens = stem.side**2
    z_t, x, c = (
        _fill([torch.empty(micro, *shape, device=device, dtype=dtype)])[0]
        for shape in ((m.in_channels, m.input_size, m.input_size), (tokens, m.hidden_size), (m.hidden_size,))
    )
    t = torch.full((micro,), 0.5, device=device)
    labels = torch.zeros(micro, dtype=torch.int64, device=device)
    x, c = x.requires_grad_(), c.requires_grad_()
    stem_weights = [p for n, p in stem.named_parameters() if not n.startswith("final_layer.")]
    head_weights = list(stem.final_layer.parameters())

    def run_block(kind: nn.Module) -> Tensor:
        return checkpoint(kind, x, c, use_reentrant=False) if m.activation_checkpointing else kind(x, c)

    def run_stem() -> Tensor:
        tokens_of, conditioning = stem.embed(z_t, t, labels)
        return torch.cat([tokens_of, conditioning.unsqueeze(1)], dim=1)

    times = [
        _seconds(run_stem, stem_weights, repeats),
        _seconds(lambda: stem.head(x, c), [x, c, *head_weights], repeats),
        *(_seconds(partial(run_block, b), [x, c, *b.parameters()], repeats) for b in (block, *kinds.values())),
    ]
    held = x.nbytes if m.activation_checkpointing else saved_bytes(block, x, c)
    ranks = comm.all_gather_json([int(1e9 * seconds) for seconds in times])
    stem_cost, head_cost, block_cost, *costs = (int(statistics.median(column)) for column in zip(*ranks, strict=True))
    narrow = tuple((*widths, cost) for widths, cost in zip(kinds, costs, strict=True))
    return LayerCosts(stem_cost, block_cost, head_cost, held, micro, narrow)


def _fill(tensors: list[Tensor]) -> list[Tensor]:
    """Small deterministic values: timing needs ordinary numbers, and no RNG may be consumed."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.view(-1).copy_(torch.linspace(-0.1, 0.1, tensor.numel()))
    return tensors


def _seconds(forward: Callable[[], Tensor], inputs: list[Any], repeats: int) -> float:
    """Median over repeats of a forward and backward pass, after one to warm up."""

    def once() -> None:
        output = forward()
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    once()
    return statistics.median(_timed(once) for _ in range(repeats))


def _timed(work: Callable[[], None]) -> float:
    if comm.device().type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.process_time()
    work()
    return time.process_time() - start


def saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes that the backward pass keeps of a forward pass of `module`, its parameters apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}  # also their transposes
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(*inputs)  # alive until all is counted, or an address could come twice
    del output
    return sum(kept.values())


def costs_as_json(costs: LayerCosts | None) -> list[Any] | None:
    """Plain values for the checkpoint."""
    return None if costs is None else list(astuple(costs))


def costs_from_json(values: list[Any] | None) -> LayerCosts | None:
    """What `costs_as_json` wrote; older checkpoints know of no narrow blocks."""
    if not values:
        return None
    narrow = tuple(tuple(kind) for kinds in values[5:] for kind in kinds)
    stem, block, head, activation_bytes, micro_batch = values[:5]
    return LayerCosts(stem, block, head, activation_bytes, micro_batch, narrow)
