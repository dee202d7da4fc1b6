"""Samples as one npz in the form of ADM's evaluator: arr_0 uint8 (N,H,W,C), arr_1 i64 labels (N,).

ADM's evaluator.py (openai/guided-diffusion) streams `arr_0` from the zip, ignores other members, and needs C order and
an npy header of version 1 or 2. The member is stored, not compressed, and is written and read in pieces: 50,000 images
of 256 x 256 (9.8 GB) are never in memory.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from entprune_ds.evaluation.images import check_images, check_labels, write_whole

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time stamp of the members, so that equal samples make equal files."""
LOCAL_HEADER = 30  # bytes of a member's fixed header, with the lengths of name and extra field at 26 and 28
MEMORY_ONLY = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, KeyError)


def write_npz(path: Path, shape: tuple[int, ...], pieces: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """Write images piece by piece; the file appears whole or not at all.

    Args:
        path: the file.
        shape: (N,H,W,C) of all images.
        pieces: uint8 (n,H,W,C) that add up to it.
        labels: (N,) integers.

    Raises:
        ValueError: pieces that do not add up to the shape, or a file that cannot be written.
    """

    def write(file: object) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:  # type: ignore[call-overload]
            with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                count = 0
                for piece in pieces:
                    check_images(piece, "a piece of the samples")
                    if piece.shape[1:] != shape[1:]:
                        raise ValueError(f"a piece of the samples is {piece.shape[1:]} (H,W,C), not {shape[1:]}.")
                    member.write(np.ascontiguousarray(piece).data)
                    count += len(piece)
                if count != shape[0]:
                    raise ValueError(f"the pieces hold {count} samples, not {shape[0]}.")
            with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w") as member:
                np.lib.format.write_array(member, labels.astype(np.int64), allow_pickle=False)

    write_whole(path, write)


def save_npz(images: np.ndarray, labels: np.ndarray, path: str | Path) -> None:
    """Write images (N,H,W,C) uint8 and labels (N,) that are in memory.

    Raises:
        ValueError: wrong images or labels, or the file cannot be written.
    """
    check_images(images)
    check_labels(images, labels)
    write_npz(Path(path), images.shape, [images], labels)


def member_shape(path: Path, name: str = "arr_0") -> tuple[int, ...]:
    """Shape of a member, from its header alone.

    Raises:
        ValueError: no such file, a damaged one, or no such member.
    """
    return _opened(path, name, header_only=True)  # type: ignore[return-value]


def open_member(path: Path, name: str = "arr_0") -> np.ndarray:
    """A member without reading it: mapped from the file where it is stored as it is, else unpacked into memory.

    Raises:
        ValueError: no such file, a damaged one, or no such member.
    """
    return _opened(path, name, header_only=False)  # type: ignore[return-value]


def member_names(path: Path) -> list[str]:
    """Names of the arrays in a file.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except MEMORY_ONLY as error:
        raise _damaged(path, error) from error


def _opened(path: Path, name: str, header_only: bool) -> np.ndarray | tuple[int, ...]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    if name not in member_names(path):
        raise ValueError(f"{path} holds no {name}, only {', '.join(member_names(path)) or 'nothing'}.")
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else _header_2
                shape, fortran, dtype = reader(member)
                header = member.tell()
        if header_only:
            return shape
        if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.hasobject:
            with np.load(path, allow_pickle=False) as file:
                return file[name]
        with path.open("rb") as file:
            file.seek(info.header_offset)
            name_length, extra_length = struct.unpack("<HH", file.read(LOCAL_HEADER)[26:30])
        offset = info.header_offset + LOCAL_HEADER + name_length + extra_length + header
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except MEMORY_ONLY as error:
        raise _damaged(path, error) from error


def _header_2(member: object) -> tuple:
    return np.lib.format.read_array_header_2_0(member)  # type: ignore[arg-type]


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as an npz ({error}). Write it again.")
