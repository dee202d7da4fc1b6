"""The VAE of latent models, a diffusers AutoencoderKL, handed on as plain encode and decode callables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entprune_ds.atomic import file_sha256
from entprune_ds.interop.mistaken import mistaken_for

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Vae:
    """A frozen VAE and what the samples' protocol must say of it."""

    encode: Callable[[Tensor], Tensor]
    """Pixels (N,3,H,W) in [-1,1] -> moments (N,2C,h,w) f32: mean and log variance, not scaled, not sampled."""
    decode: Callable[[Tensor], Tensor]
    """Scaled latents (N,C,h,w) -> pixels (N,3,H,W) f32, about [-1,1]."""
    name: str
    """Folder name or hub name."""
    revision: str
    """Commit of a hub repository, or "sha256:..." of a local weights file."""
    scaling_factor: float
    """Latents are the VAE's samples times this (0.18215 for sd-vae-ft-ema)."""
    latent_channels: int
    """C."""
    move: Callable[[torch.device | str], object]
    """Puts the weights on another device, where it works from then on."""

    @property
    def protocol(self) -> dict[str, Any]:
        """Plain values for a protocol file."""
        return {"vae": self.name, "vae_revision": self.revision, "vae_scaling_factor": self.scaling_factor}


def load_vae(name: str, revision: str = "", device: torch.device | str = "cpu", batch_size: int = 16) -> Vae:
    """Load an AutoencoderKL in fp32; safetensors only, no code of the repository is run.

    Args:
        name: folder written by save_pretrained, or a hub name such as "stabilityai/sd-vae-ft-ema".
        revision: branch, tag or commit of a hub name; empty is its main branch.
        device: where it works.
        batch_size: images encoded or decoded together; a whole batch of 256 would not fit most GPUs.

    Raises:
        ValueError: without the [vae] extra, for a name that cannot be loaded, or for weights that do not fit.
    """
    try:
        from diffusers import AutoencoderKL
        from diffusers.utils import logging as diffusers_log
    except ImportError as error:
        message = f"a VAE needs the package diffusers ({error}). "
        raise ValueError(message + "Install it with pip install 'entprune_ds[vae]'.") from error
    folder = Path(name)
    local = folder.is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise ValueError(f"VAE {name} is neither a folder nor a hub name such as stabilityai/sd-vae-ft-ema.")
    if local and not (folder / WEIGHTS).is_file():
        raise ValueError(f"VAE {folder} has no {WEIGHTS}: only safetensors are read.")
    mistaken = mistaken_for(folder / WEIGHTS) if local else None
    if mistaken is not None:
        raise ValueError(f"VAE {folder}: {mistaken}")
    diffusers_log.set_verbosity_error()
    absent = None if local else _hub_absence(name, revision)
    try:
        if local:
            found = f"sha256:{file_sha256(folder / WEIGHTS)}"
            model, report = AutoencoderKL.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        else:
            cached = absent is not None  # what was downloaded before is used without asking
            _, _, found = AutoencoderKL.load_config(
                name, revision=revision or None, return_unused_kwargs=True, return_commit_hash=True,
                local_files_only=cached,
            )  # fmt: skip
            model, report = AutoencoderKL.from_pretrained(
                name, revision=found, use_safetensors=True, output_loading_info=True, local_files_only=cached
            )
    except Exception as error:  # the hub's client raises errors of several packages for a missing network or name
        remedy = "Check the folder." if local else "Download it on a machine with a network and give its folder."
        why = absent or " ".join(str(error).split())[:300]
        raise ValueError(f"VAE {name} cannot be loaded ({why}). {remedy}") from error
    wrong = [f"{kind.split('_')[0]} {n}" for kind, names in report.items() for n in names if kind != "error_msgs"]
    if wrong:
        raise ValueError(f"the weights of VAE {name} do not fit its config.json: {'; '.join(sorted(wrong))}.")
    return _callables(model.eval().requires_grad_(False).to(device), folder.name if local else name, found, batch_size)


def _hub_absence(name: str, revision: str) -> str | None:
    """Why the hub cannot be reached, asked once (HF_HUB_ETAG_TIMEOUT seconds, 10 unless set); None when it answers.

    diffusers would ask six times and wait between (25 s without a network, minutes behind a firewall that drops), and
    then say that the repository lacks a file. Whatever the hub answers, also an error, is left to diffusers.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        url = hf_hub_url(name, "config.json", revision=revision or None)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:
        return None
    except Exception as error:  # no network, a proxy, HF_HUB_OFFLINE: of several packages
        why = " ".join(str(error).split())[:200]
        return f"the hub cannot be reached: {why}; and it is not among the models downloaded before"
    return None


def _callables(model: Any, name: str, revision: str, batch_size: int) -> Vae:
    config = model.config
    shifted = [k for k in ("shift_factor", "latents_mean", "latents_std") if config[k] is not None]
    if shifted:
        message = f"VAE {name} also shifts its latents ({', '.join(shifted)}), which DiT and SiT models do not. "
        raise ValueError(message + "Choose sd-vae-ft-ema or one like it.")
    scale = float(config.scaling_factor)

    def in_batches(work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [work(part) for part in x.to(model.device, torch.float32).split(batch_size)]
        return torch.cat(parts)

    def encode(pixels: Tensor) -> Tensor:
        return in_batches(lambda part: model.encode(part).latent_dist.parameters, pixels)  # (N,2C,h,w)

    def decode(latents: Tensor) -> Tensor:
        if latents.shape[1] != config.latent_channels:
            message = f"VAE {name} decodes {config.latent_channels} channels, the model makes {latents.shape[1]}."
            raise ValueError(message + " Choose the VAE that the model was trained with.")
        return in_batches(lambda part: model.decode(part / scale).sample, latents)  # (N,3,H,W)

    return Vae(encode, decode, name, revision, scale, int(config.latent_channels), model.to)
