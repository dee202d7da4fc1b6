"""Samples that many ranks draw over hours: parts of a fixed size, each a file that is whole or absent.

Part k holds images k * size, ... of the set and is always drawn in one batch, whoever draws it and whenever. So the
number of ranks and a kill change no byte, and the work left is what has no file. The ranks need no collective
meanwhile: who is ready sooner looks for the files of the others.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from entprune_ds import comm
from entprune_ds.atomic import replacing, write_text
from entprune_ds.evaluation.alive import alive, signs
from entprune_ds.evaluation.images import check_drawable, write_whole
from entprune_ds.evaluation.npz import write_npz
from entprune_ds.logs import get_logger
from entprune_ds.plain_json import parse_json

SETTINGS = "settings.json"
POLL_SECONDS = 0.2

DrawPart = Callable[[range], np.ndarray]
"""Indices of images -> uint8 (n,H,W,C)."""


@dataclass(frozen=True)
class Parts:
    """A folder of parts."""

    folder: Path
    count: int
    """Images in all."""
    size: int
    """Images of a part; the last one may be smaller."""

    @property
    def ranges(self) -> list[range]:
        """The images of every part."""
        return [range(s, min(s + self.size, self.count)) for s in range(0, self.count, self.size)]

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"part_{part:06d}.npy"

    def missing(self) -> list[int]:
        """Parts without a file."""
        there = {path.name for path in self.folder.glob("part_*.npy")}
        return [part for part in range(len(self.ranges)) if self.path(part).name not in there]

    def read(self, part: int) -> np.ndarray:
        """Images (n,H,W,C) uint8 of a part, mapped from its file."""
        return np.load(self.path(part), mmap_mode="r", allow_pickle=False)

    def pieces(self) -> Iterator[np.ndarray]:
        """All parts in order."""
        return (self.read(part) for part in range(len(self.ranges)))

    def take(self, indices: list[int]) -> np.ndarray:
        """Some images."""
        return np.stack([self.read(i // self.size)[i % self.size] for i in indices])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H,W,C)."""
        return self.read(0).shape[1:]


def differing(settings: dict[str, Any], before: dict[str, Any], where: Path) -> list[str]:
    """Settings that are not those with which samples were begun, both values named."""
    keys = [*settings, *(key for key in before if key not in settings)]
    return [
        f"`{key}` is {settings.get(key, 'absent')}, but {where} was begun with {before.get(key, 'absent')}."
        for key in keys
        if settings.get(key) != before.get(key)
    ]


def begin(parts: Parts, settings: dict[str, Any]) -> list[str]:
    """Make the folder ready, or find it begun with the same settings. On rank 0, with the folder locked.

    Returns:
        Why it cannot be continued: empty if it can.
    """
    path = parts.folder / SETTINGS
    if path.is_file():
        try:
            before = parse_json(path.read_text())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            return [f"{path} is damaged. Remove {parts.folder} and start again."]
        if found := differing(settings, before, parts.folder):
            remedy = f"Use the former settings, remove {parts.folder}, or choose another `out`."
            return [*found, remedy]
    for rest in parts.folder.glob(".*.tmp"):  # of a killed rank
        rest.unlink()
    shape = None
    for part, indices in enumerate(parts.ranges):
        if not parts.path(part).is_file():
            continue
        try:
            images = parts.read(part)
            sound = images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(indices)
            sound = sound and shape in (None, images.shape[1:])
        except (ValueError, OSError, EOFError):
            sound = False
        if sound:
            shape = images.shape[1:]
        else:
            get_logger().warning("%s is damaged: it is drawn again", parts.path(part))
            parts.path(part).unlink()
    write_text(path, json.dumps(settings, indent=2))
    return []


def draw_missing(parts: Parts, todo: list[int], draw: DrawPart, on_part: Callable[[int], None]) -> None:
    """Draw every world_size-th of the missing parts, then wait for those of the other ranks.

    Args:
        todo: the parts that were missing at the start, the same on all ranks.
        on_part: called with the number of finished images, of all ranks, after every part and while waiting.

    Raises:
        OSError: the disk is full or not writable.
    """
    rank, world_size = comm.rank(), comm.world_size()

    def left() -> int:
        missing = parts.missing()
        on_part(parts.count - sum(len(parts.ranges[part]) for part in missing))
        return len(missing)

    with alive(parts.folder):
        for part in todo[rank::world_size]:
            images = draw(parts.ranges[part])
            with replacing(parts.path(part)) as temporary, open(temporary, "wb") as file:
                np.save(file, images, allow_pickle=False)
            comm.mark_progress()
            left()
    seen = None
    while count := left():  # to wait is no progress, unless another rank makes some
        before, seen = seen, (count, signs(parts.folder))
        if seen != before:
            comm.mark_progress()
        time.sleep(POLL_SECONDS)


def write_pictures(parts: Parts) -> None:
    """This rank's share of the PNG files, into the folder `pictures` of the parts.

    Raises:
        ValueError: images that no PNG can hold.
        OSError: the disk is full or not writable.
    """
    folder = parts.folder / "pictures"
    folder.mkdir(exist_ok=True)
    for part in range(comm.rank(), len(parts.ranges), comm.world_size()):
        images = parts.read(part)
        check_drawable(images)
        for index, image in zip(parts.ranges[part], images, strict=True):
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(folder / f"{index:06d}.png")
        comm.mark_progress()
    os.sync()  # the files are on the disk before their folder gets its name


def finish_folder(parts: Parts, labels: np.ndarray, out: Path) -> None:
    """Give the finished pictures their place, with labels.csv among them. On rank 0."""
    folder = parts.folder / "pictures"
    with open(folder / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        writer.writerows((f"{index:06d}.png", label) for index, label in enumerate(labels.tolist()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder, out)


def finish_npz(parts: Parts, labels: np.ndarray, out: Path) -> None:
    """Put all parts into one npz, a part at a time. On rank 0.

    Raises:
        ValueError: the file cannot be written.
    """
    write_npz(out, (parts.count, *parts.image_shape), parts.pieces(), labels)


def finish_text(path: Path, text: str) -> None:
    """A small file beside the samples, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def remove(parts: Parts) -> None:
    """Take the parts away; the samples have their place now."""
    shutil.rmtree(parts.folder)
