"""An exported model made ready to draw samples, and everything that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entprune_ds import comm
from entprune_ds.config import Config
from entprune_ds.diffusion.sampling import build_sampler, sampling_protocol
from entprune_ds.evaluation.generate import SampleFn, generate, make_labels
from entprune_ds.interop.source import loaded_model
from entprune_ds.interop.vae import load_vae
from entprune_ds.interop.weights import opened
from entprune_ds.logs import progress

OF_THE_MODEL = ("depth", "kept_blocks", "step", "model", "weights_digest", "batch_size")
"""What a protocol says of one model, or of how it was asked; two sets that differ in nothing else may be compared."""


@dataclass(frozen=True)
class Drawer:
    """A model, its sampler and the labels of all its samples."""

    sample_fn: SampleFn
    labels: Tensor
    """(N,) i64: label i depends on the seed and i alone."""
    shape: tuple[int, int, int]
    """(C,H,W) of the noise."""
    image_shape: tuple[int, int, int]
    """(H,W,C) of an image."""
    seed: int
    protocol: dict[str, Any]
    """Plain values: every setting that the samples depend on."""

    def draw(self, indices: range) -> np.ndarray:
        """Images uint8 (n,H,W,C), in one batch; the noise of image i depends on (seed, i) alone."""
        labels = self.labels[indices.start : indices.stop].to(comm.device())
        return generate(
            self.sample_fn, labels, shape=self.shape, seed=self.seed, batch_size=len(indices), slots=indices
        )


def open_drawer(config: Config, weights: Path) -> Drawer:
    """A model whose `sampling_problems` are none, on the device of this rank.

    Raises:
        ValueError: when the weights or the VAE cannot be read.
    """
    sample, source = config.sample, opened(weights, config.model)
    set_precision(sample.tf32)
    architecture, facts = source.model, source.facts
    vae = load_vae(sample.vae, sample.vae_revision, comm.device()) if sample.vae else None
    model = loaded_model(source)
    digest = weights_digest(model)
    model.to(comm.device())
    model.register_forward_pre_hook(lambda model, arguments: comm.mark_progress())  # a sample takes hundreds of them
    sampler = build_sampler(architecture, config.diffusion, sample)
    side = architecture.input_size

    def sample_fn(noise: Tensor, y: Tensor, noise_at: Callable[[int], Tensor]) -> Tensor:
        drawn = sampler(model, noise, y, noise_at)
        return vae.decode(drawn) if vae else drawn  # latents (N,C,h,w) -> pixels (N,3,H,W)

    protocol = {
        "num_samples": sample.num_samples, **sampling_protocol(architecture, config.diffusion, sample),
        "labels": sample.labels, "seed": sample.seed, "weights": facts["weights"], "tf32": sample.tf32,
        "depth": len(architecture.blocks), "kept_blocks": list(architecture.blocks), "step": facts["step"],
        "model": str(weights), "weights_digest": digest, "batch_size": sample.batch_size,
        **(vae.protocol if vae else {"vae": "none (pixels)"}),
    }  # fmt: skip
    labels = make_labels(sample.labels, sample.num_samples, architecture.num_classes, sample.seed)
    shape, image = (architecture.in_channels, side, side), (side, side, architecture.in_channels)
    if vae:
        channels, height, width = vae.decode(torch.zeros(1, *shape, device=comm.device())).shape[1:]
        image = (height, width, channels)
    return Drawer(sample_fn, labels, shape, image, sample.seed, protocol)


def draw(config: Config, weights: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """All samples of a model, in memory, by this process alone.

    Returns:
        images uint8 (N,H,W,C), labels i64 (N,), and the protocol as plain values.
    """
    drawer, sample = open_drawer(config, weights), config.sample
    with progress("sample", total=sample.num_samples) as line:
        images = generate(
            drawer.sample_fn, drawer.labels.to(comm.device()), shape=drawer.shape, seed=drawer.seed,
            batch_size=sample.batch_size, on_batch=line.update,
        )  # fmt: skip
    return images, drawer.labels.numpy(), drawer.protocol


def set_precision(tf32: bool) -> None:
    """Say how fp32 products are rounded on a GPU, and choose kernels that give the same bits every time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def weights_digest(model: nn.Module) -> str:
    """SHA-256 (16 digits) of all parameters by name, so that samples of other weights are not mixed up."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
