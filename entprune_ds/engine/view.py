"""A look at the sharded weights from outside the training engine: scoring, validation and sampling.

Weights are gathered from the named state, one block at a time, into a single spare block. No hook of
DeepSpeed fires and no gradient buffer is touched, so whatever uses this view leaves training as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor, nn

from entprune_ds import comm
from entprune_ds.engine.build import Engine
from entprune_ds.engine.state import Piece, state_tensor
from entprune_ds.models.dit import DiT, build_block


def gather_full(engine: Engine, names: Sequence[str], key: str) -> dict[str, Tensor]:
    """Full fp32 tensors of a few parameters in one all-gather. Collective: all ranks call.

    Args:
        names: parameter names, e.g. those of one block; never all of a sharded model at once.
        key: weight, exp_avg, exp_avg_sq or ema.
    """
    wanted, shapes = set(names), engine.shapes
    mine = [p for p in engine.pieces if p.name in wanted]
    parts = [state_tensor(p, key, engine.optimizer, engine.ema) for p in mine]
    ranges = [[r for r in ranges if r[0] in wanted] for ranges in engine.layout]
    if all(len(r) == len(wanted) and all(stop - start == math.prod(shapes[n]) for n, start, stop in r) for r in ranges):
        full = {p.name: part.view(p.shape) for p, part in zip(mine, parts, strict=True)}  # stage 0, or one rank
        return {n: t.to(comm.device(), copy=True) for n, t in full.items()}
    size = max(sum(stop - start for _, start, stop in r) for r in ranges)
    total = sum(math.prod(shapes[n]) for n in names)
    if size * comm.world_size() > 2 * total:  # few ranks hold it (ZeRO-1/2): adding shares moves less than gathering
        first = {r: rank for rank, held in reversed([*enumerate(ranges)]) for r in map(tuple, held)}  # of replicas
        owned = [first[p.name, p.start, p.stop] == comm.rank() for p in mine]
        return _sum_of_shares([*compress(mine, owned)], [*compress(parts, owned)], {n: shapes[n] for n in names})
    flat = torch.zeros(size, device=comm.device())
    if parts:
        joined = torch.cat(parts)
        flat[: joined.numel()] = joined
    full = {n: torch.empty(math.prod(shapes[n]), device=comm.device()) for n in names}
    for received, held in zip(comm.all_gather(flat), ranges, strict=True):
        offset = 0
        for name, start, stop in held:
            full[name][start:stop] = received[offset : offset + stop - start]
            offset += stop - start
    return {n: t.view(shapes[n]) for n, t in full.items()}


def _sum_of_shares(mine: list[Piece], parts: list[Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Full tensors as the sum over ranks; exact (but for the sign of zero), because every element has one owner."""
    full = {n: torch.zeros(math.prod(shape), device=comm.device()) for n, shape in shapes.items()}
    for piece, part in zip(mine, parts, strict=True):
        full[piece.name][piece.start : piece.stop] = part
    joined = comm.all_reduce_sum(torch.cat(list(full.values())))
    sizes = [t.numel() for t in full.values()]
    return {n: t.view(shapes[n]) for n, t in zip(full, joined.split(sizes), strict=True)}


class ShardedView:
    """The model as `importance.parts.Parts` and as a callable, from the raw or the EMA weights.

    Building it gathers the stem and the head (small); `block(i)` gathers block i. Both are collective,
    so all ranks must make the same calls in the same order.
    """

    def __init__(self, engine: Engine, key: str = "weight", dtype: torch.dtype = torch.float32):
        self.engine, self.key, self.dtype, self.device = engine, key, dtype, comm.device()
        config = engine.model_config
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            self.stem = DiT(config.keeping(()))
        self.stem.to(self.device, dtype).requires_grad_(False).eval()
        self.spare, self.spare_widths = nn.Module(), (0, 0)
        names = [n for n in engine.shapes if not n.startswith("blocks.")]
        _load(self.stem, gather_full(engine, names, key))
        self.gathers = 0

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Original indices of the present blocks."""
        return self.engine.kept_blocks

    def embed(self, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """z_t (N,C,H,W), t (N,), labels (N,) -> x (N,T,D), c (N,D)."""
        return self.stem.embed(z_t, t, labels)

    def block(self, index: int) -> nn.Module:
        """Block `index` (original) with its gathered weights; valid until the next call. Collective."""
        prefix = f"blocks.{index}."
        names = [n for n in self.engine.shapes if n.startswith(prefix)]
        full = gather_full(self.engine, names, self.key)
        config, widths = self.engine.model_config, self.engine.model_config.widths(index)
        if widths != self.spare_widths:
            with torch.device("meta"):
                self.spare, self.spare_widths = build_block(config, index), widths
            self.spare.to_empty(device=self.device).to(self.dtype).requires_grad_(False).eval()
        _load(self.spare, {n.removeprefix(prefix): t for n, t in full.items()})
        gates = self.engine.gates.get(index, {})
        self.spare.set_gates({kind: gate.to(self.dtype) for kind, gate in gates.items()})  # type: ignore[operator]
        self.gathers += 1
        comm.mark_progress()
        return self.spare

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), c (N,D) -> prediction (N,C,H,W), without a learned-variance half."""
        return self.stem.head(x, c)[:, : self.engine.model_config.in_channels]

    @torch.no_grad()
    def __call__(self, z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Forward pass (N,C,H,W) -> the model's whole prediction. Collective."""
        x, c = self.embed(z_t.to(self.device, self.dtype), t.to(self.device), labels.to(self.device))
        for index in self.kept_blocks:
            x = self.block(index)(x, c)
        return self.stem.head(x, c)


def _load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])
