"""The sample format: one example is KEY.npy (its numbers), KEY.cls (label) and KEY.json (its origin) in a tar.

What the numbers are is the `kind` of the folder: latents, pixels or moments (see Kind and KINDS).
These are the usual WebDataset suffixes, so other tools can read the tars. Nothing here can unpickle.
WebDataset writes the tars; tar.py reads them, several times faster than WebDataset's iterators.
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

from entprune_ds.plain_json import parse_json


@dataclass(frozen=True)
class Kind:
    """How the .npy members of one kind of example look."""

    dtype: np.dtype
    """On disk, little-endian."""
    ndim: int
    form: str
    """dtype and shape in words."""


KINDS = {
    "latents": Kind(np.dtype("<f4"), 3, "float32 (C,H,W)"),
    "pixels": Kind(np.dtype("u1"), 3, "uint8 (C,H,W)"),
    "moments": Kind(np.dtype("<f4"), 4, "float32 (2,2C,H,W)"),
}
"""latents: used as they are. pixels: x / 127.5 - 1. moments: mean and log-variance of a VAE, one after the other along
the channels, of the image [0] and of its mirror image [1]; draw.py makes latents of them."""

REMEDY = "Copy it again from its source, or repeat the `entprune-ds shards` command that wrote it: it repairs."

Example = tuple[str, np.ndarray, int, dict[str, Any]]
"""An example to write: (key, array of the folder's kind, label, meta)."""
Entry = tuple[str, np.ndarray, int]
"""An example as it is stored: (key, array of the folder's kind, label)."""

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


def latent_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C,H,W) that the model sees, from the shape on disk."""
    return (shape[1] // 2, *shape[2:]) if kind == "moments" else shape


def shape_problem(kind: str, shape: tuple[int, ...]) -> str:
    """What is wrong with a shape on disk; empty when it fits the kind."""
    fits = len(shape) == KINDS[kind].ndim and min(shape) > 0
    if kind == "moments":
        fits = fits and shape[0] == 2 and shape[1] % 2 == 0
    return "" if fits else f"{kind} must be {KINDS[kind].form}, got the shape {shape}"


# ---------------------------------------------------------------- writing


def checked_examples(examples: Iterable[Example], histogram: list[int]) -> Iterator[Example]:
    """Pass examples on and count their labels into `histogram` (one entry per class).

    Raises:
        ValueError: for a repeated key, a second shape, or a label without an entry.
    """
    keys: set[str] = set()
    first: tuple[int, ...] | None = None
    for key, array, label, meta in examples:
        first = array.shape if first is None else first
        if key in keys:
            raise ValueError(f"example key {key} comes twice. Give every example a name of its own.")
        if array.shape != first:
            raise ValueError(f"example {key}: shape {array.shape} differs from the first, {first}. Make them equal.")
        if not 0 <= label < len(histogram):
            raise ValueError(f"example {key}: the label must lie in [0, {len(histogram)}), got {label}.")
        keys.add(key)
        histogram[label] += 1
        yield key, array, label, meta


def write_tar(path: Path, examples: Iterable[Example], kind: str = "latents") -> None:
    """Write one tar; its bytes depend on the examples only (fixed time and owner).

    Raises:
        ValueError: when an example cannot be stored.
    """
    with path.open("wb") as file, TarWriter(file, mtime=0, compress=False, encoder=False) as tar:
        for example in examples:
            tar.write(encode_example(*example, kind=kind))


def encode_example(
    key: str, array: np.ndarray, label: int, meta: dict[str, Any], kind: str = "latents"
) -> dict[str, Any]:
    """One example as the bytes that `webdataset.TarWriter` writes.

    Args:
        key: name of the example: letters, digits, `-` and `_`, at most 90 (webdataset cuts names at the first dot).
        array: as KINDS says for `kind`, finite.
        label: class index.
        meta: plain JSON values.
        kind: latents, pixels or moments.

    Raises:
        ValueError: when a value cannot be stored.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"example key {key!r} must be 1 to 90 letters, digits, `-` or `_`, not `__` first. Rename it.")
    if array.dtype != KINDS[kind].dtype or shape_problem(kind, array.shape):
        raise ValueError(f"example {key}: {kind} must be {KINDS[kind].form}, got {array.dtype} {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"example {key}: {kind} hold nan or inf. Repair or leave out the example.")
    text = json.dumps(meta, sort_keys=True, allow_nan=False)
    return {"__key__": key, "npy": encode_array(array, kind), "cls": b"%d" % label, "json": text.encode()}


def encode_array(array: np.ndarray, kind: str = "latents") -> bytes:
    """An array of any shape, of the dtype of `kind`, in the .npy format, version 1.0."""
    stream = io.BytesIO()
    plain = np.ascontiguousarray(array, KINDS[kind].dtype)
    np.lib.format.write_array(stream, plain, version=(1, 0), allow_pickle=False)
    return stream.getvalue()


# ---------------------------------------------------------------- reading


def decode_example(
    path: object, sample: dict[str, Any], shape: tuple[int, ...], num_classes: int, kind: str = "latents"
) -> Entry:
    """Key, array and label of an example of the tar `path` (a Path, or what else names it).

    Raises:
        ShardError: naming the file and the member, when a part is missing or not what the index says.
    """
    if "__damage__" in sample:
        raise ShardError(f"{path}: {sample['__damage__']}. {REMEDY}")
    member = f"{sample['__key__']}.npy"
    try:
        array = decode_array(sample["npy"], shape, kind)
        member = f"{sample['__key__']}.cls"
        return sample["__key__"], array, decode_label(sample["cls"], num_classes)
    except KeyError as error:
        raise ShardError(f"{path}: member {member} is missing. {REMEDY}") from error
    except (ValueError, TypeError) as error:  # a garbled .npy header can be either
        raise ShardError(f"{path}: member {member} {error}. {REMEDY}") from error


def decode_array(data: bytes, shape: tuple[int, ...], kind: str = "latents") -> np.ndarray:
    """Read-only array of `shape` from .npy bytes; a view of `data` (5 us for 64 numbers, 10 us for 4096).

    Raises:
        ValueError: when the bytes are not a finite array of that shape and of the dtype of `kind`.
    """
    dtype = KINDS[kind].dtype
    start = 10 + int.from_bytes(data[8:10], "little")  # magic, version, then the length of the header (.npy 1.0)
    found_shape, fortran_order, found = _parse_header(data[:start])
    if found_shape != shape or found != dtype:
        raise ValueError(f"holds {found} {found_shape}, the index says {dtype} {shape}")
    size = start + dtype.itemsize * math.prod(shape)
    if len(data) != size:
        raise ValueError(f"has {len(data)} bytes, needs {size}")
    array = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("holds nan or inf")
    return array


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
    return parse_json(data)
