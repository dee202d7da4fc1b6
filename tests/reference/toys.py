"""Models for scoring tests: a random DiT, and a toy whose blocks are any functions of the stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from entprune_ds.config import ModelConfig
from entprune_ds.importance.parts import ModuleParts
from entprune_ds.models.dit import DiT
from entprune_ds.rng import generator_for


def random_dit(seed: int = 0, **changes: object) -> DiT:
    """Small float64 DiT with all weights random (a fresh adaLN-Zero model would be the identity)."""
    sizes = dict(depth=5, hidden_size=16, num_heads=2, patch_size=2, input_size=4, in_channels=1, num_classes=3)
    model = DiT(ModelConfig(**(sizes | changes))).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.5 / p.shape[-1] ** 0.5, generator=generator_for(seed, name))
    return model


def draws(model: DiT, count: int, seed: int = 0, step: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_t (N,C,H,W) f64, t (N,) f64, labels (N,) i64, target (N,C,H,W) f64; a pure function of (seed, step)."""
    generator, side = generator_for(seed, "test draws", step), model.side * model.patch_size
    shape = (count, model.in_channels, side, side)
    z_t, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(count, generator=generator, dtype=torch.float64)
    return z_t, t, torch.randint(0, 3, (count,), generator=generator), target


def mean_squared(prediction: Tensor, target: Tensor, t: Tensor | None = None) -> Tensor:
    """Loss per example (N,); a velocity loss does not look at t."""
    return (prediction - target).square().flatten(1).mean(1)


class Apply(nn.Module):
    """A block that is a function of the stream."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.function(x)


class ToyModel(nn.Module):
    """Pixels are tokens, channels the width; embed and head only reshape: the output is what the blocks make of z_t."""

    in_channels = None  # all of them

    def __init__(self, *functions: Callable[[Tensor], Tensor] | nn.Module, first_index: int = 0):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))
        blocks = [f if isinstance(f, nn.Module) else Apply(f) for f in functions]
        self.blocks = nn.ModuleDict({str(first_index + i): block for i, block in enumerate(blocks)})

    def embed(self, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.shape = z_t.shape[1:]
        return z_t.flatten(2).transpose(1, 2), z_t.new_zeros(len(z_t), z_t.shape[1])

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, self.shape[1:])


class CountingParts(ModuleParts):
    """Counts requests for blocks, and samples that went through them."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.requests: list[int] = []
        self.samples = self.largest_call = 0

    def block(self, index: int) -> nn.Module:
        self.requests.append(index)
        block = super().block(index)
        block.register_forward_pre_hook(self._count)
        return block

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.samples += len(args[0])
        self.largest_call = max(self.largest_call, len(args[0]))
