"""The last moment at which an optimizer step can be left out: gradients are reduced, nothing has changed yet.

Every layout of DeepSpeed (plain, 16-bit wrapper, ZeRO 1 to 3, pipelines) ends a step by calling our own torch
optimizer; ZeRO calls it once per group of parameters. That call is where all ranks ask whether the step counts. A call
that is left out leaves fp32 weights, moments and step count as they are, to the bit. DeepSpeed itself leaves some steps
with infinite gradients out earlier, and some not, by layout: both come to the same here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from entprune_ds import comm

if TYPE_CHECKING:
    from entprune_ds.engine.build import Engine


class StepGuard:
    """Stands before the optimizer of one engine; without a question every step passes.

    Args:
        optimizer: whose `step` it takes over.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._step: Callable[..., Any] = optimizer.step
        self._ask: Callable[[], bool] | None = None
        self.allowed: bool | None = None
        """The answer of the newest question; None before it is asked."""
        optimizer.step = self._step_if_allowed  # type: ignore[method-assign]

    def _step_if_allowed(self, closure: Any = None) -> Any:
        if self._ask is None:
            return self._step(closure)
        if self.allowed is None:
            self.allowed = self._ask()
        return self._step(closure) if self.allowed else None

    @contextmanager
    def asking(self, ask: Callable[[], bool]) -> Iterator[None]:
        """Ask once, in the optimizer step inside; collective when `ask` is. Asked at the end if DeepSpeed left it out.

        Args:
            ask: whether the step counts; equal on all ranks.
        """
        self._ask, self.allowed = ask, None
        try:
            yield
            if self.allowed is None:
                self.allowed = ask()
        finally:
            self._ask = None


def step_figures(engine: Engine) -> tuple[float, bool]:
    """Mean loss of the global batch, and whether the gradient is finite; equal on all ranks. Collective.

    One reduction of two numbers. DeepSpeed has waited for the norm of the gradient just before.
    """
    loss, holds = last_loss(engine), engine.cut is None or engine.pipe_stage == len(engine.cut) - 1
    mine = loss.float() / engine.dp_size if holds else torch.zeros((), device=comm.device())
    figures = torch.stack([mine, _infinite_gradient(engine)])
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
