"""Classifier-free guidance: v = v_null + scale * (v_label - v_null)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_guidance(model: Model, scale: float, null_label: int) -> Model:
    """Wrap a model (z_t, t, labels) -> prediction (Ho & Salimans, arXiv 2207.12598, eq. 6).

    Args:
        model: the unguided model.
        scale: guidance scale; 1 returns the model itself, at half of the cost.
        null_label: index of the null label.
    """
    if scale == 1.0:
        return model

    def guided(z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        both_labels = torch.cat([labels, torch.full_like(labels, null_label)])
        conditional, unconditional = model(torch.cat([z_t, z_t]), torch.cat([t, t]), both_labels).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided
