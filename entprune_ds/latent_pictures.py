"""Sample grids of a run whose model makes latents: whether there can be any, and their decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.config import Config, SampleConfig
from entprune_ds.interop.vae import Vae, load_vae


def no_grids(config: Config) -> str:
    """Why a run draws no sample grids, and which setting gives them; empty where it draws them."""
    channels = config.model.in_channels
    if channels in (1, 3) or config.sample.vae:
        return ""
    message = (
        f"no sample grids: the model makes latents of {channels} channels, and no VAE is given that decodes them. "
    )
    return message + "sample.vae=FOLDER, e.g. of stabilityai/sd-vae-ft-ema, gives them"


@dataclass
class LatentDecoder:
    """The VAE of the grids: read once, when the first is drawn, and on the GPU only while it decodes. For rank 0."""

    vae: Vae | None = None

    def pictures(self, drawn: Tensor, sample: SampleConfig) -> Tensor:
        """What a sampler has drawn (N,C,h,w) as pictures (N,C',H,W) in about [-1, 1]: decoded where there is a VAE.

        Raises:
            ValueError: the VAE cannot be loaded, or decodes other latents.
            torch.OutOfMemoryError: the VAE does not fit beside the training.
        """
        if not sample.vae:
            return drawn
        if self.vae is None:
            with torch.random.fork_rng(devices=[]):  # training does not notice
                self.vae = load_vae(sample.vae, sample.vae_revision)
        found = []
        try:
            self.vae.move(drawn.device)
            for latent in drawn.split(1):  # one at a time: the decoder's activations are large
                found.append(self.vae.decode(latent).cpu())
                comm.mark_progress()
        finally:
            self.vae.move("cpu")
        return torch.nan_to_num(torch.cat(found))
