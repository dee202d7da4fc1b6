"""The transformer in float64 as the papers write it: explicit sums, one image and one head at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """y = W x + b on the last axis."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x / (1 + torch.exp(-x))


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation (Hendrycks & Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Tensor) -> Tensor:
    """Zero mean, unit (biased) variance on the last axis, eps 1e-6, no weights."""
    centered = x - x.mean(dim=-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(dim=-1, keepdim=True) + 1e-6)


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    """x (T,D): softmax(q k^T / sqrt(D / heads)) v, head by head."""
    tokens, width = x.shape
    size = width // heads
    q, k, v = linear(w, f"{name}.qkv", x).split(width, dim=1)
    output = torch.zeros(tokens, width, dtype=x.dtype)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = q[:, part] @ k[:, part].T / math.sqrt(size)
        weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
        output[:, part] = weights / weights.sum(dim=1, keepdim=True) @ v[:, part]
    return linear(w, f"{name}.proj", output)


def block(w: Weights, name: str, x: Tensor, c: Tensor, heads: int) -> Tensor:
    """x (T,D), c (D,): the adaLN-Zero block (DiT, arXiv 2212.09748, fig. 3)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = linear(w, f"{name}.adaLN_modulation.1", silu(c)).chunk(6)
    x = x + gate1 * attention(w, f"{name}.attn", layer_norm(x) * (1 + scale1) + shift1, heads)
    hidden = gelu(linear(w, f"{name}.mlp.fc1", layer_norm(x) * (1 + scale2) + shift2))
    return x + gate2 * linear(w, f"{name}.mlp.fc2", hidden)


def timestep_features(t: float, size: int = 256) -> Tensor:
    """cos(t w_i), then sin(t w_i), w_i = 10000^(-i / (size / 2))."""
    frequencies = [10000 ** (-i / (size // 2)) for i in range(size // 2)]
    waves = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
    return torch.tensor(waves, dtype=torch.float64)


def positions(width: int, side: int) -> Tensor:
    """(side * side, width): for each axis, the column first, sin then cos of position * 10000^(-i / (width / 4))."""
    rows = []
    for row in range(side):
        for column in range(side):
            features = []
            for position in (column, row):
                angles = [position / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                features += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(features)
    return torch.tensor(rows, dtype=torch.float64)


def forward(
    w: Weights, z: Tensor, t: Tensor, labels: Tensor, *, blocks: list[int], heads: int, positions: Tensor
) -> Tensor:
    """z (N,C,H,W), t (N,), labels (N,), positions (T,D) -> (N,C,H,W), with the named blocks only."""
    images = [_one(w, z[n], float(t[n]), int(labels[n]), blocks, heads, positions) for n in range(len(z))]
    return torch.stack(images)


def _one(w: Weights, z: Tensor, t: float, label: int, blocks: list[int], heads: int, positions: Tensor) -> Tensor:
    channels, height, width = z.shape
    kernel, bias = w["x_embedder.proj.weight"], w["x_embedder.proj.bias"]
    patch = kernel.shape[-1]
    side = height // patch
    tokens = []
    for row in range(side):
        for column in range(side):
            piece = z[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append((kernel * piece).sum(dim=(1, 2, 3)) + bias)
    x = torch.stack(tokens) + positions
    c = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", timestep_features(t))))
    c = c + w["y_embedder.embedding_table.weight"][label]
    for index in blocks:
        x = block(w, f"blocks.{index}", x, c, heads)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(c)).chunk(2)
    patches = linear(w, "final_layer.linear", layer_norm(x) * (1 + scale) + shift)
    image = torch.zeros(patches.shape[1] // patch**2, height, width, dtype=z.dtype)
    for token, values in enumerate(patches):
        row, column = divmod(token, side)
        for i in range(patch):
            for j in range(patch):
                start = (i * patch + j) * len(image)
                image[:, row * patch + i, column * patch + j] = values[start : start + len(image)]
    return image[:channels]
