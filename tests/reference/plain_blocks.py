"""The block stack as one would first write it from the DiT paper: plain modules, SDPA, no thought of pruning.

What tools/bench_model.py compares with: the same weights load, so outputs must agree.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Self-attention with one qkv projection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, width * 3)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (N,T,D) -> (N,T,D)."""
        batch, tokens, width = x.shape
        packed = self.qkv(x).view(batch, tokens, 3, self.heads, self.head_width)
        query, key, value = (packed[:, :, part].transpose(1, 2) for part in range(3))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class PlainMlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        """x (N,T,D) -> (N,T,D)."""
        return self.fc2(self.act(self.fc1(x)))


class PlainBlock(nn.Module):
    """adaLN-Zero block (arXiv 2212.09748, figure 3), straight from the picture."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = PlainAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = PlainMlp(width, ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, width * 6))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), c (N,D) -> (N,T,D)."""
        six = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = six
        x = x + gate_attention * self.attn(self.norm1(x) * (1 + scale_attention) + shift_attention)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class PlainStack(nn.Module):
    """Blocks in a ModuleList, one after the other."""

    def __init__(self, depth: int, width: int, heads: int):
        super().__init__()
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), c (N,D) -> (N,T,D)."""
        for block in self.blocks:
            x = block(x, c)
        return x


def random_values(module: nn.Module, seed: int) -> nn.Module:
    """Small random weights everywhere: zero-initialised gates would hide every difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return module
