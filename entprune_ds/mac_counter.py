"""Multiply-accumulates that a piece of work really takes, counted operator by operator, backward passes too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class MacCounter(TorchDispatchMode):
    """Counts matrix products, convolutions and attention of this process while it is entered.

    Element-wise work is left out, as in `models.registry.count_macs`. Every operator passes through Python once
    more: about 8 % of a small model's time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.macs += flops(*args, **(kwargs or {}), out_val=out) // 2
        return out


@contextmanager
def counted(wanted: bool) -> Iterator[MacCounter | None]:
    """A counter over the body, or None where it is not wanted and costs nothing."""
    if not wanted:
        yield None
        return
    with MacCounter() as counter:
        yield counter
