"""LoRA on the linear layers of a block: W x + 2 up (down x), the base weights frozen (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprune_ds.rng import generator_for

SCALE = 2.0
"""alpha / rank, as TinyFusion has it (alpha = 2 rank)."""


class Adapter(NamedTuple):
    """The two factors of one layer; up starts at 0, so that nothing changes at first."""

    down: Tensor
    """(rank, d_in)."""
    up: Tensor
    """(d_out, rank)."""


Adapters = dict[str, Adapter]
"""By the name of the layer in its block."""


def new_adapters(block: nn.Module, rank: int, seed: int, purpose: str, step: int) -> Adapters:
    """Fresh adapters of all nn.Linear of a block, in its precision; none for rank 0.

    Args:
        block: the block.
        rank: of the factors; at most the layer's smaller side is used.
        seed, purpose, step: see rng.generator_for; every layer has a stream of its own.
    """
    adapters = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and rank > 0:
            used = min(rank, module.in_features, module.out_features)
            generator = generator_for(seed, f"{purpose}.{name}", step)
            down = torch.randn(used, module.in_features, generator=generator) / module.in_features**0.5
            up = torch.zeros(module.out_features, used)
            adapters[name] = Adapter(*(factor.to(module.weight).requires_grad_() for factor in (down, up)))
    return adapters


@contextmanager
def adapted(block: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[nn.Module]:
    """The block with its adapters; no hook is left behind."""
    handles = [block.get_submodule(name).register_forward_hook(_added(a)) for name, a in adapters.items()]
    try:
        yield block
    finally:
        for handle in handles:
            handle.remove()


def _added(adapter: Adapter) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + SCALE * F.linear(F.linear(args[0], adapter.down), adapter.up)

    return hook
