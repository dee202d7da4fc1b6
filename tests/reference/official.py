"""The DiT of the public code as a plain module: blocks in a list, positions in the state dict, attention by hand.

Written from the names, shapes and formulas of the public DiT and SiT releases; `depth` is its only free size.
The SiT of the public code is the same module, but for returning the first half of the channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.dit import positions


class Embedders(nn.Module):
    """Layers that the state dict names t_embedder, y_embedder and x_embedder."""

    def __init__(self, width: int, classes: int, patch: int, channels: int):
        super().__init__()
        self.t = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.y = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.x = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})


class OfficialBlock(nn.Module):
    """blocks.N."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (N,T,D), c (N,D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (v[:, None] for v in self.adaLN_modulation(c).chunk(6, dim=1))
        x = x + gate1 * self.attention(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp["fc2"](F.gelu(self.mlp["fc1"](y), approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        """Softmax of scaled products, written out."""
        n, t, d = x.shape
        q, k, v = self.attn["qkv"](x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(d // self.heads)).softmax(dim=-1)
        return self.attn["proj"]((weights @ v).transpose(1, 2).reshape(n, t, d))


class OfficialDiT(nn.Module):
    """The public module; load its state dict with strict=True."""

    def __init__(
        self, depth: int, width: int = 384, heads: int = 6, patch: int = 2, size: int = 32, channels: int = 4,
        classes: int = 1000, sit: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.patch, self.side, self.out, self.sit = patch, size // patch, 2 * channels, sit
        embedders = Embedders(width, classes, patch, channels)
        self.x_embedder, self.t_embedder, self.y_embedder = embedders.x, embedders.t, embedders.y
        self.pos_embed = nn.Parameter(positions(width, self.side).float()[None], requires_grad=False)
        self.blocks = nn.ModuleList([OfficialBlock(width, heads) for _ in range(depth)])
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * self.out)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """z (N,C,H,W), t (N,), labels (N,) -> (N,2C,H,W), of a SiT (N,C,H,W)."""
        x = self.x_embedder["proj"](z).flatten(2).transpose(1, 2) + self.pos_embed
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1))
        c = c + self.y_embedder["embedding_table"](labels)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = (v[:, None] for v in self.final_layer.adaLN_modulation(c).chunk(2, dim=1))
        x = self.final_layer.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        x = x.reshape(len(z), self.side, self.side, self.patch, self.patch, self.out)
        image = torch.einsum("nhwpqc->nchpwq", x).reshape(len(z), self.out, *z.shape[2:])
        return image.chunk(2, dim=1)[0] if self.sit else image


def random_official(seed: int = 0, **sizes: object) -> OfficialDiT:
    """An official module, every weight random (also the zero-initialised ones)."""
    model, generator = OfficialDiT(**sizes), torch.Generator().manual_seed(seed)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.normal_(0, 0.05, generator=generator)
    return model.eval()
