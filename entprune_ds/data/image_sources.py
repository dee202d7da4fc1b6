"""Where labelled images come from: an image folder, a CSV file (image_csv.py) or WebDataset tars (image_tars.py).

A source is only a list of names and labels, in an order that is the same everywhere; images are read later, by workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from entprune_ds.data.images import SUFFIXES

MAX_CLASSES = 100_000
Skips = tuple[tuple[str, str], ...]
"""(name, reason) of what was left out."""


class SourceError(ValueError):
    """A source that cannot be used: one line per problem, each with the remedy."""


@dataclass(frozen=True)
class Item:
    """One labelled image that has not been read yet."""

    name: str
    """Path below the source, with `/`; TAR/MEMBER for a member of a tar."""
    label: int
    file: str = ""
    """The file to read, when it is not `name` itself: the tar."""
    start: int = 0
    """First byte in that file."""
    size: int = -1
    """Bytes to read; -1 means to the end."""


@dataclass(frozen=True)
class Source:
    """All images of one split."""

    root: Path
    items: tuple[Item, ...]
    num_classes: int
    classes: tuple[str, ...] | None
    """Class names by label, where the source has names."""
    ignored: Skips = ()
    """Files that are no images by their name; listed, not counted as unreadable."""
    unusable: Skips = ()
    """Examples known to be unusable before reading: no label, a label out of range, a link."""

    @property
    def digest(self) -> str:
        """SHA-256 over names and labels; the content of the images is not part of it."""
        digest = hashlib.sha256(json.dumps([self.num_classes, self.classes]).encode())
        for item in self.items:
            digest.update(f"\n{item.label} {item.size} {item.name}".encode(errors="surrogateescape"))
        return digest.hexdigest()


def read_bytes(root: Path, item: Item, limit: int) -> bytes:
    """The content of an image, undecoded; at most `limit` bytes.

    Raises:
        OSError: when the file is missing or unreadable.
        ValueError: when it is no ordinary file or too large, or a tar has become shorter than it was.
    """
    path = root / (item.file or item.name)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ValueError("is not an ordinary file")
    if (status.st_size if item.size < 0 else item.size) > limit:
        raise ValueError(f"has more than {limit} bytes")
    with path.open("rb") as file:
        file.seek(item.start)
        data = file.read(item.size)
    if item.size >= 0 and len(data) != item.size:
        raise ValueError(f"the tar ends after {len(data)} of {item.size} bytes")
    return data


def split_folders(src: Path) -> dict[str, Path]:
    """{"train": SRC/train, "val": SRC/val} when these are exactly the sub-folders of SRC, else {"train": SRC}."""
    folders = {entry.name for entry in os.scandir(src) if entry.is_dir() and not entry.name.startswith(".")}
    return {name: src / name for name in ("train", "val")} if folders == {"train", "val"} else {"train": src}


# ---------------------------------------------------------------- image folder


def folder_source(root: Path, classes: tuple[str, ...] | None = None) -> Source:
    """Images of ROOT/CLASS/..., at any depth; labels are the sorted class names.

    Links to files and a linked class folder are followed, links to folders below it are not. Names that start with a
    dot and files without an image's suffix are ignored and listed.

    Args:
        root: folder whose sub-folders are the classes.
        classes: class names by label, when they are known already (those of the training images).

    Raises:
        SourceError: when there are no classes, a class has no images, or a class is not among `classes`.
    """
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    found = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if not found:
        raise SourceError(f"{root} holds no sub-folders. An image folder has one sub-folder per class.")
    unknown = sorted(set(found) - set(found if classes is None else classes))
    if unknown:
        raise SourceError(f"{root} has classes that the training images lack: {_some(unknown)}. Move or rename them.")
    labels = {name: label for label, name in enumerate(found if classes is None else classes)}
    items: list[Item] = []
    ignored = [(entry.name, "lies beside the class folders") for entry in entries if entry.name not in labels]
    for name in found:
        before = len(items)
        for path in _files_below(root / name):
            relative = path.relative_to(root).as_posix()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                items.append(Item(relative, labels[name]))
            else:
                ignored.append((relative, "is no image by its name"))
        if len(items) == before:
            raise SourceError(f"{root / name} holds no images. Remove the empty class folder, or fill it.")
    return Source(root, tuple(items), len(labels), tuple(labels), tuple(ignored))


def _files_below(folder: Path) -> Iterable[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files))


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def first_lines(problems: list[str]) -> str:
    """The first ten problems, one per line, and how many more there are."""
    rest = [f"... and {len(problems) - 10} more lines."] if len(problems) > 10 else []
    return "\n".join(problems[:10] + rest)
