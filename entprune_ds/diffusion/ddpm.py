"""The diffusion process of DiT: linear betas, respacing, posterior, learned-range variance, variational term.

Papers: DDPM (Ho et al., arXiv 2006.11239), improved DDPM (Nichol & Dhariwal, arXiv 2102.09672). Timesteps run from 0
(almost data) to 999 (noise); alpha_bar is the share of data variance in z_t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
BETAS = (1e-4, 2e-2)


def space_timesteps(count: int) -> tuple[int, ...]:
    """`count` original timesteps, ascending, evenly spread over 0..999 with both ends (official rule, one section).

    Raises:
        ValueError: a count outside [2, 1000].
    """
    if not 2 <= count <= NUM_TIMESTEPS:
        raise ValueError(f"a diffusion sampler takes 2 to {NUM_TIMESTEPS} steps, got {count}.")
    stride = (NUM_TIMESTEPS - 1) / (count - 1)
    places = accumulate([stride] * (count - 1), initial=0.0)  # summed up, as the official code rounds its sums
    return tuple(round(place) for place in places)


@dataclass(frozen=True, eq=False)
class Chain:
    """The process on some of the original timesteps; every tensor is (K,), float64 unless stated."""

    timesteps: Tensor
    """Original timesteps i64, ascending: what the model is told."""
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    """alpha_bar of the timestep before; 1 for the first."""
    log_beta: Tensor
    """Log of beta, the largest variance of a step."""
    log_posterior: Tensor
    """Log of the posterior's variance, the smallest; the first, which would be -inf, is that of the second."""
    data_factor: Tensor
    """Posterior mean = data_factor * data + z_factor * z_t (DDPM, eq. 7)."""
    z_factor: Tensor
    noise_ratio: Tensor
    """data = z_t / sqrt(alpha_bar) - noise_ratio * noise."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Chain:
        """Copy with floating tensors of a dtype on a device."""
        floats = {k: v.to(device, dtype) for k, v in vars(self).items() if k != "timesteps"}
        return Chain(timesteps=self.timesteps.to(device), **floats)


@lru_cache(maxsize=16)
def chain(timesteps: tuple[int, ...]) -> Chain:
    """The process restricted to some original timesteps, ascending: betas from the ratios of their alpha_bar."""
    betas = torch.linspace(*BETAS, NUM_TIMESTEPS, dtype=torch.float64)
    index = torch.tensor(timesteps)
    alpha_bar = torch.cumprod(1 - betas, 0)[index]
    prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / prev
    posterior = beta * (1 - prev) / (1 - alpha_bar)
    return Chain(
        timesteps=index, alpha_bar=alpha_bar, alpha_bar_prev=prev, log_beta=beta.log(),
        log_posterior=torch.cat([posterior[1:2], posterior[1:]]).log(),
        data_factor=beta * prev.sqrt() / (1 - alpha_bar),
        z_factor=(1 - prev) * (alpha_bar / prev).sqrt() / (1 - alpha_bar),
        noise_ratio=(1 / alpha_bar - 1).sqrt(),
    )  # fmt: skip


@lru_cache(maxsize=4)
def full_chain(device: torch.device, dtype: torch.dtype) -> Chain:
    """All 1000 timesteps on a device; kept, because training asks at every step."""
    return chain(tuple(range(NUM_TIMESTEPS))).to(device, dtype)


def noised(data: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """z_t (N,C,H,W) of data and noise (N,C,H,W) at original timesteps (N,) i64 (DDPM, eq. 4)."""
    shape = (-1, *[1] * (data.dim() - 1))
    alpha_bar = full_chain(data.device, torch.float64).alpha_bar[timesteps].reshape(shape)
    return alpha_bar.sqrt().to(data.dtype) * data + (1 - alpha_bar).sqrt().to(data.dtype) * noise


def log_variance(logits: Tensor, log_posterior: Tensor | float, log_beta: Tensor | float) -> Tensor:
    """Learned-range log variance: logits -1..1 go from the posterior's to beta (improved DDPM, eq. 15)."""
    share = (logits + 1) / 2
    return share * log_beta + (1 - share) * log_posterior


