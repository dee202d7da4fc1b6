"""Paths between noise and data: z_t = alpha(t) * data + sigma(t) * noise, t = 1 is data (SiT's convention)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

VP_BETAS = (0.1, 20.0)
"""Noise rates of the VP path at t = 1 (data) and t = 0 (noise), as in the official code."""


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t (N,) -> (N,1,1,...) for broadcasting against `like`."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Coefficients:
    """A path at some times; every tensor has the shape of t."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    """Derivative of alpha in t."""
    d_sigma: Tensor
    """Derivative of sigma in t; infinite at t = 1 on the VP path."""
    growth: Tensor
    """d_alpha / alpha; infinite at t = 0 on the linear and GVP paths."""

    @property
    def score_factor(self) -> Tensor:
        """lambda in velocity = growth * z_t + lambda * score (SiT, eq. 9); at least 0."""
        return self.growth * self.sigma**2 - self.sigma * self.d_sigma


@dataclass(frozen=True)
class Path:
    """One row of SiT's table 1 (arXiv 2401.08740)."""

    name: str
    at: Callable[[Tensor], Coefficients]
    """t in [0, 1], any shape -> coefficients."""

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """z_t and the velocity dz_t/dt, both (N,C,H,W), from data and noise (N,C,H,W) and t (N,)."""
        c = self.at(expand(t, data).to(data.dtype))
        return c.alpha * data + c.sigma * noise, c.d_alpha * data + c.d_sigma * noise


def _linear(t: Tensor) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(t, 1 - t, one, -one, 1 / t)


def _gvp(t: Tensor) -> Coefficients:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""
    rate = math.pi / 2
    sin, cos = torch.sin(rate * t), torch.cos(rate * t)
    return Coefficients(sin, cos, rate * cos, -rate * sin, rate * cos / sin)


def _vp(t: Tensor) -> Coefficients:
    """alpha = exp(m), sigma = sqrt(1 - exp(2 m)) of the variance-preserving process (Song et al., arXiv 2011.13456)."""
    low, high = VP_BETAS
    rest = 1 - t
    m = -(rest**2) * (high - low) / 4 - rest * low / 2
    growth = rest * (high - low) / 2 + low / 2  # dm/dt
    alpha, sigma = torch.exp(m), torch.sqrt(-torch.expm1(2 * m))  # expm1: sigma keeps its digits near the data
    return Coefficients(alpha, sigma, alpha * growth, -(alpha**2) * growth / sigma, growth)


PATHS = {path.name: path for path in (Path("linear", _linear), Path("gvp", _gvp), Path("vp", _vp))}


def training_range(path: str, prediction: str) -> tuple[float, float]:
    """Times t0, t1 between which training draws t: the ends where a coefficient is infinite are left out.

    The margins are those of the official code (train_eps): 1e-5 for VP, 1e-3 for scores and noise on the others.
    """
    if path == "vp":
        return 0.0, 1 - 1e-5
    return (0.0, 1.0) if prediction == "velocity" else (1e-3, 1 - 1e-3)


def sampling_range(path: str, prediction: str) -> tuple[float, float]:
    """Times t0, t1 between which ODE samplers go (sample_eps of the official code: 1e-3 where an end is singular)."""
    if path == "vp":
        return 0.0, 1 - 1e-3
    return (0.0, 1.0) if prediction == "velocity" else (1e-3, 1 - 1e-3)


def sde_range(path: str, prediction: str, diffusion_form: str, last_step: float) -> tuple[float, float]:
    """Times t0, t1 between which the SDE sampler takes its steps.

    As in the official code, except that the form `sbdm` starts at 1e-3 for velocity models too: it is infinite at
    t = 0 on the linear and GVP paths.

    Args:
        last_step: size of the step after t1; 0 means that there is none.
    """
    start, end = sampling_range(path, prediction)
    if path != "vp" and diffusion_form == "sbdm":
        start = 1e-3
    return start, (1 - last_step if last_step else end)
