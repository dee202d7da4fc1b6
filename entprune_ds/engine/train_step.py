"""One optimizer step, the same call on every topology."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.engine.build import Engine
from entprune_ds.engine.timed_collectives import collectives_of


def train_step(engine: Engine, micro_batches: list, loss_fn: Any) -> tuple[Tensor, float]:
    """One optimizer step over the micro-batches of this data-parallel rank, on any topology. Collective.

    Args:
        micro_batches: diffusion.objective.Draws, as many as accumulation steps; unread in the middle of a pipeline.
        loss_fn: (prediction, target, t) -> (N,), the loss of a diffusion.objective.Objective; where the draws have a
            teacher, (prediction, target, t, teacher) -> (N,).

    Returns:
        Mean loss of this data-parallel rank (a tensor, not synchronised) and the seconds taken.
    """
    start = time.perf_counter()
    with collectives_of(engine.parts):
        if engine.cut is not None:
            from entprune_ds.engine.pipeline import train_batch

            total = train_batch(engine.ds, micro_batches, engine.dtype, loss_fn, engine.parts)
        else:
            total = _accumulated(engine, micro_batches, loss_fn)
    engine.parts.steps += 1
    return total, time.perf_counter() - start


def _accumulated(engine: Engine, micro_batches: list, loss_fn: Any) -> Tensor:
    """train_step without a pipeline."""
    total, part = torch.zeros((), device=comm.device()), engine.parts.part
    engine.batch_loss = total
    for draws in micro_batches:
        with part("data"):
            draws = draws.to(comm.device(), engine.dtype)
        with part("forward"):
            loss = loss_fn(engine.ds(draws.z_t, draws.t, draws.labels), *draws.wanted).mean()
        with part("backward"):
            engine.ds.backward(loss)
        total += loss.detach() / len(micro_batches)  # before the step, which may be left out for it
        with part("optimizer"):
            engine.ds.step()
    return total
