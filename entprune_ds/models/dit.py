"""The one backbone of DiT and SiT. It knows nothing of parallelism, pruning or the generative process.

Blocks live in a ModuleDict keyed by their ORIGINAL index, so that removing one renames nothing and the
names of the public checkpoints (`blocks.N.*`) hold at every depth.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entprune_ds.config import ModelConfig
from entprune_ds.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    position_embedding,
)
from entprune_ds.rng import generator_for

Tap = Callable[[int, Tensor], Tensor]
"""tap(original index, output of that block (N,T,D)) -> what the next block takes in its place."""


class DiT(nn.Module):
    """Class-conditional diffusion transformer (DiT, arXiv 2212.09748; SiT, arXiv 2401.08740)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.patch_size, self.side = config.patch_size, config.input_size // config.patch_size
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.head_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.activation_checkpointing = config.activation_checkpointing
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size, config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        self.register_buffer("pos_embed", position_embedding(config.hidden_size, self.side), persistent=False)
        self.blocks = nn.ModuleDict({str(i): build_block(config, i) for i in config.blocks})
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size, self.head_channels)
        self.tap: Tap | None = None

    def embed(self, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """z_t (N,C,H,W), t (N,), labels (N,) -> tokens x (N,T,D), conditioning c (N,D)."""
        x = self.x_embedder(z_t) + self.pos_embed.to(z_t.dtype)
        return x, self.t_embedder(t, z_t.dtype) + self.y_embedder(labels)

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), c (N,D) -> (N,T,D) through all present blocks."""
        for index, block in self.blocks.items():
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)  # (N,T,D), activations recomputed in the backward pass
            else:
                x = block(x, c)  # (N,T,D)
            if self.tap is not None:  # out of reach of compilation and of what is computed again
                x = self.tap(int(index), x)  # (N,T,D)
        return x

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), c (N,D) -> prediction: (N,C,H,W) velocity of SiT, (N,2C,H,W) epsilon and variance of DiT."""
        patches = self.final_layer(x, c)  # (N,T,p*p*C)
        n, p, side = x.shape[0], self.patch_size, self.side
        image = patches.reshape(n, side, side, p, p, self.head_channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(n, self.head_channels, side * p, side * p)[:, : self.out_channels]

    def forward(self, z_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """z_t (N,C,H,W), t (N,) in [0,1] or timesteps, labels (N,) i64 -> prediction, see `head`."""
        x, c = self.embed(z_t, t, labels)  # (N,T,D), (N,D)
        return self.head(self.run_blocks(x, c), c)


def build_block(config: ModelConfig, index: int) -> Block:
    """The block of this original index, as wide as it is in the architecture, with random values."""
    num_heads, mlp_size = config.widths(index)
    return Block(config.hidden_size, num_heads, config.head_size, mlp_size, config.norm_eps)


def initial_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Initial value of one parameter (adaLN-Zero initialisation of the official DiT code).

    A pure function of its name, so that any rank can make any parameter alone, at any depth.

    Args:
        name: parameter name, e.g. "blocks.3.attn.qkv.weight".
        shape: its shape.
        seed: seed of the run.
    """
    tensor = torch.zeros(shape)
    generator = generator_for(seed, f"init/{name}")
    zero = name.endswith(".bias") or "adaLN_modulation" in name.split(".") or name.startswith("final_layer.")
    if zero:
        return tensor
    if name.startswith(("y_embedder.", "t_embedder.")):
        return tensor.normal_(0.0, 0.02, generator=generator)
    nn.init.xavier_uniform_(tensor.view(shape[0], -1), generator=generator)
    return tensor


def initialize(model: nn.Module, seed: int) -> nn.Module:
    """Fill an unsharded model with `initial_tensor` values; returns it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_tensor(name, tuple(parameter.shape), seed))
    return model
