"""From what shards store (latents, pixels, moments) to the latents that training sees.

What is random here, the mirror image and the sample of the VAE's posterior, is drawn per example and epoch, from a
stream of its own that is named by the example's key. So it is new in every epoch, yet the same for any number of ranks
and workers and after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from entprune_ds import rng

LOG_VARIANCE_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this range, as the VAE's own sampling does (diffusers, DiagonalGaussianDistribution)."""


@dataclass(frozen=True)
class Draw:
    """How latents are made of stored examples.

    Raises:
        ValueError: when latents, which have no mirror image, shall be flipped.
    """

    seed: int
    purpose: str
    kind: str
    """Of the stored examples: latents, pixels or moments."""
    flip: bool = False
    """Take the mirror image with probability 1/2."""
    scale: float = 0.18215
    """Factor of latents drawn from moments."""

    def __post_init__(self) -> None:
        if self.flip and self.kind == "latents":
            message = "`data.flip` needs shards of pixels or moments, these hold latents."
            raise ValueError(f"{message} Set it to false, or encode the images again as moments.")

    def into(self, row: np.ndarray, key: str, array: np.ndarray, epoch: int) -> None:
        """Write the latents of one example.

        Args:
            row: (C,H,W) f32, C-contiguous; filled here.
            key: name of the example.
            array: what is stored; `latents.KINDS` says its dtype and shape.
            epoch: epoch of the example.
        """
        if self.kind == "latents":
            np.copyto(row, array)
        elif self.kind == "pixels":
            mirrored = self.flip and _coin(self._generator(key, epoch))
            np.divide(array[:, :, ::-1] if mirrored else array, np.float32(127.5), out=row)
            row -= 1
        else:
            generator = self._generator(key, epoch)
            mirrored = self.flip and _coin(generator)
            noise = torch.randn(row.shape, generator=generator).numpy()
            mean, log_variance = array[int(mirrored)].reshape(2, *row.shape)
            np.maximum(log_variance, LOG_VARIANCE_RANGE[0], out=row)
            np.minimum(row, LOG_VARIANCE_RANGE[1], out=row)  # np.clip takes twice as long as both
            row *= 0.5
            np.exp(row, out=row)
            row *= noise
            row += mean
            row *= self.scale

    def _generator(self, key: str, epoch: int) -> torch.Generator:
        return rng.generator_for(self.seed, f"{self.purpose}/latents/{key}", epoch)


def _coin(generator: torch.Generator) -> bool:
    """A random bit: the highest of the seed, which is a hash; the numbers of torch come from its low 32 bits."""
    return bool(generator.initial_seed() >> 62)