def variational_term(epsilon: Tensor, logits: Tensor, noise: Tensor, data: Tensor, timesteps: Tensor) -> Tensor:
    """The term of the variational bound at each example's timestep, in bits per element, (N,).

    KL(q(z_{t-1} | z_t, data) || p(z_{t-1} | z_t)); at timestep 0 the negative log likelihood of the data in bins of
    width 2/255 (DDPM, eq. 5, sec. 3.3). The two means differ by data_factor * noise_ratio * (epsilon - noise), and at
    timestep 0 the mean is the predicted data.

    Args:
        epsilon, logits: (N,C,H,W), the two halves of the prediction, f32 or f64.
        noise, data: (N,C,H,W), behind z_t.
        timesteps: (N,) i64, original.
    """
    shape = (-1, *[1] * (epsilon.dim() - 1))
    table = full_chain(epsilon.device, epsilon.dtype)
    log_posterior, log_beta, noise_ratio, data_factor = (
        column[timesteps].reshape(shape)
        for column in (table.log_posterior, table.log_beta, table.noise_ratio, table.data_factor)
    )
    log_var = log_variance(logits, log_posterior, log_beta)
    from_data = noise_ratio * (epsilon - noise)  # data - predicted data
    kl = log_var - log_posterior - 1 + torch.exp(log_posterior - log_var)
    kl = (kl + (data_factor * from_data).square() * torch.exp(-log_var)) / 2
    nll = -binned_log_likelihood(data, from_data, log_var / 2)
    nats = torch.where((timesteps == 0).reshape(shape), nll, kl)
    return nats.flatten(1).mean(1) / math.log(2.0)


def step_divergence(
    epsilon: Tensor, logits: Tensor, teacher: Tensor, teacher_logits: Tensor, timesteps: Tensor
) -> Tensor:
    """KL of the teacher's p(z_{t-1} | z_t) from ours in bits per element, (N,); the variances are learned ranges.

    Args:
        epsilon, logits: (N,C,H,W), the two halves of our prediction, f32 or f64; the same of the teacher's.
        timesteps: (N,) i64, original.
    """
    shape = (-1, *[1] * (epsilon.dim() - 1))
    table = full_chain(epsilon.device, epsilon.dtype)
    log_posterior, log_beta = (column[timesteps].reshape(shape) for column in (table.log_posterior, table.log_beta))
    log_var = log_variance(logits, log_posterior, log_beta)
    log_wanted = log_variance(teacher_logits, log_posterior, log_beta)
    means_apart = (table.data_factor * table.noise_ratio)[timesteps].reshape(shape) * (epsilon - teacher)
    nats = log_var - log_wanted - 1 + torch.exp(log_wanted - log_var) + means_apart.square() * torch.exp(-log_var)
    return nats.flatten(1).mean(1) / (2 * math.log(2.0))


def binned_log_likelihood(data: Tensor, centered: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability (N,C,H,W) of the bin of width 2/255 around data, the outermost bins open (DDPM, eq. 13).

    With the tanh approximation of the normal distribution function and the floor 1e-12 of the official code, so that
    losses equal it. Latents are treated as it treats them, like pixels in [-1, 1].

    Args:
        data: (N,C,H,W).
        centered: data minus the mean; log_scale: log of the standard deviation.
    """
    inverse = torch.exp(-log_scale)
    upper, lower = _normal_cdf(inverse * (centered + 1 / 255)), _normal_cdf(inverse * (centered - 1 / 255))
    inner = torch.where(data > 0.999, 1 - lower, upper - lower)
    return torch.where(data < -0.999, upper, inner).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Distribution function of the standard normal, to 2e-4 (Page 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
