"""What every block does to the residual stream: the relative size of its update, and its adaLN gates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from entprune_ds.diffusion.objective import Draws
from entprune_ds.engine.view import ShardedView


class BlockNorms(NamedTuple):
    """Means over the examples of a batch."""

    residual: float
    """|block(x) - x| / |x|, norms over all tokens of an example: 0 of a block that does nothing."""
    gate_attention: float
    """Mean absolute value of the gate of the attention branch (alpha of adaLN-Zero), times that of soft pruning."""
    gate_mlp: float
    """The same of the MLP branch."""


@torch.no_grad()
def block_norms(view: ShardedView, draws: Draws) -> dict[int, BlockNorms]:
    """Norms of every present block by original index. Collective, inert, and the same at any sharding.

    Args:
        view: of the weights; every block is gathered once.
        draws: the same on all ranks, each of which computes all of them.
    """
    moved = draws.to(view.device, view.dtype)
    x, c = view.embed(moved.z_t, moved.t, moved.labels)  # (N,T,D), (N,D)
    rows = []
    for index in view.kept_blocks:
        block = view.block(index)
        after = block(x, c)  # (N,T,D)
        norm, update = (y.flatten(1).norm(dim=1) for y in (x, after - x))
        rows.append(torch.stack([(update / norm).mean(), *_gates(block, c)]))
        x = after
    found = torch.stack(rows).tolist()  # one transfer for all blocks
    return {index: BlockNorms(*row) for index, row in zip(view.kept_blocks, found, strict=True)}


def _gates(block: Any, c: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute gates of the two branches for conditioning c (N,D)."""
    _, _, attention, _, _, mlp = block.adaLN_modulation(c).chunk(6, dim=1)
    outer = 1.0 if block.gate is None else block.gate.abs()
    return (attention.abs() * outer).mean(), (mlp.abs() * outer).mean()
