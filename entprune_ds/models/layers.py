"""Layers of the adaLN-Zero transformer, with the parameter names of the public DiT and SiT releases."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
"""Epsilon of the norm before the attention and of the last one, in the official code and in diffusers alike."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N,T,D) -> x * (1 + scale) + shift, with shift and scale (N,D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_embedding(t: Tensor, dim: int, frequency_shift: float = 0.0, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of t (N,) -> (N, dim), frequencies max_period^(-i / (dim/2 - shift)).

    The official DiT and SiT code has shift 0, diffusers has 1.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * steps / (half - frequency_shift))
    angles = t[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_embedding(dim: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos positions (1, side * side, dim) f32; half of dim per axis, columns first."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.reshape(-1, 1).double() * omega for axis in (column, row)]
    parts = [f(a) for a in angles for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float().unsqueeze(0)


class TimestepEmbedder(nn.Module):
    """t (N,) -> (N, D): sinusoids, then a two-layer MLP."""

    frequency_size = 256

    def __init__(self, hidden_size: int, frequency_shift: float = 0.0):
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(self.frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequency_size, self.frequency_shift).to(dtype))


class LabelEmbedder(nn.Module):
    """labels (N,) -> (N, D); row num_classes is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class PatchEmbed(nn.Module):
    """z (N,C,H,W) -> tokens (N,T,D), T = (H / patch)^2."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention through scaled_dot_product_attention.

    gate (heads,) multiplies the output of every head before the projection; None is 1.
    """

    gate: Tensor | None

    def __init__(self, hidden_size: int, num_heads: int, head_size: int):
        super().__init__()
        self.register_buffer("gate", None, persistent=False)
        self.num_heads, self.head_size = num_heads, head_size
        self.qkv = nn.Linear(hidden_size, 3 * num_heads * head_size)
        self.proj = nn.Linear(num_heads * head_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape  # (N,T,D)
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, self.head_size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N,heads,T,head_size)
        x = F.scaled_dot_product_attention(q, k, v)
        if self.gate is not None:
            x = x * self.gate.to(x.dtype)[:, None, None]
        return self.proj(x.transpose(1, 2).reshape(n, tokens, self.num_heads * self.head_size))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them.

    gate (channels,) multiplies every hidden channel before the second layer; None is 1.
    """

    gate: Tensor | None

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.register_buffer("gate", None, persistent=False)
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate="tanh")  # (N,T,mlp_size)
        return self.fc2(x if self.gate is None else x * self.gate.to(x.dtype))


class Block(nn.Module):
    """adaLN-Zero transformer block (DiT, arXiv 2212.09748, sec. 3.2); removing it is the identity on x.

    norm_eps is that of the norm before the MLP alone: the only one that diffusers configures. gate () multiplies both
    residual branches; None is 1.
    """

    gate: Tensor | None

    def __init__(self, hidden_size: int, num_heads: int, head_size: int, mlp_size: int, norm_eps: float = NORM_EPS):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.attn = Attention(hidden_size, num_heads, head_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        self.mlp = Mlp(hidden_size, mlp_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.register_buffer("gate", None, persistent=False)

    def gates(self) -> dict[str, Tensor]:
        """All gates by buffer name, 1 where there is none: gate (), attn.gate (heads,), mlp.gate (channels,)."""
        heads, channels, like = self.attn.num_heads, self.mlp.fc1.out_features, self.mlp.fc1.weight
        return {
            "gate": like.new_ones(()) if self.gate is None else self.gate,
            "attn.gate": like.new_ones(heads) if self.attn.gate is None else self.attn.gate,
            "mlp.gate": like.new_ones(channels) if self.mlp.gate is None else self.mlp.gate,
        }

    def set_gates(self, gates: Mapping[str, Tensor]) -> None:
        """Put these gates in place, by buffer name; those that are not named are taken away."""
        self.gate, self.attn.gate, self.mlp.gate = (gates.get(n) for n in ("gate", "attn.gate", "mlp.gate"))

    def forward(self, x: Tensor, c: Tensor, without: str = "") -> Tensor:
        """x (N,T,D), c (N,D) -> (N,T,D); without "attention" or "mlp" only the other branch is applied."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        if self.gate is not None:
            gate1, gate2 = gate1 * self.gate.to(c.dtype), gate2 * self.gate.to(c.dtype)
        if without != "attention":
            x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        if without == "mlp":
            return x
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """x (N,T,D), c (N,D) -> patches (N,T,patch^2 * channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
