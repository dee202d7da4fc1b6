"""Classifier-free guidance: v = v_null + scale * (v_label - v_null), on some channels and in part of the sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entprune_ds.diffusion.interpolant import expand

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


def with_guidance(
    model: Model, scale: float, null_label: int, *, channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0), progress: Callable[[Tensor], Tensor] = _same,
) -> Model:  # fmt: skip
    """Wrap a model (z_t, t, labels) -> prediction (Ho & Salimans, arXiv 2207.12598, eq. 6).

    Channels that are not guided keep the prediction for the label, as in the official DiT and SiT code: the fourth
    latent channel with `channels` = 3, and the variance half of DiT. Velocity, score and noise are affine in each
    other, so it does not matter which of them is guided.

    Args:
        model: the unguided model.
        scale: guidance scale; 1 returns the model itself, at half of the cost.
        null_label: index of the null label.
        channels: first channels that are guided; None means all.
        interval: part of the sampling, from 0 (noise) to 1 (data), ends included, in which guidance acts
            (Kynkäänniemi et al., arXiv 2404.07724); outside it a step costs half.
        progress: t (N,) as the model gets it -> progress (N,) in [0, 1].
    """
    if scale == 1.0:
        return model

    def guided(z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        acts = _acts(progress(t), interval)
        if acts is not None and not acts.any():
            return model(z_t, t, labels)
        both_labels = torch.cat([labels, torch.full_like(labels, null_label)])
        conditional, unconditional = model(torch.cat([z_t, z_t]), torch.cat([t, t]), both_labels).chunk(2)
        result = unconditional + scale * (conditional - unconditional)
        if channels is not None:
            result = torch.cat([result[:, :channels], conditional[:, channels:]], dim=1)
        return result if acts is None else torch.where(expand(acts, result), result, conditional)

    return guided


def _acts(progress: Tensor, interval: tuple[float, float]) -> Tensor | None:
    """Which examples (N,) lie in the interval; None means all, without looking."""
    low, high = interval
    return None if (low, high) == (0.0, 1.0) else (progress >= low) & (progress <= high)
