"""What the layers of a pipeline cost: forward and backward time and activations of stem, blocks and head, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entprune_ds import comm
from entprune_ds.config import Config, ModelConfig
from entprune_ds.engine.ds_config import batch_plan, read_ds_config, training_dtype
from entprune_ds.models.dit import DiT, build_block

REPEATS = 5


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
    conditions: str = ""
    """What else decides about the times, see `conditions_of`."""

    def of_layers(self, model_config: ModelConfig) -> list[int]:
        """Stem, blocks, head."""
        of_widths = {(heads, channels): cost for heads, channels, cost in self.narrow}
        return [self.stem, *(of_widths.get(model_config.widths(b), self.block) for b in model_config.blocks), self.head]

    def know(self, config: Config, model_config: ModelConfig, dp_size: int) -> bool:
        """Whether the times are those of these blocks, at this micro-batch and under these conditions."""
        known = {kind[:2] for kind in self.narrow}
        asked = (batch_plan(config, dp_size)[0], conditions_of(config))
        return asked == (self.micro_batch, self.conditions) and {w[1:] for w in model_config.block_widths} <= known


def conditions_of(config: Config) -> str:
    """Kind of device, precision and switches of the model: what changes the cost of a layer. Equal on all ranks."""
    switches = [name for name in ("activation_checkpointing", "compile") if getattr(config.model, name)]
    return ", ".join([comm.device().type, str(training_dtype(read_ds_config(config))), *switches])


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
    return LayerCosts(stem_cost, block_cost, head_cost, held, micro, narrow, conditions_of(config))


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


def costs_as_json(costs: LayerCosts | None) -> dict[str, Any] | None:
    """Plain values for the checkpoint."""
    return None if costs is None else asdict(costs)


def costs_from_json(values: dict[str, Any] | list[Any] | None) -> LayerCosts | None:
    """What `costs_as_json` wrote; None for that of other versions, which says less or more."""
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(LayerCosts)}:
        return None
    return LayerCosts(**values | {"narrow": tuple(tuple(kind) for kind in values["narrow"])})
