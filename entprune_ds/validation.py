"""Validation loss on fixed (example, t, noise) draws, the same for every step, depth and number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.diffusion.objective import Draws, Objective

BATCH = 256


def validation_loss(model: Callable[[Tensor, Tensor, Tensor], Tensor], draws: Draws, objective: Objective) -> float:
    """Mean loss over the draws, split across ranks; equal on all ranks. Collective: all ranks call.

    Args:
        model: (z_t, t, labels) -> prediction; may be collective.
        draws: the same on all ranks, at least as many as ranks.
        objective: whose loss, and whose draws.
    """
    columns = (draws.z_t, draws.t, draws.labels, draws.target)
    mine = Draws(*(c.tensor_split(comm.world_size())[comm.rank()] for c in columns))
    batches = max(1, -(-len(draws.t) // (BATCH * comm.world_size())))  # equal on all ranks: the model may be collective
    total = torch.zeros(1, dtype=torch.float64, device=comm.device())
    parts = zip(*(c.tensor_split(batches) for c in (mine.z_t, mine.t, mine.labels, mine.target)), strict=True)
    with torch.no_grad():
        for z_t, t, labels, target in parts:
            prediction = model(z_t, t, labels)
            total += objective.loss(prediction, target.to(prediction.device), t).double().sum()
    return comm.all_reduce_sum(total).item() / len(draws.t)
