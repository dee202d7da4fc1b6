"""NTK Gram matrix and ZiCo by autograd over the parameters themselves, one sample or one batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ntk_gram(model: nn.Module, z_t: Tensor, t: Tensor, labels: Tensor, projection: Tensor) -> Tensor:
    """Gram matrix (N,N) of per-sample gradients of <projection, output> by ALL parameters of the blocks."""
    parameters = list(model.blocks.parameters())
    rows = []
    for i in range(len(z_t)):
        output = model(z_t[i : i + 1], t[i : i + 1], labels[i : i + 1])
        gradients = torch.autograd.grad((output[0] * projection).sum(), parameters)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    matrix = torch.stack(rows)
    return matrix @ matrix.T


def zico_layers(model: nn.Module, batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[float]:
    """log sum_w mean_b|g_b| / std_b(g_b) of every linear layer of the blocks, for a mean-squared loss."""
    weights = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    of_batches = []
    for z_t, t, labels, target in batches:
        loss = (model(z_t, t, labels) - target).square().mean()
        of_batches.append(torch.autograd.grad(loss, weights))
    layers = []
    for gradients in zip(*of_batches, strict=True):
        g = torch.stack(gradients)
        ratio = g.abs().mean(0) / g.std(0, correction=0)
        layers.append(ratio[torch.isfinite(ratio)].sum().log().item())
    return layers


def taylor(model: nn.Module, losses: list[Tensor]) -> tuple[dict[int, float], dict[int, float]]:
    """sum |w g| of every block and its jackknife standard error, by autograd of each batch's share of the loss.

    Args:
        model: holds the parameters.
        losses: one scalar per batch; the loss is their mean.
    """
    values, errors = {}, {}
    for name, block in model.blocks.items():
        parameters = list(block.parameters())
        of_batches = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]

        def score(batches: list[int], of_batches: list = of_batches, parameters: list = parameters) -> float:
            means = [sum(of_batches[b][i] for b in batches) / len(batches) for i in range(len(parameters))]
            return sum((p * g).abs().sum().item() for p, g in zip(parameters, means, strict=True))

        every = list(range(len(losses)))
        values[int(name)] = score(every)
        rest = torch.tensor([score([b for b in every if b != left]) for left in every], dtype=torch.float64)
        errors[int(name)] = ((len(every) - 1) * rest.var(correction=0)).sqrt().item()
    return values, errors
