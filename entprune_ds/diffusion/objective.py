"""What training minimises: draws (noise, t, dropped labels) -> z_t and target -> loss per example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds.diffusion.interpolant import linear_path
from entprune_ds.rng import normal_per_slot, uniform_per_slot


@dataclass(frozen=True)
class Draws:
    """One batch at the border of the model: z_t and target (N,C,H,W), t (N,) in [0,1], labels (N,) i64."""

    z_t: Tensor
    t: Tensor
    labels: Tensor
    target: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Draws:
        """Move to a device; z_t takes `dtype`, t and target keep f32 unless `dtype` is f64."""
        wide = torch.promote_types(dtype, torch.float32)
        return Draws(
            self.z_t.to(device, dtype), self.t.to(device, wide), self.labels.to(device), self.target.to(device, wide)
        )

    def split(self, size: int) -> list[Draws]:
        """Micro-batches of `size` examples."""
        columns = (self.z_t.split(size), self.t.split(size), self.labels.split(size), self.target.split(size))
        return [Draws(*parts) for parts in zip(*columns, strict=True)]


def make_draws(
    latents: Tensor, labels: Tensor, slots: Sequence[int], *, seed: int, purpose: str, step: int,
    label_dropout: float = 0.0, null_label: int = -1,
) -> Draws:  # fmt: skip
    """Draw noise, t ~ U(0,1) and label dropout for a batch; every example has its own streams.

    Args:
        latents: data (N,C,H,W) f32.
        labels: (N,) i64.
        slots: positions of the examples in the global batch; with `step` they name the streams.
        seed, purpose, step: see rng.generator_for.
        label_dropout: probability of replacing a label by `null_label`.
        null_label: index of the null label.
    """
    slots = list(slots)
    noise = normal_per_slot(seed, f"{purpose}/noise", step, slots, tuple(latents.shape[1:]))
    t = uniform_per_slot(seed, f"{purpose}/t", step, slots)
    if label_dropout > 0:
        dropped = uniform_per_slot(seed, f"{purpose}/label_dropout", step, slots) < label_dropout
        labels = torch.where(dropped, null_label, labels)
    z_t, target = linear_path(latents, noise, t)
    return Draws(z_t, t, labels, target)


def loss_per_example(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity, (N,C,H,W) x 2 -> (N,) f32 or f64 (SiT, eq. 6)."""
    difference = prediction.to(torch.promote_types(prediction.dtype, torch.float32)) - target
    return difference.square().flatten(1).mean(dim=1)
