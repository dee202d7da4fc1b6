"""ODE samplers of the flow dz/dt = v(z, t) in equal steps: from noise at t = 0 to data at t = 1."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def times(num_steps: int, noise: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
    """num_steps + 1 times from `start` to `end`, in f32, or f64 where the noise is."""
    dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    return torch.linspace(start, end, num_steps + 1, dtype=dtype, device=noise.device)


@torch.no_grad()
def euler(
    velocity: Velocity, noise: Tensor, labels: Tensor, num_steps: int, start: float = 0.0, end: float = 1.0
) -> Tensor:
    """Euler's method, first order, one evaluation a step.

    Args:
        velocity: (z (N,C,H,W), t (N,), labels (N,)) -> (N,C,H,W).
        noise: start (N,C,H,W).
        labels: (N,) i64.
        num_steps: equal steps over [start, end].
    """
    z = noise
    for now, then in pairwise(times(num_steps, noise, start, end)):
        z = z + (then - now) * velocity(z, now.expand(len(z)), labels)
    return z


@torch.no_grad()
def heun(
    velocity: Velocity, noise: Tensor, labels: Tensor, num_steps: int, start: float = 0.0, end: float = 1.0
) -> Tensor:
    """Heun's method (explicit trapezoid), second order, two evaluations a step; arguments as `euler`."""
    z = noise
    for now, then in pairwise(times(num_steps, noise, start, end)):
        v_now = velocity(z, now.expand(len(z)), labels)
        v_then = velocity(z + (then - now) * v_now, then.expand(len(z)), labels)
        z = z + (then - now) * (v_now + v_then) / 2
    return z


SAMPLERS = {"euler": euler, "heun": heun}
