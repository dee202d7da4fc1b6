"""Existing image WebDatasets: tars that hold KEY.jpg (or .png, .webp) beside KEY.cls or KEY.json.

Only the headers and the labels are read here, and nothing is ever unpacked; workers read the images by their place in
the tar. Tars keep their order: they are usually shuffled already, and hopping between them would be slow.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from braceexpand import braceexpand

from entprune_ds.data.image_sources import MAX_CLASSES, Item, Source, SourceError, first_lines
from entprune_ds.data.images import SUFFIXES
from entprune_ds.plain_json import parse_json

ParallelMap = Callable[[Callable[[Path], "Scan"], list[Path]], Iterable["Scan"]]
MAX_LABEL_BYTES = 2**20


@dataclass
class Scan:
    """What one tar holds."""

    path: str
    items: list[Item] = field(default_factory=list)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    problem: str = ""
    """Why the whole tar is refused; empty when it is not."""


def tar_paths(src: str) -> list[Path]:
    """The tars of a folder (sorted), or those that a path or brace pattern names (in its order).

    Raises:
        SourceError: when there are none, they lie in several folders, or one is missing, compressed or named twice.
    """
    paths = sorted(Path(src).glob("*.tar")) if Path(src).is_dir() else [Path(text) for text in braceexpand(src)]
    if not paths or len({path.parent for path in paths}) > 1:
        raise SourceError(
            f"{src!r} names no tars of one folder. Give a folder, or a pattern such as 'in-{{00..99}}.tar'."
        )
    wrong = [f"{p} is not an uncompressed .tar file. Unpack it (gunzip), or correct the path." for p in paths
             if p.suffix != ".tar" or not p.is_file()]  # fmt: skip
    wrong += [f"{p} is named twice by {src!r}. Name it once." for p, times in Counter(paths).items() if times > 1]
    if wrong:
        raise SourceError(first_lines(wrong))
    return paths


def tar_source(paths: list[Path], num_classes: int | None, parallel_map: ParallelMap) -> Source:
    """The labelled images of some tars, in file order.

    Args:
        paths: the tars, all in one folder.
        num_classes: labels lie below it; None means the largest label + 1.
        parallel_map: applies scan_tar to the paths; any order of results.

    Raises:
        SourceError: listing every tar that is damaged or holds a member whose name leaves the folder.
    """
    by_path = {scan.path: scan for scan in parallel_map(scan_tar, paths)}
    scans = [by_path[str(path)] for path in paths]
    problems = [scan.problem for scan in scans if scan.problem]
    if problems:
        raise SourceError(first_lines(problems))
    items, unusable = [], [skip for scan in scans for skip in scan.unusable]
    limit = num_classes or MAX_CLASSES
    for item in (item for scan in scans for item in scan.items):
        if item.label < limit:
            items.append(item)
        else:
            unusable.append((item.name, f"its label {item.label} is not below {limit}"))
    count = num_classes or max((item.label for item in items), default=0) + 1
    return Source(paths[0].parent, tuple(items), count, None, unusable=tuple(unusable))


def scan_tar(path: Path) -> Scan:
    """Find the images and labels of one tar by its headers."""
    scan = Scan(str(path))
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            groups = _groups(_members(tar, path, scan))
            file.seek(tar.offset)
            if not scan.problem and not _ends_well(file):
                scan.problem = f"{path} is truncated or damaged: its end mark is missing. Copy it again."
            if not scan.problem:
                for (key, repeat), group in groups.items():
                    _add(scan, tar, f"{path.name}/{key}", group, repeat)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        scan.problem = f"{path} cannot be read ({error}). Copy it again."
    return scan


def _groups(members: Iterable[tarfile.TarInfo]) -> dict[tuple[str, int], dict[str, tarfile.TarInfo]]:
    """{(key, repeat): {suffix: member}}; a member that the example has already opens the next repeat of its key."""
    groups: dict[tuple[str, int], dict[str, tarfile.TarInfo]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for member in members:
        folder, name = PurePosixPath(member.name).parent, PurePosixPath(member.name).name
        stem, _, suffix = name.partition(".")
        key, suffix = str(folder / stem), suffix.lower()
        groups.setdefault((key, seen[key, suffix]), {})[suffix] = member
        seen[key, suffix] += 1
    return groups


def _ends_well(file: BinaryIO) -> bool:
    """Whether only zeros follow, at least a block of them; tarfile itself takes a damaged header for the end."""
    rest = file.read(2**20)
    found = len(rest) >= tarfile.BLOCKSIZE
    while rest and found:
        found, rest = not rest.strip(b"\0"), file.read(2**20)
    return found


def _members(tar: tarfile.TarFile, path: Path, scan: Scan) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if member.name.startswith("/") or ".." in parts or "\\" in member.name:
            scan.problem = f"{path}: the member name {member.name!r} leaves the tar's root. Do not use this tar."
            return
        if member.isreg() and not member.issparse():
            yield member
        elif not member.isdir():
            scan.unusable.append((f"{path.name}/{member.name}", "is a link or a special member"))


def _add(scan: Scan, tar: tarfile.TarFile, name: str, group: dict[str, tarfile.TarInfo], repeat: int) -> None:
    images = [suffix for suffix in group if f".{suffix}" in SUFFIXES]
    if repeat:
        if images or set(group) & {"cls", "json"}:
            again = ", ".join(sorted(group))
            scan.unusable.append((name, f"occurs again in the tar ({again}); the first occurrence is used"))
        return
    if not images:
        if set(group) & {"cls", "json"}:
            scan.unusable.append((name, "has no image"))
        return
    if len(images) > 1:
        scan.unusable.append((name, f"has several images: {', '.join(sorted(images))}"))
        return
    member = group[images[0]]
    label = _label(tar, group)
    if label is None:
        scan.unusable.append((name, 'has no label: a whole number in .cls, or "label" in .json'))
        return
    full = f"{name}.{images[0]}"
    scan.items.append(Item(full, label, Path(scan.path).name, member.offset_data, member.size))


def _label(tar: tarfile.TarFile, group: dict[str, tarfile.TarInfo]) -> int | None:
    member = group.get("cls", group.get("json"))
    if member is None or member.size > MAX_LABEL_BYTES:
        return None
    file = tar.extractfile(member)  # a view of the open tar: nothing is written to disk
    data = file.read() if file is not None else b""
    if "cls" in group:
        return int(data) if re.fullmatch(rb"\s*[0-9]{1,9}\s*", data) else None
    try:
        value = parse_json(data)
    except ValueError:
        return None
    label = value.get("label") if isinstance(value, dict) else None
    return label if isinstance(label, int) and not isinstance(label, bool) and label >= 0 else None
