"""The last moment at which an optimizer step can be left out: gradients are reduced, nothing has changed yet.

Every layout of DeepSpeed (plain, 16-bit wrapper, ZeRO 1 to 3, pipelines) ends a step by calling our own torch
optimizer; ZeRO calls it once per group of parameters. That call is where all ranks ask whether the step counts. A call
that is left out leaves fp32 weights, moments and step count as they are, to the bit. DeepSpeed itself leaves some steps
with infinite gradients out earlier, and some not, by layout: both come to the same here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
