"""Our description beside a file of another format: original block indices, what it was trained with, where it is from.

A foreign format has no place for it. It counts only while the weights are those it was written for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entprune_ds.atomic import write_text
from entprune_ds.config import ModelConfig
from entprune_ds.interop.safetensors import FORMAT, read_description
from entprune_ds.interop.source import Source, description
from entprune_ds.interop.tensors import Reader, Shapes, key_report

OF_THE_FILE = ("format", "model", "kept_blocks", "fingerprint", "deviation")
"""Entries about the file itself, which are not facts of the model."""


def write_beside(path: Path, source: Source, deviation: dict[str, Any]) -> dict[str, Any]:
    """Write the description of a source; returns its values.

    Args:
        path: the JSON file.
        source: what was exported.
        deviation: measured effect of the foreign formulas, or empty.
    """
    values = {"format": FORMAT, **description(source), "fingerprint": _fingerprint(source)}
    values |= {"deviation": deviation} if deviation else {}
    text = json.dumps(values, indent=2, allow_nan=False)
    write_text(path, text)
    return values


def read_beside(
    path: Path, shapes: Shapes, shapes_of: Callable[[ModelConfig], Shapes], reader_of: Callable[[ModelConfig], Reader]
) -> Source | None:
    """The described source, or None without a description that belongs to these weights.

    Args:
        path: the JSON file.
        shapes: {foreign name: shape} of the weights.
        shapes_of: architecture -> the shapes it has in the foreign format.
        reader_of: architecture -> reader by our names.
    """
    if not path.is_file():
        return None
    try:
        model, facts = read_description(path)
    except ValueError:
        return None  # some other JSON file of the user
    if key_report(shapes_of(model), shapes):
        return None
    source = Source(model, reader_of(model), {k: v for k, v in facts.items() if k not in OF_THE_FILE})
    return source if facts.get("fingerprint") == _fingerprint(source) else None


def _fingerprint(source: Source) -> str:
    """SHA-256 of the first numbers of every tensor: tells other weights or blocks without reading gigabytes."""
    found = hashlib.sha256()
    for name in source.shapes:
        found.update(source.read(name).reshape(-1)[:256].contiguous().numpy().tobytes())
    return found.hexdigest()
