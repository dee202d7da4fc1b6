"""Images to be measured, wherever they lie: an array, an npz, a folder of pictures, parts that are being drawn.

A source hands out its images in batches, split over the ranks into contiguous ranges, so that what the ranks gather in
rank order stands in the order of the source, however many they are. Nothing is read before it is asked for.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from entprune_ds.evaluation.images import check_images, check_labels
from entprune_ds.evaluation.npz import member_names, open_member
from entprune_ds.evaluation.parts import Parts

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

Batches = Callable[[int, int, int], Iterator[np.ndarray]]
"""(rank, world size, batch size) -> uint8 (n,H,W,C): this rank's images, in order."""


@dataclass(frozen=True)
class ImageSource:
    """Images of one size."""

    name: str
    """Where they lie, for messages and protocols."""
    shape: tuple[int, ...]
    """(N,H,W,C)."""
    batches: Batches
    labels: np.ndarray | None = None
    """(N,) i64 where they are known."""


def own_range(count: int, rank: int, world_size: int) -> range:
    """The contiguous part of 0..count-1 that a rank works on; the parts of all ranks, one after the other, are all."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def from_array(images: np.ndarray, labels: np.ndarray | None = None, name: str = "images in memory") -> ImageSource:
    """Images (N,H,W,C) uint8 in memory, or mapped from a file.

    Raises:
        ValueError: for anything else, or labels of another number.
    """
    check_images(images, name)
    if labels is not None:
        check_labels(images, labels, f"labels of {name}")

    def batches(rank: int, world_size: int, size: int) -> Iterator[np.ndarray]:
        mine = own_range(len(images), rank, world_size)
        for start in range(mine.start, mine.stop, size):
            yield np.asarray(images[start : min(start + size, mine.stop)])

    return ImageSource(name, images.shape, batches, labels)


def from_npz(path: Path) -> ImageSource:
    """Samples in ADM's form: arr_0, and arr_1 (labels) where there is one.

    Raises:
        ValueError: the file is missing, damaged, or holds other arrays.
    """
    images = open_member(path)
    check_images(images, f"{path}: arr_0")
    labels = open_member(path, "arr_1") if "arr_1" in member_names(path) else None
    if labels is not None:
        check_labels(images, labels, f"{path}: arr_1")
    return from_array(images, None if labels is None else labels.astype(np.int64), str(path))


def from_folder(folder: Path) -> ImageSource:
    """Pictures of a folder in the order of their names; all are looked at here, so that other sizes are known now.

    `labels.csv` (file,label), as `entprune-ds sample` writes it, gives the labels.

    Raises:
        ValueError: no picture, one that cannot be opened, or pictures of several sizes or kinds.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)}).")
    kinds: dict[tuple[int, ...], list[Path]] = {}
    for path in files:
        kinds.setdefault(_picture_shape(path), []).append(path)
    if len(kinds) > 1:
        shown = "; ".join(f"{list(kind)}: {len(found)}, e.g. {found[0].name}" for kind, found in kinds.items())
        raise ValueError(f"{folder} holds pictures of several sizes (H,W,C): {shown}. They must be of one size.")
    shape = (len(files), *next(iter(kinds)))

    def batches(rank: int, world_size: int, size: int) -> Iterator[np.ndarray]:
        mine = own_range(len(files), rank, world_size)
        for start in range(mine.start, mine.stop, size):
            chosen = files[start : min(start + size, mine.stop)]
            yield np.stack([_read_picture(path, shape[3]) for path in chosen])

    return ImageSource(str(folder), shape, batches, _read_labels(folder, files))


def from_parts(parts: Parts, labels: np.ndarray) -> ImageSource:
    """Samples that are all drawn, while they still lie in parts."""

    def batches(rank: int, world_size: int, size: int) -> Iterator[np.ndarray]:
        mine = own_range(parts.count, rank, world_size)
        for start in range(mine.start, mine.stop, size):
            yield parts.take(list(range(start, min(start + size, mine.stop))))

    return ImageSource(str(parts.folder), (parts.count, *parts.image_shape), batches, labels)


def open_images(path: Path) -> ImageSource:
    """An npz or a folder of pictures.

    Raises:
        ValueError: as from_npz and from_folder.
    """
    return from_folder(path) if path.is_dir() else from_npz(path)


def _picture_shape(path: Path) -> tuple[int, int, int]:
    """(H,W,C) from the head of a file; grey pictures have C = 1, all others are read as RGB."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width, 1 if picture.mode == "L" else 3
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be opened as a picture ({error}). Remove it, or draw it again.") from error


def _read_picture(path: Path, channels: int) -> np.ndarray:
    """uint8 (H,W,C)."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture if channels == 1 else picture.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it, or draw it again.") from error
    return pixels[:, :, None] if channels == 1 else pixels


def _read_labels(folder: Path, files: list[Path]) -> np.ndarray | None:
    table = folder / "labels.csv"
    if not table.is_file():
        return None
    try:
        with table.open(newline="") as file:
            labels = {row["file"]: int(row["label"]) for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{table} must have columns file and label ({error}). Draw the samples again.") from error
    if set(labels) != {path.name for path in files}:
        raise ValueError(f"{table} and the pictures beside it do not fit. Draw the samples again.")
    return np.array([labels[path.name] for path in files], dtype=np.int64)
