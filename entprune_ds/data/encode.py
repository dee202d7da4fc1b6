"""Shards of pixels to shards of VAE moments, by all ranks of all nodes.

Shard i of the result holds the examples of shard i of the input. The unfinished shards are dealt out in turn (on a
first run shard i goes to rank i mod world size), so two ranks never write the same file, and after an interruption the
rest is spread evenly over however many ranks there are then. The ranks meet after every batch: an error of one ends all
of them at once with its message, and none waits for longer than a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entprune_ds import comm
from entprune_ds.data import resumable
from entprune_ds.data.index import Index, check_shards
from entprune_ds.data.latents import Entry, Example
from entprune_ds.data.reader import read_shard

Encode = Callable[[Tensor], Tensor]
"""Images (N,3,H,W) f32 in [-1, 1] -> moments (N,2C,h,w): mean and log-variance, one after the other."""


def encode_shards(
    index: Index, out: Path, encode: Encode, description: dict[str, Any], *, batch_size: int,
    classes: tuple[str, ...] | None = None, watch: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:  # fmt: skip
    """Encode every image and its mirror image. Collective: all ranks call, and see the same folders.

    Batches never span two shards, so the result does not depend on the number of ranks.

    Args:
        index: shards of kind "pixels".
        out: folder to write; finished shards of an earlier start are kept.
        encode: the VAE's encoder.
        description: plain JSON values that determine the result besides the pixels: VAE, revision, precision.
        batch_size: images that are encoded together.
        classes: class names by label, passed on.
        watch: called after every batch with the number of images that are done, over all ranks and starts.

    Returns: the content of index.json, on rank 0; elsewhere the same without it having been read back.

    Raises:
        comm.DistributedError: on all ranks, with what went wrong on any of them.
    """
    everything = {**description, "pixels": index.digest, "image_size": list(index.shape[1:])}
    plan = resumable.Plan(everything, "moments", index.shard_size, index.num_classes, len(index.shards))
    _together(lambda: _start(index, out, plan, encode))
    finished = _finished(out, plan)
    todo = [number for number in range(plan.num_shards) if number not in finished]
    mine = todo[comm.rank() :: comm.world_size()]
    written: list[resumable.Part] = []
    work = _encode_all(index, out, plan, mine, encode, batch_size, written)
    done = sum(index.shards[number].count for number in finished)
    while True:
        images, error = _advance(work)
        reports = comm.all_gather_json([images, error])
        comm.raise_together(error)
        if all(images is None for images, _ in reports):
            break
        done += sum(images or 0 for images, _ in reports)
        watch(done)
    finished |= _gather(written)
    return _together(lambda: _finish(out, plan, finished, classes))


def _start(index: Index, out: Path, plan: resumable.Plan, encode: Encode) -> None:
    if index.kind != "pixels" or index.shape[0] != 3:
        raise ValueError(f"{index.folder} holds {index.kind} of shape {list(index.shape)}, not RGB pixels to encode.")
    height, width = index.shape[1:]
    shape = encode_images(np.zeros((1, *index.shape), np.uint8), encode).shape
    factor = height // max(shape[-2], 1)
    if factor.bit_count() != 1 or (factor * shape[-2], factor * shape[-1]) != (height, width):
        message = f"The VAE cannot halve images of {height}x{width} as often as it must ({index.folder}). "
        raise ValueError(message + "Write them with another data.image_size: 256 or 512 for Stable Diffusion's VAEs.")
    if comm.is_main():
        problems = check_shards(index, checksums=False)
        if problems:
            raise ValueError("\n".join(problems[:10]))
        resumable.start(out, plan)


def _finished(out: Path, plan: resumable.Plan) -> dict[int, resumable.Part]:
    """Shards that need not be written; every rank verifies some, and damage is told. Collective."""
    found = {n: resumable.read_part(out, n) for n in range(comm.rank(), plan.num_shards, comm.world_size())}
    reasons = comm.all_gather_json([[n, why] for n, why in found.items() if isinstance(why, str)])
    if comm.is_main():
        resumable.tell_repaired(out, dict(chain.from_iterable(reasons)))
    return _gather([part for part in found.values() if isinstance(part, resumable.Part)])


def _gather(some: list[resumable.Part]) -> dict[int, resumable.Part]:
    """The parts of all ranks. Collective."""
    lists = comm.all_gather_json([asdict(part) for part in some])
    return {values["number"]: resumable.part_from(values) for values in chain.from_iterable(lists)}


def _finish(
    out: Path, plan: resumable.Plan, finished: dict[int, resumable.Part], classes: tuple[str, ...] | None
) -> Any:
    if comm.is_main():
        return resumable.finish(out, plan, list(finished.values()), max_unreadable=0, classes=classes)
    return plan.wanted()


def _together(function: Callable[[], Any]) -> Any:
    """Call it on every rank; an error of one is raised on all. Collective."""
    result, error = None, None
    try:
        result = function()
    except (ValueError, OSError) as caught:
        error = str(caught)
    comm.raise_together(error)
    return result


def _advance(work: Iterator[int]) -> tuple[int | None, str | None]:
    """(images of the next batch, None at the end; what went wrong)."""
    try:
        return next(work, None), None
    except torch.OutOfMemoryError:
        return None, f"rank {comm.rank()} ran out of GPU memory. Lower `data.encode_batch`."
    except Exception as error:  # whatever it is, the other ranks must not be left waiting
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        return None, f"rank {comm.rank()}: {name}{error}"


def _encode_all(
    index: Index, out: Path, plan: resumable.Plan, numbers: list[int], encode: Encode, batch_size: int,
    written: list[resumable.Part],
) -> Iterator[int]:  # fmt: skip
    """Write some shards; yields the number of images after every batch, and appends to `written` after every shard."""
    for number in numbers:
        entries, examples = read_shard(index, index.shards[number]), []
        while batch := list(islice(entries, batch_size)):
            moments = encode_images(np.stack([pixels for _, pixels, _ in batch]), encode)
            examples += _examples(batch, moments)
            yield len(batch)
        written.append(resumable.write_part(out, plan, number, examples, ()))


def _examples(batch: list[Entry], moments: np.ndarray) -> list[Example]:
    """A batch as it is stored; the origin of an image stays with its pixels, under the same key."""
    return [(key, both, label, {}) for (key, _, label), both in zip(batch, moments, strict=True)]


@torch.no_grad()
def encode_images(pixels: np.ndarray, encode: Encode) -> np.ndarray:
    """Moments of images and of their mirror images.

    Args:
        pixels: (N,3,H,W) uint8.
        encode: the VAE's encoder.

    Returns:
        (N,2,2C,h,w) f32; [:, 0] is the image, [:, 1] the mirror image.
    """
    images = torch.from_numpy(pixels).to(comm.device()).float() / 127.5 - 1
    both = [encode(images), encode(images.flip(3))]
    return torch.stack([moments.float() for moments in both], dim=1).cpu().numpy()
