"""Settings of samples and of figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    sampler: str = "euler"
    """process=sit: euler, heun, dopri5 (ODE) or sde (Euler-Maruyama); process=dit: ddpm or ddim."""
    num_steps: int = 25
    """Sampler steps (dopri5 chooses its own)."""
    atol: float = 1e-6
    """dopri5: absolute tolerance."""
    rtol: float = 1e-3
    """dopri5: relative tolerance."""
    sde_diffusion: str = "sigma"
    """sde: diffusion coefficient: constant, sbdm, sigma, linear, decreasing or increasing-decreasing."""
    sde_norm: float = 1.0
    """sde: factor of the diffusion coefficient."""
    sde_last_step: str = "mean"
    """sde: last step: none, mean, tweedie or euler."""
    sde_last_step_size: float = 0.04
    """sde: size of the last step."""
    ddim_eta: float = 0.0
    """ddim: 0 is deterministic, 1 has the noise of ddpm."""
    cfg_scale: float = 1.0
    """Classifier-free guidance scale; 1 is no guidance."""
    cfg_channels: int | None = None
    """Channels that are guided: 3 is the published protocol of DiT and SiT; null guides all."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Part of the sampling in which guidance acts, from 0 (pure noise) to 1 (data)."""
    vae: str = ""
    """Decoder of latents: folder or hub name of a diffusers AutoencoderKL; empty for models of pixels."""
    vae_revision: str = ""
    """Revision of a hub name; recorded with the samples."""
    num_samples: int = 1797
    """Samples to draw; labels follow `labels`."""
    batch_size: int = 256
    """Samples drawn together."""
    seed: int = 0
    """Seed; every sample has its own stream, so the number of ranks and the batch do not matter."""
    labels: str = "uniform"
    """Labels: uniform (independent uniform draws) or balanced (0, 1, 2, ... repeated)."""
    out: str = ""
    """Output: a folder of PNG files, or a path ending in .npz."""
    grid: int = 80
    """Samples shown in the PNG grid."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    baseline: str = ""
    """Model folder to compare with (the unpruned base); empty evaluates one model only."""
    latency_batches: tuple[int, ...] = (1, 64)
    """Batch sizes of the latency measurement."""
    latency_repeats: int = 15
    """Interleaved repeats of the latency measurement; the median counts."""
    samples: str = ""
    """Samples of the model, an npz written by `entprune-ds sample`; empty draws them now."""
    baseline_samples: str = ""
    """Samples of the baseline, likewise."""
    out: str = ""
    """JSON file of the figures."""
