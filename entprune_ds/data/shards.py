"""Folders of shards: tar files of examples plus `index.json`, which says what must be there.

The index carries counts, sizes and checksums, so a missing or damaged shard is known before training.
It is written last: a folder with an index is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from entprune_ds import config
from entprune_ds.data.latents import (
    KINDS,
    REMEDY,
    Example,
    ShardError,
    checked_examples,
    latent_shape,
    shape_problem,
    write_tar,
)

INDEX = "index.json"
FORMAT = "entprune_ds shards, version 1"


@dataclass(frozen=True)
class Shard:
    """One tar file, as the index describes it."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds."""

    folder: Path
    shards: tuple[Shard, ...]
    shape: tuple[int, ...]
    """Of every example as it is stored."""
    num_classes: int
    shard_size: int
    label_histogram: tuple[int, ...] | None
    """Examples per class; None when a brace pattern chose some of the shards only."""
    description: dict[str, Any]
    kind: str = "latents"
    """What the numbers are: latents, pixels or moments (latents.py)."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C,H,W) of every example as the model sees it."""
        return latent_shape(self.kind, self.shape)

    @property
    def total(self) -> int:
        """Number of examples."""
        return sum(shard.count for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 over the content in shard order; independent of the folder."""
        return config.digest([[shard.count, shard.sha256] for shard in self.shards])


# ---------------------------------------------------------------- writing


def write_shards(
    examples: Iterable[Example], out: Path, shard_size: int, description: dict[str, Any], *, num_classes: int,
    kind: str = "latents",
) -> dict[str, Any]:  # fmt: skip
    """Write examples as `shard-000000.tar`, ... and `index.json`; the same examples give the same bytes.

    A folder complete for the same description, kind, shard size and classes is left alone (`examples` is not read); a
    damaged one is written again. One process at a time may write a folder.

    Args:
        examples: (key, array as KINDS says, label, meta), all of one shape, keys unique.
        out: folder to write; made when missing.
        shard_size: examples per tar (the last one may hold fewer).
        description: plain JSON values that determine the examples (source, split, seed, scaling).
        num_classes: labels lie in [0, num_classes).
        kind: what the arrays are: latents, pixels or moments.

    Returns: the content of index.json.

    Raises:
        ValueError: for a bad example, or a folder that holds something else (ShardError).
        OSError: when the disk is full or not writable; the folder has no index then.
    """
    if shard_size < 1:
        raise ValueError(f"`data.shard_size` must be above 0, got {shard_size}.")
    if kind not in KINDS:
        raise ValueError(f"The kind of examples must be one of {', '.join(KINDS)}, got {kind!r}.")
    wanted = {"description": json.loads(json.dumps(description)), "shard_size": shard_size, "num_classes": num_classes}
    wanted["kind"] = kind
    known = _existing_index(out, wanted)
    if known is not None and not check_shards(known, checksums=True):
        return json.loads((out / INDEX).read_text())
    out.mkdir(parents=True, exist_ok=True)
    histogram = [0] * num_classes
    shape: list[int] = []
    shards: list[dict[str, Any]] = []
    checked = checked_examples(examples, histogram)
    while chunk := list(islice(checked, shard_size)):
        shape = list(chunk[0][1].shape)
        shards.append(asdict(write_shard(out / f"shard-{len(shards):06d}.tar", chunk, kind, known is not None)))
    if not shards:
        raise ValueError(f"there are no examples to write to {out}.")
    return write_index(out, wanted, shape, histogram, shards)


def write_index(
    out: Path, wanted: dict[str, Any], shape: list[int], histogram: list[int], shards: list[dict[str, Any]],
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write index.json: what was `wanted` (description, shard_size, num_classes, kind), what is there, other facts."""
    head = {"format": FORMAT, "shape": shape, "dtype": str(KINDS[wanted["kind"]].dtype), "total": sum(histogram)}
    index = {**head, **wanted, **(facts or {}), "label_histogram": histogram, "shards": shards}
    with replacing(out / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1) + "\n")
    return index


def _existing_index(out: Path, wanted: dict[str, Any]) -> Index | None:
    """The index already in `out`, None when there is none; refuses one of other content."""
    if not (out / INDEX).exists():
        return None
    known = load_index(out)
    found = {"description": known.description, "shard_size": known.shard_size, "num_classes": known.num_classes}
    found["kind"] = known.kind
    if found != wanted:
        message = f"{out} already holds other shards ({json.dumps(found)}), not {json.dumps(wanted)}."
        raise ShardError(f"{message} Choose another `out`, or delete that folder first.")
    return known


