"""Read the examples of a tar from a file or a connection, past damaged members, several times faster than `tarfile`.

Only what shards need is understood: regular files with names of up to 255 characters (ustar). Every header is checked;
after a damaged one the reading goes on at the next block that is a header, so that one bad block costs one example.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Protocol

BLOCK = 512
END = bytes(BLOCK)
WANTED = (".npy", ".cls")
"""Members that training reads; the others (.json) are passed over."""
LARGEST = 1 << 30
"""Bytes of the largest member; a header that says more is taken for damage."""


class Source(Protocol):
    """Bytes that are read from front to end."""

    def read(self, size: int, /) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""

    def skip(self, size: int, /) -> None:
        """Pass over bytes."""


Sample = dict[str, Any]
"""{"__key__": str, "npy": bytes, "cls": bytes}; a part may be missing. "__damage__" says why, where it is known."""


def read_samples(source: Source, skip: int = 0) -> Iterator[Sample]:
    """The examples of a tar in file order, undecoded; members of one example stand next to each other.

    Args:
        source: the tar from its first byte.
        skip: examples to pass over; they are not in the result.
    """
    sample: Sample = {"__key__": ""}
    position = -1
    for name, size in _members(source):
        key, _, suffix = name.partition(".")
        if key != sample["__key__"]:
            if position >= skip:
                yield sample
            sample, position = {"__key__": key}, position + 1
        padding = -size % BLOCK
        if position < skip or not name.endswith(WANTED):
            source.skip(size + padding)
            continue
        data = source.read(size)
        if suffix in sample:
            sample["__damage__"] = f"member {name} comes twice"
        if len(data) < size or len(source.read(padding)) < padding:
            sample["__damage__"] = f"cannot read {name}: the file ends within it"
            break
        sample[suffix] = data
    if position >= skip:
        yield sample


def _members(source: Source) -> Iterator[tuple[str, int]]:
    """Name and size of every regular file; the caller reads or skips its blocks before it asks for the next."""
    while True:
        header = source.read(BLOCK)
        if len(header) < BLOCK or header == END:
            return
        if not _is_header(header):
            continue
        size = int(header[124:136].rstrip(b" \0") or b"0", 8)
        if header[156:157] in (b"0", b"\0"):
            name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
            yield (prefix + b"/" + name if prefix else name).decode("utf-8", "replace"), size
        else:  # folders, links, and extended headers, which describe what we do not use
            source.skip(size + -size % BLOCK)


def _is_header(block: bytes) -> bool:
    """Whether a block is a ustar header with the right checksum and a plain octal size."""
    try:
        stated, size = int(block[148:156].rstrip(b" \0"), 8), int(block[124:136].rstrip(b" \0") or b"0", 8)
    except ValueError:
        return False
    # The checksum is the sum of all bytes, with its own eight taken as spaces. The low half of Adler-32 is one more
    # than the sum, modulo 65521, and much faster than sum().
    total = (zlib.adler32(block) & 0xFFFF) - (zlib.adler32(block[148:156]) & 0xFFFF) + 8 * 32
    return block[257:262] == b"ustar" and 0 <= size <= LARGEST and (total - stated) % 65521 == 0
