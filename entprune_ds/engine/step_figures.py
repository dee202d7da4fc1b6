"""What all ranks know of a step before the optimizer takes it: the mean loss, and whether the gradient is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.engine.build import Engine


def step_figures(engine: Engine) -> tuple[float, bool]:
    """Mean loss of the global batch, and whether the gradient is finite; equal on all ranks. Collective.

    One reduction of two numbers. DeepSpeed has waited for the norm of the gradient just before.
    """
    loss, holds = last_loss(engine), engine.cut is None or engine.pipe_stage == len(engine.cut) - 1
    mine = loss.float() / engine.dp_size if holds else torch.zeros((), device=comm.device())
    figures = torch.stack([mine, _infinite_gradient(engine)])
    with engine.parts.part("communication"):  # here ranks wait for each other
        mean, infinite = comm.all_reduce_sum(figures).tolist()
    return mean, infinite == 0


def last_loss(engine: Engine) -> Tensor:
    """Loss of the newest batch of this data-parallel rank, as far as this stage knows it, else 0. Local."""
    if engine.cut is None:
        return engine.batch_loss
    total = engine.ds.total_loss  # of the micro-batches, on the last stage
    zero = torch.zeros((), device=comm.device())
    return zero if total is None else total.detach() / engine.ds.gradient_accumulation_steps()


def _infinite_gradient(engine: Engine) -> Tensor:
    """1 when the gradient as this rank sees it is NaN or infinite, else 0; not synchronised."""
    norm = vars(engine.ds.optimizer).get("_global_grad_norm")
    if norm is None:  # the plain optimizer: clipped or not, what was infinite is NaN or infinite
        gradients = [p.grad for g in engine.optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    value = torch.as_tensor(norm, device=comm.device()).float().max()
    return (~torch.isfinite(value) | (value < 0)).float()  # DeepSpeed writes -1 for infinite ones
