"""From settings to one sampling function, whatever the process and the sampler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from entprune_ds.config import DiffusionConfig, ModelConfig, SampleConfig
from entprune_ds.diffusion.chain_samplers import ddim, ddpm
from entprune_ds.diffusion.ddpm import NUM_TIMESTEPS
from entprune_ds.diffusion.dopri5 import dopri5
from entprune_ds.diffusion.guidance import Model, with_guidance
from entprune_ds.diffusion.interpolant import PATHS, expand, sampling_range, sde_range
from entprune_ds.diffusion.prediction import velocity_of
from entprune_ds.diffusion.samplers import SAMPLERS
from entprune_ds.diffusion.sde import NoiseAt, euler_maruyama

Sampler = Callable[[Model, Tensor, Tensor, NoiseAt], Tensor]
"""(model, noise (N,C,H,W), labels (N,), noise_at) -> samples (N,C,H,W); every image depends on its own noise alone."""


def build_sampler(
    model: ModelConfig, diffusion: DiffusionConfig, sample: SampleConfig, anyone: Callable[[bool], bool] = bool
) -> Sampler:
    """The sampler of a configuration, with guidance.

    Args:
        model, diffusion: what the model is, and what it was trained to predict.
        sample: sampler and guidance.
        anyone: for models whose evaluations are collective, see dopri5.

    Raises:
        ValueError: for a sampler that the process does not have.
    """
    run = _of_diffusion(sample) if model.process == "dit" else _of_flow(diffusion, sample, anyone)
    channels = model.in_channels if sample.cfg_channels is None else sample.cfg_channels
    guide = partial(
        with_guidance, scale=sample.cfg_scale, null_label=model.num_classes, interval=sample.cfg_interval,
        channels=None if channels == model.out_channels else channels,
        progress=_chain_progress if model.process == "dit" else _flow_progress,
    )  # fmt: skip

    def draw(net: Model, noise: Tensor, labels: Tensor, noise_at: NoiseAt) -> Tensor:
        return run(guide(net), noise, labels, noise_at)

    return draw


def _flow_progress(t: Tensor) -> Tensor:
    return t


def _chain_progress(timestep: Tensor) -> Tensor:
    """0 at timestep 999 (noise), 1 at timestep 0."""
    return 1 - timestep / (NUM_TIMESTEPS - 1)


def _of_diffusion(sample: SampleConfig) -> Sampler:
    if sample.sampler == "ddpm":
        return partial(ddpm, num_steps=sample.num_steps)
    if sample.sampler == "ddim":
        return partial(ddim, num_steps=sample.num_steps, eta=sample.ddim_eta)
    raise ValueError(f"`sample.sampler` must be ddpm or ddim for a diffusion model, got {sample.sampler}.")


def _of_flow(diffusion: DiffusionConfig, sample: SampleConfig, anyone: Callable[[bool], bool]) -> Sampler:
    path, kind = PATHS[diffusion.path], diffusion.prediction
    if sample.sampler == "sde":
        last = 0.0 if sample.sde_last_step == "none" else sample.sde_last_step_size
        start, end = sde_range(path.name, kind, sample.sde_diffusion, last)
        return partial(
            euler_maruyama, path=path, prediction=kind, num_steps=sample.num_steps, start=start, end=end,
            form=sample.sde_diffusion, norm=sample.sde_norm, last_step=sample.sde_last_step, last_step_size=last,
        )  # fmt: skip
    start, end = sampling_range(path.name, kind)
    if sample.sampler == "dopri5":
        solve = partial(dopri5, start=start, end=end, atol=sample.atol, rtol=sample.rtol, anyone=anyone)
    elif sample.sampler in SAMPLERS:
        solve = partial(SAMPLERS[sample.sampler], num_steps=sample.num_steps, start=start, end=end)
    else:
        known = ", ".join([*SAMPLERS, "dopri5", "sde"])
        raise ValueError(f"`sample.sampler` must be one of {known} for a flow model, got {sample.sampler}.")

    def draw(net: Model, noise: Tensor, labels: Tensor, noise_at: NoiseAt) -> Tensor:
        def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return velocity_of(kind, path.at(expand(t, z)), z, net(z, t, y))

        return solve(velocity if kind != "velocity" else net, noise, labels)

    return draw


def sampling_protocol(model: ModelConfig, diffusion: DiffusionConfig, sample: SampleConfig) -> dict[str, Any]:
    """Every setting that the samples of a model depend on, as plain JSON values; those without effect are left out."""
    keys = ["sampler", "cfg_scale"]
    keys += ["atol", "rtol"] if sample.sampler == "dopri5" else ["num_steps"]
    if sample.sampler == "sde":
        keys += ["sde_diffusion", "sde_norm", "sde_last_step"]
        keys += [] if sample.sde_last_step == "none" else ["sde_last_step_size"]
    keys += ["ddim_eta"] if sample.sampler == "ddim" else []
    keys += ["cfg_channels", "cfg_interval"] if sample.cfg_scale != 1.0 else []
    found = {"process": model.process} | {key: getattr(sample, key) for key in keys}
    if model.process == "sit":
        found |= {"path": diffusion.path, "prediction": diffusion.prediction}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
