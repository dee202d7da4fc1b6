"""Leave-one-out scores by brute force: a full pass, then one per dropped block; moments from all outputs at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def output_without(model: nn.Module, dropped: int | None, z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Prediction (N,C,H,W) of the model without one block, by a plain loop."""
    x, c = model.embed(z_t, t, labels)
    for name, block in model.blocks.items():
        if int(name) != dropped:
            x = block(x, c)
    return model.head(x, c)


def brute_force_outputs(model: nn.Module, z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """(1+L,N,C,H,W) in the layout of the sweep."""
    variants = [None, *(int(name) for name in model.blocks)]
    return torch.stack([output_without(model, dropped, z_t, t, labels) for dropped in variants])


def brute_force_scores(outputs: Tensor, target: Tensor, groups: list[list[int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """{score: (values (L,), jackknife standard errors (L,))} for a mean-squared loss, from (1+L,N,C,H,W) float64."""

    def values(draws: list[int]) -> dict[str, Tensor]:
        x, y = outputs[:, draws], target[draws]
        log_sigma = x.std(1, correction=0).log().flatten(1)
        mean, std = x.mean(1).flatten(1), x.std(1, correction=0).flatten(1)
        loss = (x - y).square().flatten(2).mean(2).mean(1)
        signed = log_sigma[1:].sum(1) - log_sigma[0].sum()
        return {
            "signed_ced": signed,
            "ced": signed.abs(),
            "ced_abs": (log_sigma[1:] - log_sigma[0]).abs().sum(1),
            "loss": loss[1:] - loss[0],
            "mse": (x[1:] - x[0]).square().flatten(1).mean(1),
            "ld_pruner": (mean[1:] - mean[0]).norm(dim=1) + (std[1:] - std[0]).norm(dim=1),
        }

    everything = values([i for group in groups for i in group])
    rest = [values([i for other in groups if other is not group for i in other]) for group in groups]
    scale = (len(groups) - 1) / math.sqrt(len(groups))
    errors = {name: torch.stack([r[name] for r in rest]).std(0, correction=1) * scale for name in everything}
    errors["ced"] = errors["signed_ced"]
    return {name: (everything[name], errors[name]) for name in everything}
