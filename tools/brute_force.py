"""Leave-one-out by brute force, and models that count their blocks, for tools/bench_sweep.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Draws = tuple[Tensor, Tensor, Tensor]
"""z_t, t, labels."""


class Counted:
    """Parts of a model that count their blocks' requests and the samples that go through them."""

    def __init__(self, parts: Any):
        self.parts, self.dtype, self.device = parts, parts.dtype, parts.device
        self.embed, self.head = parts.embed, parts.head
        self.requests = self.samples = 0

    def block(self, index: int) -> Any:
        """A block that counts."""
        self.requests += 1
        block = self.parts.block(index)

        def call(x: Tensor, c: Tensor, **branch: str) -> Tensor:
            self.samples += len(x)
            return block(x, c, **branch)

        return call


class OwnBlocks:
    """Parts of an unsharded frozen model, without a copy: what brute force would take."""

    def __init__(self, model: nn.Module):
        first = next(model.parameters())
        self.model, self.dtype, self.device = model, first.dtype, first.device
        self.embed, self.head = model.embed, model.head

    def block(self, index: int) -> Any:
        """The live block."""
        return self.model.blocks[str(index)]  # type: ignore[index]


@torch.no_grad()
def brute_force(parts: Any, kept_blocks: Sequence[int], draws: Draws, chunk: int) -> Tensor:
    """(1+L,N,C,H,W): one batched pass after the other; the embedding alone is shared."""
    x, c = parts.embed(*draws)
    outputs = []
    for dropped in (None, *kept_blocks):
        stream = x.clone()
        for index in kept_blocks:
            if index != dropped:
                block = parts.block(index)
                for start in range(0, len(x), chunk):
                    part = slice(start, start + chunk)
                    stream[part] = block(stream[part], c[part])
        outputs.append(parts.head(stream, c))
    return torch.stack(outputs)


def random_draws(config: Any, count: int, seed: int) -> tuple[Draws, Tensor]:
    """Draws and latents, on the CPU."""
    model, generator = config.model, torch.Generator().manual_seed(seed)
    shape = (count, model.in_channels, model.input_size, model.input_size)
    z_t, latents = (torch.randn(shape, generator=generator) for _ in range(2))
    labels = torch.randint(0, model.num_classes, (count,), generator=generator)
    return (z_t, torch.rand(count, generator=generator), labels), latents
