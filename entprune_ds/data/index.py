"""The index of a folder of shards: counts, sizes and checksums of its tars, so that damage is known before training.

The folder may also lie on an http(s) server; its tars are then checked when they are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from braceexpand import braceexpand

from entprune_ds import config
from entprune_ds.atomic import file_sha256
from entprune_ds.data.latents import KINDS, REMEDY, ShardError, latent_shape, shape_problem
from entprune_ds.data.pipe import PipeFile
from entprune_ds.data.places import Pipe, Place, Url, from_text, is_url, parse_pipe, parse_url, to_text
from entprune_ds.data.web import WebFile
from entprune_ds.plain_json import parse_json
from entprune_ds.redact import is_redacted, redacted

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

    folder: Place
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


def resolve(spec: str | Path, allow_pipe: bool = False) -> tuple[Place, tuple[str, ...] | None]:
    """What `data.shards` means: (folder of index.json, chosen tar names or None for all).

    Args:
        spec: a folder with index.json, or a tar file or brace pattern such as `/data/in-{0000..1023}.tar` beside one;
            or the http(s) URL of either; or `pipe:` and a shell command that holds such a pattern.
        allow_pipe: whether shell commands may run.

    Raises:
        ShardError: for other urls, an address without its secret, an unreadable pattern or a missing local index.
    """
    text = str(spec)
    shown = redacted(text)
    if is_redacted(text):
        message = (
            f"{text!r} has lost its secret, which no run folder keeps. Give data.shards (and data.val_shards) again"
        )
        raise ShardError(f"{message} on the command line, with it.")
    if is_url(text):
        return _resolve_remote(text, parse_url)
    if text.startswith("pipe:"):
        if allow_pipe:
            return _resolve_remote(text, parse_pipe)
        message = f"Shards must be a local folder or tar pattern, or http(s) URLs of them, got {shown!r}, which runs a"
        message += " shell. Copy them to a local path, or write data.allow_pipe=true on the command line"
        raise ShardError(f"{message} (in a preset it does not count).")
    if not text or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) or "::" in text:
        message = f"Shards must be a local folder or tar pattern, or http(s) URLs of them, got {shown!r}."
        raise ShardError(f"{message} Copy them to a local path.")
    if Path(text).is_dir():
        folder, names = Path(text), None
    else:
        paths = [Path(p) for p in _expand(text)]
        if len({path.parent for path in paths}) != 1 or {p.suffix for p in paths} != {".tar"}:
            message = f"{shown!r} is neither a folder of shards nor a pattern of tar files in one folder."
            raise ShardError(f"{message} Check the path, or write the folder with `entprune-ds shards`.")
        folder, names = paths[0].parent, tuple(path.name for path in paths)
    if not (folder / INDEX).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{INDEX}"))
        hint = f"Did you mean {folder / inside[0]}?" if inside else "Write it with `entprune-ds shards`."
        raise ShardError(f"{folder / INDEX} does not exist. {hint}")
    return folder, names


def _expand(pattern: str) -> list[str]:
    """The texts that a brace pattern stands for; none when it is unbalanced or stands for more than a million."""
    try:
        found = list(islice(braceexpand(pattern), 1_000_001))
    except ValueError:
        return []
    return found if len(found) <= 1_000_000 else []


def _resolve_remote(
    text: str, parse: Callable[[str], Url] | Callable[[str], Pipe]
) -> tuple[Url | Pipe, tuple[str, ...] | None]:
    try:
        places = [parse(one) for one in _expand(text)]
    except ValueError as error:
        raise ShardError(f"{redacted(text)!r} does not name shards: {error}. Correct it.") from error
    if len(places) == 1 and not places[0].name.endswith(".tar"):
        return places[0], None
    if len({place.parent for place in places}) != 1 or not all(place.name.endswith(".tar") for place in places):
        message = f"{redacted(text)!r} names neither a folder of shards nor, by a pattern, tar files in one folder."
        raise ShardError(f"{message} Correct it.")
    return places[0].parent, tuple(unquote(p.name) if isinstance(p, Url) else p.name for p in places)


def load_index(spec: str | Path, allow_pipe: bool = False) -> Index:
    """Read and check the index of a folder, or of the shards that a brace pattern chooses.

    Raises:
        ShardError: when the index is missing, damaged or of another version, or lacks a chosen shard.
    """
    folder, names = resolve(spec, allow_pipe)
    try:
        index = _parse_index(folder, parse_json(_read_small(folder / INDEX)))
    except ShardError:  # what WebFile and PipeFile say is clear
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ShardError(f"{folder / INDEX} cannot be used ({reason}). Delete the folder, write it again.") from error
    if names is None or set(names) == {shard.name for shard in index.shards}:
        return index
    unknown = sorted(set(names) - {shard.name for shard in index.shards})
    if unknown:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ShardError(f"{folder / INDEX} does not list {some}. Correct the pattern {redacted(str(spec))!r}.")
    chosen = tuple(shard for shard in index.shards if shard.name in set(names))
    return replace(index, shards=chosen, label_histogram=None)


def _read_small(place: Place) -> bytes:
    if isinstance(place, Path):
        return place.read_bytes()
    file = WebFile(place) if isinstance(place, Url) else PipeFile(place)
    try:
        return file.read_all()
    finally:
        file.close()


def to_json(index: Index) -> dict[str, Any]:
    """An index as plain values, for another process; `from_json` reads them."""
    return {**asdict(replace(index, folder=Path())), "folder": to_text(index.folder)}


def from_json(values: dict[str, Any]) -> Index:
    """The index that `to_json` made plain."""
    histogram = values["label_histogram"]
    changed = {
        "folder": from_text(values["folder"]),
        "shards": tuple(Shard(**shard) for shard in values["shards"]),
        "shape": tuple(values["shape"]),
        "label_histogram": None if histogram is None else tuple(histogram),
    }
    return Index(**{**values, **changed})


def _parse_index(folder: Place, values: dict[str, Any]) -> Index:
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
    """All problems of the files of an index: missing, truncated and, with `checksums` (1 GB/s), changed.

    Remote files are not asked for here: reading one checks its size at the first byte and its checksum at the last.
    """
    return [problem for shard in index.shards for problem in shard_problems(index, shard, checksums)]


def shard_problems(index: Index, shard: Shard, checksums: bool) -> list[str]:
    """The problems of one tar file; none for a remote one."""
    path = index.folder / shard.name
    if not isinstance(path, Path):
        return []
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
