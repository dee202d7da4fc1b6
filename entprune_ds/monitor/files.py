"""Reading JSON, and line files that a killed process may have cut short."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..plain_json import parse_json


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
            value = parse_json(line.decode("utf-8", errors="replace"))
        except ValueError:
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            damaged += 1
    return Lines(rows, damaged, True)
