"""Images between tensors in [-1, 1] and files: uint8 conversion, PNG grid, PNG folder, npz.

Files and folders appear whole or not at all: written beside their final place, then renamed.
"""

from __future__ import annotations

import csv
import os
import shutil
import zipfile
import zlib
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


def save_folder(images: np.ndarray, labels: np.ndarray, path: str | Path) -> None:
    """Write images as 000000.png, 000001.png, ... and labels.csv (file,label) into a new or empty folder.

    Args:
        images: uint8 (N,H,W,C), C = 1 or 3.
        labels: (N,) integers.

    Raises:
        ValueError: wrong images or labels, a folder that holds files, or one that cannot be written.
    """
    check_drawable(images)
    check_labels(images, labels)
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        # older samples left among the new ones would spoil every figure computed from the folder
        raise ValueError(f"{folder} already holds files. Empty it or choose another output folder.")
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        names = [f"{index:06d}.png" for index in range(len(images))]
        for name, image in zip(names, images, strict=True):
            Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(partial / name)
        with open(partial / "labels.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "label"])
            writer.writerows(zip(names, labels.tolist(), strict=True))
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _cannot_write(folder, error) from error


def load_npz(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of `save_npz`.

    Returns:
        images uint8 (N,H,W,C), labels i64 (N,).

    Raises:
        ValueError: the file is missing, damaged, or holds other arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Write it with `entprune-ds sample`.")
    try:
        with zipfile.ZipFile(path):  # np.load would try to unpickle what is not a zip
            pass
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("arr_0", "arr_1") if name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an npz of samples ({error}). Write it again.") from error
    if set(arrays) != {"arr_0", "arr_1"}:
        raise ValueError(f"{path} must hold arr_0 (images) and arr_1 (labels), got {sorted(arrays) or 'neither'}.")
    images, labels = arrays["arr_0"], arrays["arr_1"]
    check_images(images, f"{path}: arr_0")
    check_labels(images, labels, f"{path}: arr_1")
    return images, labels.astype(np.int64)


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
