"""A tiny configuration and synthetic batches shared by the tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from entprune_ds.config import Config, DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from entprune_ds.diffusion.objective import Draws, build_objective
from entprune_ds.interop.safetensors import open_export, read_export
from entprune_ds.interop.source import loaded_model
from entprune_ds.models.dit import DiT
from entprune_ds.rng import generator_for

MODEL = ModelConfig(depth=4, hidden_size=32, num_heads=2, patch_size=2, input_size=4, in_channels=1, num_classes=3)


def tiny_config(zero_stage: int = 1, dtype: str = "fp32", **model: object) -> Config:
    """A Config of a 4-block model, global batch 8, four readers."""
    return Config(
        run=RunConfig(name="tiny", seed=1),
        model=replace(MODEL, **model),  # type: ignore[arg-type]
        data=DataConfig(num_readers=4),
        train=TrainConfig(num_steps=20, global_batch_size=8, learning_rate=1e-3, ema_decay=0.99),
        parallel=ParallelConfig(ds_config=f"zero{zero_stage}_{dtype}"),
    )


def load_model(folder: Path) -> tuple[DiT, dict]:
    """An exported model, and everything that its config.json says."""
    return loaded_model(open_export(folder)), read_export(folder)[1]


def tiny_draws(config: Config, step: int, rank: int, world_size: int) -> Draws:
    """This rank's part of a synthetic global batch; a pure function of the step."""
    m, total = config.model, config.train.global_batch_size
    slots = [s for s in range(total) if s % config.data.num_readers % world_size == rank]
    shape = (m.in_channels, m.input_size, m.input_size)
    latents = torch.stack([torch.randn(shape, generator=generator_for(7, "latents", step, s)) for s in slots])
    labels = torch.tensor([(step + s) % m.num_classes for s in slots])
    objective = build_objective(m, config.diffusion)
    return objective.make_draws(latents, labels, slots, seed=config.run.seed, purpose="train", step=step)
