"""Labelled images to shards of square uint8 pixels, by parallel workers; the same bytes with any number of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from entprune_ds import rng
from entprune_ds.data import resumable
from entprune_ds.data.image_csv import csv_source
from entprune_ds.data.image_sources import (
    Item,
    Source,
    SourceError,
    folder_source,
    read_bytes,
    split_folders,
)
from entprune_ds.data.image_tars import tar_paths, tar_source
from entprune_ds.data.images import load_image
from entprune_ds.data.latents import Example
from entprune_ds.data.spawn import Workers

MAX_BYTES_PER_PIXEL = 8
"""A file with more bytes than this for every pixel allowed (four channels of 16 bits) is no image to decode."""


@dataclass(frozen=True)
class Job:
    """The settings of one `entprune-ds shards` command."""

    kind: str
    """folder, csv or webdataset."""
    src: str
    out: Path
    image_size: int
    max_pixels: int
    shard_size: int
    num_classes: int | None
    val_fraction: float
    max_unreadable: float
    seed: int


@dataclass(frozen=True)
class Split:
    """The images of OUT/train or OUT/val, in the order of the shards."""

    source: Source
    numbers: tuple[int, ...]
    """Positions in source.items."""


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    out: Path
    plan: resumable.Plan
    number: int
    root: Path
    items: tuple[tuple[str, Item], ...]
    """(key of the example, image)."""
    image_size: int
    max_pixels: int


def open_splits(job: Job, workers: Workers) -> dict[str, Split]:
    """List the images of every split.

    SRC with exactly the sub-folders train and val gives both. Otherwise everything is for training, apart from the
    share data.val_fraction that run.seed draws. Images of folders and CSV files are shuffled, so that a shard holds
    many classes.

    Raises:
        SourceError: when the source cannot be used.
        OSError: when it cannot be read.
    """
    path = Path(job.src)
    if job.kind == "csv":
        return _divide(csv_source(path, job.num_classes), job)
    folders = split_folders(path) if path.is_dir() else {"train": path}
    if job.val_fraction and "val" in folders:
        raise SourceError(f"{path} has a folder val already. Leave `data.val_fraction` at 0, or name {path}/train.")
    sources: dict[str, Source] = {}
    for name, folder in folders.items():
        if job.kind == "folder":
            sources[name] = folder_source(folder, sources["train"].classes if "train" in sources else None)
        else:
            known = sources["train"].num_classes if "train" in sources else job.num_classes
            sources[name] = tar_source(tar_paths(str(folder)), known, workers.run)
    if "val" not in sources:
        return _divide(sources["train"], job)
    return {name: _order(source, list(range(len(source.items))), name, job) for name, source in sources.items()}


def _divide(source: Source, job: Job) -> dict[str, Split]:
    total = len(source.items)
    order = rng.permutation(job.seed, "validation split", 0, 0, total)
    chosen = set(order[: round(total * job.val_fraction)])
    train = [number for number in range(total) if number not in chosen]
    splits = {"train": _order(source, train, "train", job)}
    if chosen:
        listed_once = replace(source, unusable=(), ignored=())
        splits["val"] = _order(listed_once, sorted(chosen), "val", job)
    return splits


def _order(source: Source, numbers: list[int], name: str, job: Job) -> Split:
    if job.kind != "webdataset":
        order = rng.permutation(job.seed, f"shard order/{name}", 0, 0, len(numbers))
        numbers = [numbers[i] for i in order]
    return Split(source, tuple(numbers))


def make_plan(job: Job, split: Split, name: str) -> resumable.Plan:
    """What OUT/NAME is to become."""
    description: dict[str, Any] = {
        "source": job.kind, "split": name, "seed": job.seed, "val_fraction": job.val_fraction,
        "images": split.source.digest, "image_size": job.image_size, "max_pixels": job.max_pixels, "crop": "ADM center",
    }  # fmt: skip
    classes = max(split.source.num_classes, job.num_classes or 0)
    num_shards = -(-len(split.numbers) // job.shard_size)
    return resumable.Plan(description, "pixels", job.shard_size, classes, num_shards)


def write_split(
    job: Job, split: Split, name: str, workers: Workers, watch: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write OUT/NAME; finished shards of an earlier start are kept.

    Args:
        job: the settings.
        split: the images.
        name: train or val.
        workers: the processes that write.
        watch: called with the examples that are done and the number skipped so far.

    Returns: the content of index.json.

    Raises:
        TooManySkipped: after all shards are written, when too many images were unreadable.
        ShardError: when the folder holds something else.
        OSError: when the disk is full or not writable.
    """
    out, plan = job.out / name, make_plan(job, split, name)
    resumable.start(out, plan)
    tasks = [_task(job, split, out, plan, number) for number in range(plan.num_shards)]
    done: list[resumable.Part] = []
    reasons: dict[int, str] = {}
    images = skips = 0
    for part, reasons[part.number] in workers.run(write_task, tasks):
        done.append(part)
        images += sum(part.labels.values()) + len(part.skipped)
        skips += len(part.skipped)
        watch(images, skips)
    resumable.tell_repaired(out, reasons)
    source = split.source
    return resumable.finish(
        out, plan, done, max_unreadable=job.max_unreadable, classes=source.classes, unusable=source.unusable,
        ignored=source.ignored,
    )  # fmt: skip


def _task(job: Job, split: Split, out: Path, plan: resumable.Plan, number: int) -> Task:
    chosen = split.numbers[number * job.shard_size : (number + 1) * job.shard_size]
    items = tuple((f"{position:08d}", split.source.items[position]) for position in chosen)
    return Task(out, plan, number, split.source.root, items, job.image_size, job.max_pixels)


def write_task(task: Task) -> tuple[resumable.Part, str]:
    """Write one shard, without the images that cannot be used, unless it is finished; runs in a worker process.

    Returns: the part, and why a finished shard was written again; empty when it was not.
    """
    part = resumable.read_part(task.out, task.number)
    if isinstance(part, resumable.Part):
        readable = _readable_now(task, part)
        if not readable:
            return part, ""
        part = f"{readable} can be read now"
    examples: list[Example] = []
    skipped: list[tuple[str, str]] = []
    for key, item in task.items:
        pixels = _read(task, item)
        if isinstance(pixels, str):
            skipped.append((item.name, pixels))
        else:
            examples.append((key, pixels, item.label, {"source": item.name}))
    return resumable.write_part(task.out, task.plan, task.number, examples, tuple(skipped)), part


def _readable_now(task: Task, part: resumable.Part) -> str:
    """The first image that was skipped and can be read now; empty when there is none."""
    skipped = {name for name, _ in part.skipped}
    names = (item.name for _, item in task.items if item.name in skipped and not isinstance(_read(task, item), str))
    return next(names, "")


def _read(task: Task, item: Item) -> np.ndarray | str:
    """The pixels (3,H,W) uint8 of an image, or the reason why it cannot be used."""
    try:
        data = read_bytes(task.root, item, MAX_BYTES_PER_PIXEL * task.max_pixels)
        return load_image(data, item.name, task.image_size, task.max_pixels)
    except FileNotFoundError:
        return "the file is missing"
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error).removeprefix(f"{item.name}: ")
