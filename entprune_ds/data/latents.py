"""The sample format: one example is KEY.npy (latents, f32), KEY.cls (label) and KEY.json (its origin) in a tar.

These are the usual WebDataset suffixes, so other tools can read the tars. Nothing here can unpickle.
WebDataset writes the tars, and its tar iterator and key grouping read them; its decoders would halve the speed.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_iterator

DTYPE = np.dtype("<f4")
"""Latents are little-endian float32 on disk."""

REMEDY = "Copy it again from its source, or repeat the `entprune-ds shards` command that wrote it: it repairs."

Example = tuple[str, np.ndarray, int, dict[str, Any]]
"""An example to write: (key, latents (C,H,W) f32, label, meta)."""
Entry = tuple[str, np.ndarray, int]
"""An example as training reads it: (key, latents (C,H,W) f32, label)."""

_KEY = re.compile(r"(?!__)[A-Za-z0-9_-]{1,90}")


class ShardError(ValueError):
    """Shards that cannot be used; one line per problem, each naming the file and the remedy."""


@dataclass(frozen=True)
class Batch:
    """Examples of one rank."""

    latents: Tensor
    """(N,C,H,W) f32."""
    labels: Tensor
    """(N,) i64."""
    slots: tuple[int, ...]
    """Positions of the examples in the global batch, ascending."""


# ---------------------------------------------------------------- writing


def checked_examples(examples: Iterable[Example], histogram: list[int]) -> Iterator[Example]:
    """Pass examples on and count their labels into `histogram` (one entry per class).

    Raises:
        ValueError: for a repeated key, a second shape, or a label without an entry.
    """
    keys: set[str] = set()
    first: tuple[int, ...] | None = None
    for key, latents, label, meta in examples:
        first = latents.shape if first is None else first
        if key in keys:
            raise ValueError(f"example key {key} comes twice. Give every example a name of its own.")
        if latents.shape != first:
            raise ValueError(f"example {key}: shape {latents.shape} differs from the first, {first}. Make them equal.")
        if not 0 <= label < len(histogram):
            raise ValueError(f"example {key}: the label must lie in [0, {len(histogram)}), got {label}.")
        keys.add(key)
        histogram[label] += 1
        yield key, latents, label, meta


def write_tar(path: Path, examples: Iterable[Example]) -> None:
    """Write one tar; its bytes depend on the examples only (fixed time and owner).

    Raises:
        ValueError: when an example cannot be stored.
    """
    with path.open("wb") as file, TarWriter(file, mtime=0, compress=False, encoder=False) as tar:
        for example in examples:
            tar.write(encode_example(*example))


def encode_example(key: str, latents: np.ndarray, label: int, meta: dict[str, Any]) -> dict[str, Any]:
    """One example as the bytes that `webdataset.TarWriter` writes.

    Args:
        key: name of the example: letters, digits, `-` and `_`, at most 90 (webdataset cuts names at the first dot).
        latents: (C,H,W) f32, finite.
        label: class index.
        meta: plain JSON values.

    Raises:
        ValueError: when a value cannot be stored.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"example key {key!r} must be 1 to 90 letters, digits, `-` or `_`, not `__` first. Rename it.")
    if latents.dtype != DTYPE or latents.ndim != 3:
        raise ValueError(f"example {key}: latents must be float32 (C,H,W), got {latents.dtype} {latents.shape}.")
    if not np.isfinite(latents).all():
        raise ValueError(f"example {key}: latents hold nan or inf. Repair or leave out the example.")
    text = json.dumps(meta, sort_keys=True, allow_nan=False)
    return {"__key__": key, "npy": encode_latents(latents), "cls": b"%d" % label, "json": text.encode()}


def encode_latents(latents: np.ndarray) -> bytes:
    """An f32 array of any shape in the .npy format, version 1.0."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(latents, DTYPE), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


# ---------------------------------------------------------------- reading


def read_tar(path: Path) -> Iterator[dict[str, Any]]:
    """The examples of a tar in file order, undecoded: {"__key__": str, "npy": bytes, "cls": bytes}.

    Raises:
        ShardError: naming the file and the member, when the tar is damaged.
    """
    member = "its first member"

    def select(name: str) -> bool:  # called with every member just before it is read; training skips the .json ones
        nonlocal member
        member = name
        return name.endswith((".npy", ".cls"))

    try:
        with path.open("rb") as file:
            members = ({**found, "__url__": path.name} for found in tar_file_iterator(file, select_files=select))
            yield from group_by_keys(members)
    except Exception as error:  # tarfile, zlib and webdataset raise a dozen types for damaged bytes
        raise ShardError(f"{path}: cannot read {member} ({type(error).__name__}: {error}). {REMEDY}") from error


def decode_example(path: Path, sample: dict[str, Any], shape: tuple[int, ...], num_classes: int) -> Entry:
    """Key, latents and label of an example of the tar `path`.

    Raises:
        ShardError: naming the file and the member, when a part is missing or not what the index says.
    """
    member = f"{sample['__key__']}.npy"
    try:
        latents = decode_latents(sample["npy"], shape)
        member = f"{sample['__key__']}.cls"
        return sample["__key__"], latents, decode_label(sample["cls"], num_classes)
    except KeyError as error:
        raise ShardError(f"{path}: member {member} is missing. {REMEDY}") from error
    except (ValueError, TypeError) as error:  # a garbled .npy header can be either
        raise ShardError(f"{path}: member {member} {error}. {REMEDY}") from error


def decode_latents(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Read-only f32 array of `shape` from .npy bytes; a view of `data` (5 us for 64 numbers, 10 us for 4096).

    Raises:
        ValueError: when the bytes are not a finite float32 array of that shape.
    """
    start = 10 + int.from_bytes(data[8:10], "little")  # magic, version, then the length of the header (.npy 1.0)
    found_shape, fortran_order, dtype = _parse_header(data[:start])
    if found_shape != shape or dtype != DTYPE:
        raise ValueError(f"holds {dtype} {found_shape}, the index says float32 {shape}")
    if len(data) != start + DTYPE.itemsize * math.prod(shape):
        raise ValueError(f"has {len(data)} bytes, needs {start + DTYPE.itemsize * math.prod(shape)}")
    latents = np.frombuffer(data, DTYPE, offset=start).reshape(shape, order="F" if fortran_order else "C")
    if not np.isfinite(latents).all():
        raise ValueError("holds nan or inf")
    return latents


@lru_cache(maxsize=64)  # parsing costs 20 times the rest, and all examples of a data set have the same header
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"is .npy of version {version}, only (1, 0) is read")
    return np.lib.format.read_array_header_1_0(stream)


def decode_label(data: bytes, num_classes: int) -> int:
    """Class index from its decimal digits.

    Raises:
        ValueError: when it is not a whole number below `num_classes`.
    """
    label = int(data) if data.isdigit() and len(data) < 10 else -1
    if not 0 <= label < num_classes:
        raise ValueError(f"holds {data[:20]!r}, the index says a label from 0 to {num_classes - 1}")
    return label


def decode_meta(data: bytes) -> dict[str, Any]:
    """Plain values of the .json member; training does not read it."""
    return json.loads(data)
