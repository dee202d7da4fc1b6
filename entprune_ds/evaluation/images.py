"""Images between tensors in [-1, 1] and files: uint8 conversion, PNG grid.

Files appear whole or not at all: written beside their final place, then renamed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from entprune_ds.atomic import replacing

READABLE = 48  # pixels: smaller images are enlarged to about this side in a grid


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N,C,H,W), any float dtype -> uint8 (N,H,W,C).

    -1 -> 0 and 1 -> 255; values outside are clamped, halves round to even: round((x + 1) * 127.5).

    Raises:
        ValueError: a value is NaN or infinite.
    """
    images = images.detach().float()
    if not bool(torch.isfinite(images).all()):
        raise ValueError("samples contain NaN or infinite values: model or sampler diverged. Check the weights.")
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """uint8 (N,H,W,C) -> f32 (N,C,H,W) in [-1, 1]; the exact inverse of `to_uint8` on its values."""
    check_images(images)
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def check_images(images: np.ndarray, name: str = "images") -> None:
    """Raise ValueError unless `images` is uint8 (N,H,W,C) with N, H, W, C above 0."""
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{name} must be a non-empty uint8 array (N,H,W,C), got {images.dtype} {tuple(images.shape)}.")


def save_grid(images: np.ndarray, path: str | Path, columns: int = 10, upscale: int | None = None) -> None:
    """Write images as one PNG, row by row.

    Args:
        images: uint8 (N,H,W,C), C = 1 or 3.
        path: the PNG file.
        columns: images per row.
        upscale: whole factor of enlargement (nearest neighbour); None chooses one so that tiny images are readable.

    Raises:
        ValueError: wrong images or numbers, or the file cannot be written.
    """
    check_drawable(images)
    if upscale is None:
        upscale = max(1, round(READABLE / max(images.shape[1:3])))
    if columns < 1 or upscale < 1:
        raise ValueError(f"columns and upscale must be at least 1, got {columns} and {upscale}.")
    large = images.repeat(upscale, axis=1).repeat(upscale, axis=2)  # nearest neighbour: no new grey values
    tiles = torch.from_numpy(np.ascontiguousarray(large)).permute(0, 3, 1, 2)
    grid = make_grid(tiles, nrow=columns, padding=2, pad_value=128)  # (3, H', W')
    picture = Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())
    write_whole(Path(path), lambda file: picture.save(file, format="PNG"))


def check_drawable(images: np.ndarray) -> None:
    """Raise ValueError unless `images` are what a PNG can hold."""
    check_images(images)
    if images.shape[3] not in (1, 3):
        raise ValueError(f"a PNG needs 1 or 3 channels, got {images.shape[3]}. Latents must be decoded first.")


def check_labels(images: np.ndarray, labels: np.ndarray, name: str = "labels") -> None:
    """Raise ValueError unless `labels` are integers, one per image."""
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} must be {len(images)} integers, got {labels.dtype} {tuple(labels.shape)}.")


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Fill a file and put it in its place whole; a ValueError that names the path if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            write(file)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path} cannot be written: {error.strerror or error}. Free space or choose another output path.")
