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

    def keep(self, key: str, array: np.ndarray, epoch: int) -> np.ndarray:
        """What has to be remembered of a stored example until its latents are drawn.

        Of moments that is one half, (2C,H,W), of the image or of its mirror image: half of the memory.
        """
        if self.kind != "moments":
            return array
        return array[int(self._mirrored(key, epoch))].copy()

    def into(self, row: np.ndarray, key: str, array: np.ndarray, epoch: int) -> None:
        """Write the latents of one example.

        Args:
            row: (C,H,W) f32, C-contiguous; filled here.
            key: name of the example.
            array: what `keep` returned for the same key and epoch.
            epoch: epoch of the example.
        """
        if self.kind == "latents":
            np.copyto(row, array)
        elif self.kind == "pixels":
            np.divide(array[:, :, ::-1] if self._mirrored(key, epoch) else array, np.float32(127.5), out=row)
            row -= 1
        else:
            generator = rng.generator_for(self.seed, f"{self.purpose}/latents/{key}", epoch)
            noise = torch.randn(row.shape, generator=generator).numpy()
            mean, log_variance = array.reshape(2, *row.shape)
            np.maximum(log_variance, LOG_VARIANCE_RANGE[0], out=row)
            np.minimum(row, LOG_VARIANCE_RANGE[1], out=row)  # np.clip takes twice as long as both
            row *= 0.5
            np.exp(row, out=row)
            row *= noise
            row += mean
            row *= self.scale

    def _mirrored(self, key: str, epoch: int) -> bool:
        return self.flip and rng.coin(self.seed, f"{self.purpose}/latents/{key}", epoch)
