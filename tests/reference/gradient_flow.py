"""||grad L||^2 and its derivative by gates, by plain double backward through a whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Gates = dict[str, dict[str, Tensor]]


def norm_squared(model: nn.Module, loss: Callable[[], Tensor], gates: Gates) -> Tensor:
    """Squared norm of the gradient by the parameters of all blocks, differentiable by the gates."""
    with sdpa_kernel(SDPBackend.MATH):
        for index, values in gates.items():
            model.blocks[index].set_gates(values)
        gradients = torch.autograd.grad(loss(), list(model.blocks.parameters()), create_graph=True)
        for index in gates:
            model.blocks[index].set_gates({})
    return sum(g.square().sum() for g in gradients)


def rises(model: nn.Module, loss: Callable[[], Tensor], gates: Gates) -> tuple[float, Gates]:
    """||grad L||^2 and S = - d ||grad L||^2 / d gate of every gate."""
    leaves = {b: {n: g.detach().clone().requires_grad_() for n, g in values.items()} for b, values in gates.items()}
    norm = norm_squared(model, loss, leaves)
    flat = [g for values in leaves.values() for g in values.values()]
    derivatives = iter(torch.autograd.grad(norm, flat))
    return norm.item(), {b: {n: -next(derivatives) for n in values} for b, values in leaves.items()}
