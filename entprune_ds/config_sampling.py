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
    """Decoder of latents, of a run's grids too: folder or hub name of a diffusers AutoencoderKL; empty: pixels."""
    vae_revision: str = ""
    """Revision of a hub name; recorded with the samples."""
    num_samples: int = 1797
    """Samples to draw; labels follow `labels`."""
    batch_size: int = 256
    """Samples drawn together, and kept in one file until all are there; a kill costs at most these, on every rank."""
    seed: int = 0
    """Seed; every sample has its own stream, so the number of ranks does not matter."""
    tf32: bool = False
    """Round the inputs of fp32 products on GPUs to TF32: faster; DiT's published samples were drawn with it."""
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
    """Samples of the model, an npz or folder written by `entprune-ds sample`; empty draws them now."""
    baseline_samples: str = ""
    """Samples of the baseline, likewise."""
    out: str = ""
    """JSON file of the figures."""
    extractor: str = "digits"
    """Network of the figures: digits (built in), inception, or a file of one's own: .py, or torchscript (.pt)."""
    inception: str = ""
    """Local file of the Inception weights; empty takes clean-fid's from the temporary folder, or downloads it there."""
    mode: str = "legacy_tensorflow"
    """Inception and resizing of clean-fid: clean, legacy_pytorch, or legacy_tensorflow (ADM's, of papers' tables)."""
    reference: str = ""
    """Real images: npz of statistics (evaluate.save_reference, ADM's), npz or folder of images; empty: data.shards."""
    save_reference: str = ""
    """npz to write the statistics of the reference to, for later evaluations."""
    metrics: tuple[str, ...] = ()
    """Figures, some of fid, kid, sfid, is, precision_recall; empty: all that extractor and reference allow."""
    neighbours: int = 3
    """Neighbours that make the radius of an example's ball in precision and recall."""
    kid_seed: int = 0
    """numpy seed of the subsets of KID."""
    batch_size: int = 64
    """Images that the extractor looks at together."""
    latency_table: bool = False
    """Also time depth x batch x precision x compile (beside parameters and multiply-accumulates): OUT_latency.md."""
    latency_depths: tuple[int, ...] = ()
    """Depths of the table, the model's first blocks; empty: the depth of the model, and of the baseline."""
    latency_precisions: tuple[str, ...] = ("fp32",)
    """Precisions of the table: fp32, bf16, and on GPUs tf32."""
    latency_compile: tuple[bool, ...] = (False,)
    """Whether blocks are compiled in the table: [false], [true] or both."""
