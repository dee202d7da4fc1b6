"""Reading JSON, and line files that a killed process may have cut short."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
