"""Exponential moving average of the weights, sharded exactly like the optimizer: 1 / world_size of the memory."""

from __future__ import annotations

import torch
from torch import Tensor

from entprune_ds.engine.state import Piece


def new_ema(pieces: list[Piece]) -> dict[str, Tensor]:
    """EMA buffers (numel,) f32 per piece, equal to the present weights."""
    return {p.name: p.view(p.flat).clone() for p in pieces}


def ema_decay(decay: float, count: int) -> float:
    """Warmed-up decay min(decay, (1 + n) / (10 + n)), n = updates since the start or the last resize."""
    return min(decay, (1 + count) / (10 + count))


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], pieces: list[Piece], decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * weight. Local: no communication."""
    torch._foreach_lerp_([ema[p.name] for p in pieces], [p.view(p.flat) for p in pieces], 1.0 - decay)
