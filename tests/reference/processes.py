"""Slow, obvious float64 versions of the two processes: one number at a time, derivatives by autograd, no tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alpha(path: str, t: Tensor) -> Tensor:
    """Share of the data in z_t (SiT, table 1)."""
    if path == "linear":
        return t
    if path == "gvp":
        return torch.sin(math.pi * t / 2)
    return torch.exp(-((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.1 / 2)  # vp


def sigma(path: str, t: Tensor) -> Tensor:
    """Share of the noise in z_t."""
    if path == "linear":
        return 1 - t
    if path == "gvp":
        return torch.cos(math.pi * t / 2)
    return torch.sqrt(1 - alpha(path, t) ** 2)


def coefficients(path: str, t: float) -> tuple[float, float, float, float]:
    """alpha, sigma and their derivatives in t, at one time."""
    values = []
    for function in (alpha, sigma):
        leaf = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        value = function(path, leaf)
        (slope,) = torch.autograd.grad(value, leaf)
        values.append((value.item(), slope.item()))
    (a, da), (s, ds) = values
    return a, s, da, ds


def score_factor(path: str, t: float) -> float:
    """lambda in velocity = (alpha' / alpha) z + lambda score."""
    a, s, da, ds = coefficients(path, t)
    return s * (da * s - a * ds) / a


def diffusion(path: str, form: str, norm: float, t: float) -> float:
    """w(t) of the SDE (SiT, table 2 and the official code)."""
    if form == "constant":
        return norm
    if form == "sbdm":
        return norm * score_factor(path, t)
    if form == "sigma":
        return norm * coefficients(path, t)[1]
    if form == "linear":
        return norm * (1 - t)
    if form == "decreasing":
        return ((norm * math.cos(math.pi * t) + 1) / 2) ** 2
    return norm * math.sin(math.pi * t) ** 2


def flow_loss(path: str, prediction: str, weight: str, output: Tensor, data: Tensor, noise: Tensor, t: float) -> float:
    """Loss of one example (C,H,W): squared velocity error, or the weighted squared noise error."""
    _, s, da, ds = coefficients(path, t)
    factor = 1.0
    if prediction != "velocity" and weight == "velocity":
        factor = (score_factor(path, t) / s) ** 2
    if prediction != "velocity" and weight == "likelihood":
        factor = score_factor(path, t) / s**2
    total, count = 0.0, output.numel()
    for out, x, e in zip(output.flatten().tolist(), data.flatten().tolist(), noise.flatten().tolist(), strict=True):
        if prediction == "velocity":
            error = out - (da * x + ds * e)
        else:
            error = (out if prediction == "noise" else -s * out) - e  # score = -noise / sigma
        total += factor * error**2
    return total / count


def betas(timesteps: list[int]) -> list[float]:
    """Betas of the process that visits only some of the original timesteps."""
    found, before = [], 1.0
    for timestep in timesteps:
        now = alpha_bar(timestep)
        found.append(1 - now / before)
        before = now
    return found


def alpha_bar(timestep: int) -> float:
    """Product of 1 - beta up to an original timestep; 1 before the first."""
    product = 1.0
    for i in range(timestep + 1):
        product *= 1 - (1e-4 + (2e-2 - 1e-4) * i / 999)
    return product


def posterior(timesteps: list[int], k: int, data: float, z: float) -> tuple[float, float]:
    """Mean and variance of z at timesteps[k - 1] given the data and z at timesteps[k], by Bayes' rule for normals."""
    prev = alpha_bar(timesteps[k - 1]) if k else 1.0
    beta = betas(timesteps)[k]
    prior_mean, prior_variance = math.sqrt(prev) * data, 1 - prev
    gain = prior_variance * math.sqrt(1 - beta) / ((1 - beta) * prior_variance + beta)
    mean = prior_mean + gain * (z - math.sqrt(1 - beta) * prior_mean)
    return mean, prior_variance * beta / ((1 - beta) * prior_variance + beta)


def log_variance(timesteps: list[int], k: int, logit: float) -> float:
    """Learned-range log variance of one element; the smallest variance of the first step is that of the second."""
    low = math.log(posterior(timesteps, max(k, 1), 0.0, 0.0)[1])
    high = math.log(betas(timesteps)[k])
    return (logit + 1) / 2 * high + (1 - logit) / 2 * low


def variational_bits(epsilon: float, logit: float, noise: float, data: float, timestep: int) -> float:
    """One element of the variational term at an original timestep, in bits."""
    everything, bar = list(range(1000)), alpha_bar(timestep)
    z = math.sqrt(bar) * data + math.sqrt(1 - bar) * noise
    predicted = (z - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
    mean, log_var = posterior(everything, timestep, predicted, z)[0], log_variance(everything, timestep, logit)
    if timestep > 0:
        true_mean, true_variance = posterior(everything, timestep, data, z)
        ratio = true_variance / math.exp(log_var)
        return (ratio - 1 - math.log(ratio) + (true_mean - mean) ** 2 / math.exp(log_var)) / 2 / math.log(2)
    deviation = math.exp(log_var / 2)
    below = 0.0 if data < -0.999 else _cdf((data - 1 / 255 - mean) / deviation)
    above = 1.0 if data > 0.999 else _cdf((data + 1 / 255 - mean) / deviation)
    return -math.log2(max(above - below, 1e-12))


def _cdf(x: float) -> float:
    return (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
