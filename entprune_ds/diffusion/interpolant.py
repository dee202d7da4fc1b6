"""Paths between noise and data: z_t = alpha(t) * data + sigma(t) * noise, t = 1 is data (SiT's convention)."""

from __future__ import annotations

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t (N,) -> (N,1,1,...) for broadcasting against `like`."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def linear_path(data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Linear path (SiT, arXiv 2401.08740, table 1): z_t = t data + (1 - t) noise, velocity = data - noise.

    Args:
        data, noise: (N,C,H,W).
        t: (N,) in [0, 1].

    Returns:
        z_t and the velocity dz_t/dt, both (N,C,H,W).
    """
    t = expand(t, data).to(data.dtype)
    return t * data + (1 - t) * noise, data - noise
