"""Gaussian data: the best predictions are affine, so every sampler is an affine map with known mean and covariance.

In the basis of the data's covariance every coordinate is a problem of one number, with data ~ N(mu, lam): `Line` holds
the mean and the variance of the sampler's state there and goes through its steps one by one, in Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import processes

SHAPE = (2, 1, 2)
D = 4
_RANDOM = torch.Generator().manual_seed(5)
BASIS = torch.linalg.qr(torch.randn(D, D, generator=_RANDOM, dtype=torch.float64))[0]
VARIANCES = (0.05, 0.3, 0.8, 1.7)
CENTRE = (0.9, -0.4, 0.2, -1.1)
"""Mean of the data in the basis."""
LOGIT = 0.3
"""Variance logit of the diffusion model."""


def best_noise(z: Tensor, a: Tensor | float, s: Tensor | float) -> Tensor:
    """E[noise | z] for z = a data + s noise; z (N,*SHAPE), a and s numbers or (N,1)."""
    lam, mu = (torch.tensor(v, dtype=z.dtype) for v in (VARIANCES, CENTRE))
    basis = BASIS.to(z.dtype)
    y = z.flatten(1) @ basis  # (N,D)
    return ((s * (y - a * mu) / (a**2 * lam + s**2)) @ basis.T).view_as(z)


def flow_model(path: str, prediction: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The best model of a path, from closed forms."""

    def model(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        wide, lam = t.double().reshape(-1, 1), torch.tensor(VARIANCES, dtype=torch.float64)
        with torch.enable_grad():
            leaf = wide.detach().requires_grad_()
            values = [f(path, leaf) for f in (processes.alpha, processes.sigma)]
            slopes = [torch.autograd.grad(v.sum(), leaf)[0].to(z.dtype) for v in values]
        (a, s), (da, ds) = [v.detach().to(z.dtype) for v in values], slopes
        noise = best_noise(z, a, s)
        if prediction == "noise":
            return noise
        if prediction == "score":
            return -noise / s.view(-1, 1, 1, 1)
        basis, mu = BASIS.to(z.dtype), torch.tensor(CENTRE, dtype=z.dtype)
        y = z.flatten(1) @ basis
        data = mu + a * lam.to(z.dtype) * (y - a * mu) / (a**2 * lam.to(z.dtype) + s**2)
        return ((data @ basis.T) * da).view_as(z) + ds.view(-1, 1, 1, 1) * noise

    return model


def chain_model(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The best diffusion model (N,2C,H,W), with constant variance logits; asks for whole, equal timesteps."""
    assert t.dtype == z.dtype and bool((t == t[0]).all()) and float(t[0]).is_integer()
    bar = processes.alpha_bar(int(t[0]))
    return torch.cat([best_noise(z, math.sqrt(bar), math.sqrt(1 - bar)), torch.full_like(z, LOGIT)], dim=1)


@dataclass
class Line:
    """One coordinate: data ~ N(mu, lam), state ~ N(mean, variance)."""

    mu: float
    lam: float
    mean: float = 0.0
    variance: float = 1.0

    def noise(self, a: float, s: float) -> tuple[float, float]:
        """(slope, offset) of the best noise prediction in z."""
        slope = s / (a * a * self.lam + s * s)
        return slope, -slope * a * self.mu

    def velocity(self, path: str, t: float) -> tuple[float, float]:
        """(slope, offset) of the flow's velocity."""
        a, s, da, ds = processes.coefficients(path, t)
        gain = a * self.lam / (a * a * self.lam + s * s)  # of the best data prediction
        slope, offset = self.noise(a, s)
        return da * gain + ds * slope, da * (self.mu - gain * a * self.mu) + ds * offset

    def score(self, path: str, t: float) -> tuple[float, float]:
        """(slope, offset) of the score."""
        a, s, _, _ = processes.coefficients(path, t)
        total = a * a * self.lam + s * s
        return -1 / total, a * self.mu / total

    def move(self, slope: float, offset: float, variance: float = 0.0) -> None:
        """z <- slope z + offset + normal noise of a variance."""
        self.mean, self.variance = slope * self.mean + offset, slope**2 * self.variance + variance


def lines() -> list[Line]:
    """One Line per coordinate."""
    return [Line(mu, lam) for mu, lam in zip(CENTRE, VARIANCES, strict=True)]


def moments(found: list[Line]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D,D) in the space of the images."""
    mean = torch.tensor([line.mean for line in found], dtype=torch.float64)
    variance = torch.tensor([line.variance for line in found], dtype=torch.float64)
    return BASIS @ mean, BASIS @ torch.diag(variance) @ BASIS.T


def after_ode(method: str, path: str, num_steps: int, start: float, end: float) -> list[Line]:
    """Euler's and Heun's methods."""
    found, h = lines(), (end - start) / num_steps
    for line in found:
        for i in range(num_steps):
            t = start + i * h
            slope, offset = line.velocity(path, t)
            if method == "heun":
                late, late_offset = line.velocity(path, t + h)
                slope, offset = (
                    (slope + late * (1 + h * slope)) / 2,
                    (offset + late * h * offset + late_offset) / 2,
                )
            line.move(1 + h * slope, h * offset)
    return found


def after_flow(path: str, start: float, end: float) -> list[Line]:
    """The flow itself, which keeps (z - a mu) / sqrt(a^2 lam + s^2) of every coordinate."""
    found = lines()
    (a0, s0, *_), (a1, s1, *_) = processes.coefficients(path, start), processes.coefficients(path, end)
    for line in found:
        factor = math.sqrt((a1 * a1 * line.lam + s1 * s1) / (a0 * a0 * line.lam + s0 * s0))
        line.move(factor, a1 * line.mu - factor * a0 * line.mu)
    return found


def after_sde(
    path: str, num_steps: int, start: float, end: float, form: str, norm: float, last_step: str, size: float
) -> list[Line]:
    """Euler-Maruyama: num_steps - 1 steps and the last one, or num_steps without a last one."""
    found, count = lines(), num_steps - (last_step != "none")
    h = (end - start) / count
    for line in found:
        for i in range(count):
            t = start + i * h
            w, (v, v0), (g, g0) = processes.diffusion(path, form, norm, t), line.velocity(path, t), line.score(path, t)
            line.move(1 + h * (v + w * g), h * (v0 + w * g0), 2 * w * h)
        a, s, _, _ = processes.coefficients(path, end)
        w, (v, v0), (g, g0) = (
            processes.diffusion(path, form, norm, end),
            line.velocity(path, end),
            line.score(path, end),
        )
        if last_step == "mean":
            line.move(1 + size * (v + w * g), size * (v0 + w * g0))
        elif last_step == "euler":
            line.move(1 + size * v, size * v0)
        elif last_step == "tweedie":
            line.move((1 + s * s * g) / a, s * s * g0 / a)
    return found


def after_ddpm(timesteps: list[int]) -> list[Line]:
    """Ancestral sampling from the last timestep to the data."""
    found = lines()
    for k in reversed(range(len(timesteps))):
        bar = processes.alpha_bar(timesteps[k])
        variance = math.exp(processes.log_variance(timesteps, k, LOGIT)) if k else 0.0
        by_data = processes.posterior(timesteps, k, 1.0, 0.0)[0]
        by_z = processes.posterior(timesteps, k, 0.0, 1.0)[0]
        for line in found:
            slope, offset = line.noise(math.sqrt(bar), math.sqrt(1 - bar))
            data, data0 = (1 - math.sqrt(1 - bar) * slope) / math.sqrt(bar), -math.sqrt((1 - bar) / bar) * offset
            line.move(by_data * data + by_z, by_data * data0, variance)
    return found


def after_ddim(timesteps: list[int], eta: float) -> list[Line]:
    """DDIM: predicted data, the direction to z, and fresh noise."""
    found = lines()
    for k in reversed(range(len(timesteps))):
        bar, prev = processes.alpha_bar(timesteps[k]), processes.alpha_bar(timesteps[k - 1]) if k else 1.0
        fresh = eta**2 * (1 - prev) / (1 - bar) * (1 - bar / prev)
        direction = math.sqrt(1 - prev - fresh)
        for line in found:
            slope, offset = line.noise(math.sqrt(bar), math.sqrt(1 - bar))
            data, data0 = (1 - math.sqrt(1 - bar) * slope) / math.sqrt(bar), -math.sqrt((1 - bar) / bar) * offset
            line.move(math.sqrt(prev) * data + direction * slope, math.sqrt(prev) * data0 + direction * offset, fresh)
    return found
