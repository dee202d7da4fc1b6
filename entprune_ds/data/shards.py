"""Write folders of shards: tar files of examples plus `index.json`, which says what must be there.

The index is written last: a folder with an index is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from entprune_ds.atomic import file_sha256, replacing
from entprune_ds.data.index import FORMAT, INDEX, Index, Shard, check_shards, load_index
from entprune_ds.data.latents import KINDS, REMEDY, Example, ShardError, checked_examples, write_tar
from entprune_ds.logs import get_logger
from entprune_ds.plain_json import parse_json


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
    damage = check_shards(known, checksums=True) if known is not None else []
    if known is not None and not damage:
        return parse_json((out / INDEX).read_text())
    if damage:
        more = f" {len(damage) - 1} more problems like this." if len(damage) > 1 else ""
        get_logger().warning("written again: %s%s", damage[0].removesuffix(REMEDY).strip(), more)
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
        raise other_shards(out, found, wanted)
    return known


SETTING_OF = {
    "shard_size": "data.shard_size", "num_classes": "data.num_classes", "source": "data.source", "seed": "run.seed",
    "val_fraction": "data.val_fraction", "image_size": "data.image_size", "max_pixels": "data.max_pixels",
    "dtype": "data.encode_dtype", "images": "names and labels of the images (digest)", "pixels": "pixels (digest)",
    "vae_revision": "sample.vae_revision",
}  # fmt: skip
"""What a user sets, by its name in the description of shards; other names say what they are."""


def other_shards(out: Path, there: dict[str, Any], wanted: dict[str, Any]) -> ShardError:
    """The error for a folder of other shards: what differs, with both values, and what to do."""
    before, now = (_flat(values) for values in (there, wanted))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    keys = [key for key in keys if key != "num_shards"] or keys  # it follows from the others
    shown = [f"{SETTING_OF.get(key, key)} was {_shown(before.get(key))}, is {_shown(now.get(key))}" for key in keys]
    message = f"{out} already holds other shards: {'; '.join(shown)}."
    return ShardError(f"{message} Give what it was written with, choose another `out`, or delete that folder first.")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in values.items() if key != "description"}
    return {**values.get("description", {}), **rest}


def _shown(value: Any) -> str:
    """A value in a message; of a digest its beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    start = re.match(r"(sha256:)?[0-9a-f]{12}(?=[0-9a-f]{52}$)", text)
    return f"{start[0]}..." if start else text


def write_shard(path: Path, examples: list[Example], kind: str, repair: bool) -> Shard:
    """Write one tar in place of `path`; without `repair`, a file of other content is refused (ShardError)."""
    with replacing(path) as temporary:
        write_tar(temporary, examples, kind)
        shard = Shard(path.name, len(examples), temporary.stat().st_size, file_sha256(temporary))
        if not repair and path.exists() and file_sha256(path) != shard.sha256:
            raise ShardError(f"{path} exists with other content, without {INDEX}. Choose another `out`, or delete it.")
    return shard
