"""Published sizes: "SiT-XL/2" -> ModelConfig."""

from __future__ import annotations

import torch

from entprune_ds.config import ModelConfig
from entprune_ds.models.dit import DiT

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)


def model_config(name: str, **changes: object) -> ModelConfig:
    """ModelConfig of a published size, e.g. "SiT-XL/2" (Peebles & Xie 2023, table 1; Ma et al. 2024).

    Args:
        name: SiT-{S,B,L,XL}/{2,4,8}.
        changes: fields that differ from the published model, e.g. num_classes.

    Raises:
        ValueError: for a name that is not published, listing those that are.
    """
    known = [f"SiT-{size}/{patch}" for size in SIZES for patch in PATCHES]
    if name not in known:
        raise ValueError(f"model `{name}` is not known. Choose one of {', '.join(known)}.")
    size, patch = name.removeprefix("SiT-").split("/")
    depth, hidden_size, num_heads = SIZES[size]
    fields = dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=int(patch), learn_sigma=True)
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


def count_parameters(config: ModelConfig) -> int:
    """Trainable parameters of a configuration; builds nothing but meta tensors."""
    with torch.device("meta"):
        return sum(p.numel() for p in DiT(config).parameters())
