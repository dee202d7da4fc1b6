"""Shards that many workers or ranks write, and that a restart completes: one small file per finished shard.

    OUT/plan.json            what is being written; another plan is refused
    OUT/shard-000012.tar     appears whole, by a rename
    OUT/parts/000012.json    afterwards: its size, checksum, labels and what was skipped
    OUT/index.json           last, when all parts are there

A shard counts as finished when its part is there and its checksum agrees. The parts stay, so that the same command
repairs a damaged shard without writing the others again.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entprune_ds.atomic import replacing
from entprune_ds.data.index import INDEX, Index, Shard, shard_problems
from entprune_ds.data.latents import Example, ShardError, checked_examples
from entprune_ds.data.shards import other_shards, write_index, write_shard
from entprune_ds.logs import get_logger
from entprune_ds.plain_json import parse_json

PLAN = "plan.json"
SKIPPED = "skipped.csv"
CLASSES = "classes.json"
Skips = tuple[tuple[str, str], ...]
"""(name, reason) of what was left out."""


@dataclass(frozen=True)
class Plan:
    """What a folder of shards is to become."""

    description: dict[str, Any]
    """Plain JSON values that determine the examples."""
    kind: str
    shard_size: int
    num_classes: int
    num_shards: int

    def wanted(self) -> dict[str, Any]:
        """What the index says of it."""
        wanted = {"description": self.description, "shard_size": self.shard_size, "num_classes": self.num_classes}
        return {**wanted, "kind": self.kind}


@dataclass(frozen=True)
class Part:
    """One finished shard."""

    number: int
    shard: Shard | None
    """None when every example of it had to be skipped."""
    shape: tuple[int, ...]
    labels: dict[int, int]
    """{label: examples}."""
    skipped: Skips


class TooManySkipped(ValueError):
    """More examples had to be skipped than `data.max_unreadable` allows."""


def shard_path(out: Path, number: int) -> Path:
    """The tar of a shard."""
    return out / f"shard-{number:06d}.tar"


def part_path(out: Path, number: int) -> Path:
    """The small file that says a shard is finished."""
    return out / "parts" / f"{number:06d}.json"


def start(out: Path, plan: Plan) -> None:
    """Make the folder, or accept it when it is of the same plan; remove what killed writers left behind.

    One process of a job calls this, before any of them writes.

    Raises:
        ShardError: when the folder holds other shards.
    """
    path, text = out / PLAN, json.dumps(asdict(plan), indent=1) + "\n"
    try:
        there = parse_json(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ShardError(f"{path} is damaged ({error}). Delete the folder, and start again.") from error
    if there is None and out.is_dir() and (any(out.glob("shard-*.tar")) or (out / INDEX).exists()):
        raise ShardError(f"{out} already holds other shards, without {PLAN}. Choose another `out`, or delete it.")
    if there is not None and there != json.loads(text):
        raise other_shards(out, there, json.loads(text))
    (out / "parts").mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob(".*.tmp"), *(out / "parts").glob(".*.tmp")):
        stale.unlink(missing_ok=True)
    if there is None:
        with replacing(path) as temporary:
            temporary.write_text(text)


def read_part(out: Path, number: int) -> Part | str:
    """The part of a finished and undamaged shard (its checksum is compared), or why the shard must be written.

    The reason is empty for a shard that was never finished.
    """
    path = part_path(out, number)
    try:
        part = part_from(parse_json(path.read_text()))
    except FileNotFoundError:
        return f"parts/{path.name} is missing" if (out / INDEX).is_file() else ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"parts/{path.name} is damaged"
    if part.shard is not None:
        index = Index(folder=out, shards=(part.shard,), shape=part.shape, num_classes=0, shard_size=0,
                      label_histogram=None, description={})  # fmt: skip
        if shard_problems(index, part.shard, checksums=True):
            return "was damaged" if shard_path(out, number).exists() else "was missing"
    return part


def tell_repaired(out: Path, reasons: dict[int, str]) -> None:
    """Say in one line which finished shards are written again, and why.

    Args:
        out: the folder.
        reasons: by shard; empty for one that was never finished, which is no repair.
    """
    names = [f"{shard_path(out, number).name} ({why})" for number, why in sorted(reasons.items()) if why]
    if names:
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        get_logger().warning("written again in %s: %s%s", out, ", ".join(names[:10]), more)


def part_from(values: dict[str, Any]) -> Part:
    """A part from its plain JSON values."""
    shard = Shard(**values["shard"]) if values["shard"] else None
    labels = {int(label): count for label, count in values["labels"].items()}
    skipped = tuple((name, reason) for name, reason in values["skipped"])
    return Part(values["number"], shard, tuple(values["shape"]), labels, skipped)


def write_part(out: Path, plan: Plan, number: int, examples: list[Example], skipped: Skips) -> Part:
    """Write one shard and then its part; the same examples give the same bytes.

    Raises:
        ValueError: for a bad example.
        OSError: when the disk is full or not writable.
    """
    histogram = [0] * plan.num_classes
    shard, shape = None, ()
    if examples:
        checked = list(checked_examples(examples, histogram))
        shard, shape = write_shard(shard_path(out, number), checked, plan.kind, repair=True), checked[0][1].shape
    labels = {label: count for label, count in enumerate(histogram) if count}
    part = Part(number, shard, tuple(shape), labels, skipped)
    with replacing(part_path(out, number)) as temporary:
        temporary.write_text(json.dumps(asdict(part)) + "\n")
    return part


def finish(
    out: Path, plan: Plan, parts: list[Part], *, max_unreadable: float, classes: tuple[str, ...] | None = None,
    unusable: Skips = (), ignored: Skips = (),
) -> dict[str, Any]:  # fmt: skip
    """Write skipped.csv, classes.json (where there are names) and, last, index.json.

    Args:
        out: folder of the shards.
        plan: what was to be written.
        parts: all of them.
        max_unreadable: largest share of the examples that may be missing.
        classes: class names by label.
        unusable: skipped before any shard was written.
        ignored: files that are no examples; listed, but not counted.

    Returns: the content of index.json.

    Raises:
        TooManySkipped: when more were skipped; the list is there, the index is not.
        ValueError: when nothing is left, or shards differ in shape.
    """
    parts = sorted(parts, key=lambda part: part.number)
    skipped = (*unusable, *(skip for part in parts for skip in part.skipped))
    _write_list(out / SKIPPED, skipped, ignored)
    shards = [asdict(part.shard) for part in parts if part.shard is not None]
    labels = sum((Counter(part.labels) for part in parts), Counter())
    total = labels.total()
    if len(skipped) > max_unreadable * (total + len(skipped)):
        (out / INDEX).unlink(missing_ok=True)
        lines = [f"  {name}: {reason}" for name, reason in skipped[:10]]
        head = f"{len(skipped)} of {total + len(skipped)} examples had to be skipped, `data.max_unreadable` allows "
        tail = f"{max_unreadable:g} of them. All are listed in {out / SKIPPED}. Repair the data, or raise the limit:"
        raise TooManySkipped("\n".join([head + tail, *lines]))
    if not shards:
        raise ValueError(f"There is nothing to write to {out}.")
    shapes = {part.shape for part in parts if part.shard is not None}
    if len(shapes) != 1:
        raise ValueError(f"The shards of {out} differ in shape: {sorted(shapes)}. Delete the folder and start again.")
    if classes is not None:
        with replacing(out / CLASSES) as temporary:
            temporary.write_text(json.dumps(list(classes), indent=1) + "\n")
    histogram = [labels[label] for label in range(plan.num_classes)]
    facts = {"skipped": len(skipped), "ignored": len(ignored)}
    return write_index(out, plan.wanted(), list(shapes.pop()), histogram, shards, facts)


def _write_list(path: Path, skipped: Skips, ignored: Skips) -> None:
    """skipped.csv with the columns what (skipped or ignored), path, reason; only when there is something to list."""
    path.unlink(missing_ok=True)
    rows = [("skipped", *skip) for skip in skipped] + [("ignored", *skip) for skip in ignored]
    if rows:
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            csv.writer(file).writerows([("what", "path", "reason"), *rows])
