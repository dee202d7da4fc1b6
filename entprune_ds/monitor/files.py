"""Files that are whole or absent, and line files that a killed process may have cut short."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: temporary file beside it, fsync, rename. A reader sees the old or the new one, never half.

    Raises:
        OSError: the disk is full or read-only; the old file is untouched and the temporary one removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)


def parse_json(data: bytes | str) -> Any:
    """Plain value of a JSON text.

    Raises:
        ValueError: not JSON, or nested too deeply to read.
    """
    text = data.decode("utf-8", errors="replace") if isinstance(data, bytes) else data
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


@dataclass(frozen=True)
class Lines:
    """Content of a JSON-lines file."""

    rows: list[dict]
    """The objects, in file order."""
    damaged: int
    """Lines that are not a JSON object: cut short by a kill, or damaged."""
    found: bool
    """Whether the file exists."""


def read_json_lines(path: Path) -> Lines:
    """Read a file of one JSON object a line; empty lines are ignored, damaged ones counted."""
    if not path.is_file():
        return Lines([], 0, False)
    rows, damaged = [], 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            damaged += 1
    return Lines(rows, damaged, True)
