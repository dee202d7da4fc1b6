"""Samplers of the diffusion process: ancestral DDPM and DDIM, on respaced timesteps.

The model is told the original timestep (0..999) as a float, and predicts epsilon and variance logits (N,2C,H,W).
Predicted data is not clipped, as in the official DiT code: latents have no bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entprune_ds.diffusion.ddpm import chain, log_variance, space_timesteps
from entprune_ds.diffusion.samplers import Velocity
from entprune_ds.diffusion.sde import NoiseAt


def _ask(predict: Velocity, z: Tensor, timestep: int, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Epsilon and variance logits (N,C,H,W) at one timestep."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    t = torch.full((len(z),), float(timestep), dtype=dtype, device=z.device)
    epsilon, logits = predict(z, t, labels).chunk(2, dim=1)
    return epsilon, logits


@torch.no_grad()
def ddpm(predict: Velocity, noise: Tensor, labels: Tensor, noise_at: NoiseAt, num_steps: int) -> Tensor:
    """Ancestral sampling with learned-range variance (DDPM, algorithm 2; improved DDPM, eq. 15).

    Args:
        predict: (z (N,C,H,W), timestep (N,), labels (N,)) -> (N,2C,H,W).
        noise: start (N,C,H,W).
        labels: (N,) i64.
        noise_at: noise of each step; the last step has none.
        num_steps: timesteps, 2 to 1000.
    """
    table, z = chain(space_timesteps(num_steps)), noise
    for number, k in enumerate(reversed(range(num_steps))):
        epsilon, logits = _ask(predict, z, int(table.timesteps[k]), labels)
        data = z / table.alpha_bar[k].sqrt().item() - table.noise_ratio[k].item() * epsilon
        z = table.data_factor[k].item() * data + table.z_factor[k].item() * z
        if k > 0:
            log_var = log_variance(logits, table.log_posterior[k].item(), table.log_beta[k].item())
            z = z + torch.exp(log_var / 2) * noise_at(number).to(z)
    return z


@torch.no_grad()
def ddim(predict: Velocity, noise: Tensor, labels: Tensor, noise_at: NoiseAt, num_steps: int, eta: float) -> Tensor:
    """DDIM (Song et al., arXiv 2010.02502, eq. 12, 16); arguments as `ddpm`. Learned variances are not used.

    Args:
        eta: 0 is deterministic, 1 has the posterior's variance.
    """
    table, z = chain(space_timesteps(num_steps)), noise
    for number, k in enumerate(reversed(range(num_steps))):
        epsilon, _ = _ask(predict, z, int(table.timesteps[k]), labels)
        now, prev = table.alpha_bar[k].item(), table.alpha_bar_prev[k].item()
        data = z / now**0.5 - table.noise_ratio[k].item() * epsilon
        variance = eta**2 * (1 - prev) / (1 - now) * (1 - now / prev)
        z = prev**0.5 * data + (1 - prev - variance) ** 0.5 * epsilon
        if variance > 0:
            z = z + variance**0.5 * noise_at(number).to(z)
    return z
