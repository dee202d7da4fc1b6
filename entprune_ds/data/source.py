"""A shard opened for reading from front to end: a local file, one on a server, or what a command prints."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from entprune_ds.data.index import Shard
from entprune_ds.data.latents import REMEDY, ShardError
from entprune_ds.data.pipe import PipeFile
from entprune_ds.data.places import Pipe, Place, Url
from entprune_ds.data.web import WebFile


class LocalSource:
    """A local tar."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = path.open("rb", buffering=1 << 14)
        except OSError as error:
            raise _unreadable(path, error) from error

    def read(self, size: int, /) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        try:
            return self.file.read(size)
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def skip(self, size: int, /) -> None:
        """Pass over bytes without reading them."""
        self.file.seek(size, 1)

    def finish(self) -> None:
        """The tar is at its end; its checksum was compared before."""

    def __enter__(self) -> LocalSource:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


class RemoteSource:
    """A tar that comes from elsewhere; its checksum is compared on the way."""

    def __init__(self, place: Url | Pipe, shard: Shard, verify: bool):
        self.place, self.shard = place, shard
        self.file = WebFile(place, shard.bytes) if isinstance(place, Url) else PipeFile(place, shard.bytes)
        self.hash = hashlib.sha256() if verify else None

    def read(self, size: int, /) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        data = self.file.read(size)
        if self.hash is not None:
            self.hash.update(data)
        return data

    def skip(self, size: int, /) -> None:
        """Pass over bytes; they are read all the same."""
        self.read(size)

    def finish(self) -> None:
        """Read what is left and compare the checksum.

        Raises:
            ShardError: when it is not the one of the index.
        """
        if self.hash is None:
            return
        while self.read(1 << 18):
            pass
        if self.hash.hexdigest() != self.shard.sha256:
            message = f"{self.place} is damaged: its SHA-256 is not the one in the index."
            raise ShardError(f"{message} Copy it there again.")

    def __enter__(self) -> RemoteSource:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def open_shard(place: Place, shard: Shard, verify: bool) -> LocalSource | RemoteSource:
    """Open a shard; a context manager.

    Raises:
        ShardError: here and from every read, when it cannot be read.
    """
    return LocalSource(place) if isinstance(place, Path) else RemoteSource(place, shard, verify)


def _unreadable(path: Path, error: OSError) -> ShardError:
    if isinstance(error, FileNotFoundError):
        return ShardError(f"{path} is missing. {REMEDY}")
    return ShardError(f"{path} cannot be read ({error.strerror}). Check its permissions and the disk.")
