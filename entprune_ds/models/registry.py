"""Published sizes: "DiT-XL/2" -> ModelConfig; parameters and multiply-accumulates of a configuration."""

from __future__ import annotations

import math

import torch

from entprune_ds.config import ModelConfig
from entprune_ds.macs import blocks_macs
from entprune_ds.models.dit import DiT
from entprune_ds.models.layers import TimestepEmbedder

FAMILIES = {"DiT": "dit", "SiT": "sit"}
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)


def model_config(name: str, **changes: object) -> ModelConfig:
    """ModelConfig of a published size, e.g. "SiT-XL/2" (Peebles & Xie 2023, table 1; Ma et al. 2024).

    Args:
        name: {DiT,SiT}-{S,B,L,XL}/{2,4,8}.
        changes: fields that differ from the published model, e.g. num_classes.

    Raises:
        ValueError: for a name that is not published, listing those that are.
    """
    known = [f"{family}-{size}/{patch}" for family in FAMILIES for size in SIZES for patch in PATCHES]
    if name not in known:
        raise ValueError(f"model `{name}` is not known. Choose one of {', '.join(known)}.")
    family, size, patch = name.replace("/", "-").split("-")
    depth, hidden_size, num_heads = SIZES[size]
    fields = dict(
        process=FAMILIES[family], depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=int(patch),
        learn_sigma=True,
    )  # fmt: skip
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, in model order; builds nothing but meta tensors."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in DiT(config).named_parameters()}


def count_parameters(config: ModelConfig) -> int:
    """Trainable parameters of a configuration."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def count_macs(config: ModelConfig) -> int:
    """Multiply-accumulates of one forward pass of one example: linear layers, convolution and attention.

    Element-wise work is not counted, see macs.
    """
    tokens, width, patch = (config.input_size // config.patch_size) ** 2, config.hidden_size, config.patch_size**2
    head_channels = config.in_channels * (2 if config.learn_sigma else 1)
    ends = tokens * patch * width * (config.in_channels + head_channels)
    conditioning = TimestepEmbedder.frequency_size * width + width * width + 2 * width * width
    return blocks_macs(config) + ends + conditioning
