"""A small network with the interface of clean-fid's inception-2015-12-05.pt, saved as a torchscript file."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 12


class Mixed(nn.Module):
    """A block with a first branch named conv, as mixed_6 has one."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv, self.other = nn.Conv2d(channels, 8, 1), nn.Conv2d(channels, out - 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(self.conv(x)), torch.tanh(self.other(x))], dim=1)


class SmallInception(nn.Module):
    """(n,3,H,W), 0 to 255 -> probabilities (n,12), or features (n,width)."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(3, 6, 18, stride=17), mixed_5=nn.ReLU(), mixed_6=Mixed(6, width),
                pool2=nn.AdaptiveAvgPool2d(1),
            )
        )  # fmt: skip
        self.output = nn.Linear(width, CLASSES)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        batch, channels, height, width = img.shape
        theta = torch.eye(2, 3)
        theta[0, 2] += theta[0, 0] / width - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / height - theta[1, 1] / 299
        grid = F.affine_grid(theta.unsqueeze(0).repeat([batch, 1, 1]), [batch, channels, 299, 299], align_corners=False)
        x = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128).reshape(batch, -1)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return torch.softmax(logits, dim=1)


def save_small_inception(path: Path, width: int = 16, seed: int = 0) -> Path:
    """Write one with random weights."""
    torch.manual_seed(seed)
    net = SmallInception(width).eval()
    with torch.no_grad():  # features that differ from image to image
        net.layers.mixed_6.conv.weight *= 20
        net.layers.mixed_6.other.weight *= 5
    torch.jit.script(net).save(str(path))
    return path