def write_shard(path: Path, examples: list[Example], kind: str, repair: bool) -> Shard:
    """Write one tar in place of `path`; without `repair`, a file of other content is refused (ShardError)."""
    with replacing(path) as temporary:
        write_tar(temporary, examples, kind)
        shard = Shard(path.name, len(examples), temporary.stat().st_size, file_sha256(temporary))
        if not repair and path.exists() and file_sha256(path) != shard.sha256:
            raise ShardError(f"{path} exists with other content, without {INDEX}. Choose another `out`, or delete it.")
    return shard


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path`, safely on disk, when the body succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process at work keeps its own
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- reading the index


def resolve(spec: str | Path) -> tuple[Path, tuple[str, ...] | None]:
    """What `data.shards` means: (folder of index.json, chosen tar names or None for all).

    Args:
        spec: a folder with index.json, or a tar file or brace pattern such as `/data/in-{0000..1023}.tar` beside one.

    Raises:
        ShardError: for urls, an unreadable pattern or a missing index.
    """
    text = str(spec)
    if not text or re.match(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://", text) or "::" in text:
        raise ShardError(f"Shards must be a local folder or tar pattern, got {text!r}. Copy them to a local path.")
    if Path(text).is_dir():
        folder, names = Path(text), None
    else:
        try:
            paths = [Path(p) for p in islice(braceexpand(text), 1_000_001)]
        except ValueError:  # unbalanced braces
            paths = []
        if len({path.parent for path in paths}) != 1 or len(paths) > 1_000_000 or {p.suffix for p in paths} != {".tar"}:
            message = f"{text!r} is neither a folder of shards nor a pattern of tar files in one folder."
            raise ShardError(f"{message} Check the path, or write the folder with `entprune-ds shards`.")
        folder, names = paths[0].parent, tuple(path.name for path in paths)
    if not (folder / INDEX).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
        hint = f"Did you mean {folder / inside[0]}?" if inside else "Write it with `entprune-ds shards`."
        raise ShardError(f"{folder / INDEX} does not exist. {hint}")
    return folder, names


def load_index(spec: str | Path) -> Index:
    """Read and check the index of a folder, or of the shards that a brace pattern chooses.

    Raises:
        ShardError: when the index is missing, damaged or of another version, or lacks a chosen shard.
    """
    folder, names = resolve(spec)
    try:
        values = json.loads((folder / INDEX).read_text())
        index = _parse_index(folder, values)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ShardError(f"{folder / INDEX} cannot be used ({reason}). Delete the folder, write it again.") from error
    if names is None or set(names) == {shard.name for shard in index.shards}:
        return index
    unknown = sorted(set(names) - {shard.name for shard in index.shards})
    if unknown:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ShardError(f"{folder / INDEX} does not list {some}. Correct the pattern {str(spec)!r}.")
    chosen = tuple(shard for shard in index.shards if shard.name in set(names))
    return replace(index, shards=chosen, label_histogram=None)


def _parse_index(folder: Path, values: dict[str, Any]) -> Index:
    kind = values.get("kind", "latents")  # indices of before there were kinds do not say it
    if values["format"] != FORMAT or kind not in KINDS or values["dtype"] != str(KINDS[kind].dtype):
        raise ValueError(f"its format is not `{FORMAT}` with examples of one of the kinds {', '.join(KINDS)}")
    shards = tuple(Shard(**shard) for shard in values["shards"])
    shape, histogram = tuple(values["shape"]), tuple(values["label_histogram"])
    same = {key: values[key] for key in ("num_classes", "shard_size", "description")}
    index = Index(folder=folder, shards=shards, shape=shape, label_histogram=histogram, kind=kind, **same)
    if not shards or index.total != values["total"] or min(shard.count for shard in shards) < 1:
        raise ValueError("its counts do not add up")
    if shape_problem(kind, index.shape) or index.num_classes < 1:
        raise ValueError("its shape or number of classes is impossible")
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names) or any(Path(name).name != name for name in names):
        raise ValueError("its shard names are not different plain file names")
    return index


def check_shards(index: Index, checksums: bool) -> list[str]:
    """All problems of the files of an index: missing, truncated and, with `checksums` (1 GB/s), changed."""
    return [problem for shard in index.shards for problem in shard_problems(index, shard, checksums)]


def shard_problems(index: Index, shard: Shard, checksums: bool) -> list[str]:
    """The problems of one tar file."""
    path = index.folder / shard.name
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return [f"{path} is truncated or changed: {size} bytes, the index says {shard.bytes}. {REMEDY}"]
        if checksums and file_sha256(path) != shard.sha256:
            return [f"{path} is damaged: its SHA-256 is not the one in the index. {REMEDY}"]
    except FileNotFoundError:
        return [f"{path} is missing. {REMEDY}"]
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror}). Check its permissions and the disk."]
    return []
