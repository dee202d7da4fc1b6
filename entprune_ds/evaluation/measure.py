"""One pass of an extractor over images, split over the ranks: moments, and what must be kept of every image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from entprune_ds import comm
from entprune_ds.evaluation.extractor import Extracted, ImageExtractor
from entprune_ds.evaluation.sources import ImageSource
from entprune_ds.evaluation.statistics import Moments, RunningMoments

ROWS = 4096  # rows that the ranks exchange at once


@dataclass(frozen=True)
class Measured:
    """What was seen of a set of images."""

    shape: tuple[int, ...]
    """(N,H,W,C)."""
    digest: str
    """Of the pixels, whatever file they lay in, in whatever order, and however many ranks read it."""
    moments: Moments
    spatial: Moments | None
    """Of the spatial features, where the extractor has them."""
    features: np.ndarray
    """(N,D) in the order of the images; on rank 0, empty elsewhere."""
    logits: np.ndarray | None
    """(N,K), likewise."""
    labels: np.ndarray | None


def measure(
    source: ImageSource, extractor: ImageExtractor, batch_size: int, on_batch: Callable[[int], None] = lambda done: None
) -> Measured:
    """Look at all images of a source once. Collective: every rank takes its part.

    Args:
        batch_size: images that the extractor sees together.
        on_batch: called with the number of images that this rank has done.

    Raises:
        comm.DistributedError: on all ranks, when one cannot read its images or the extractor fails on them.
    """
    moments, spatial, total = RunningMoments(), RunningMoments(), 0
    features: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    error, done = None, 0
    try:
        for images in source.batches(comm.rank(), comm.world_size(), batch_size):
            found = extractor.extract(images)
            check_extracted(extractor.name, found, len(images))
            moments.add(found.features)
            if found.spatial is not None:
                spatial.add(found.spatial)
            features.append(found.features)
            if found.logits is not None:
                logits.append(found.logits)
            total = (total + sum(_digest(image) for image in images)) % 2**256
            done += len(images)
            on_batch(done)
            comm.mark_progress()
    except (ValueError, OSError) as problem:
        error = f"{source.name}: {problem}"
    comm.raise_together(error)
    digests = comm.all_gather_json(f"{total:x}")
    whole = sum(int(text, 16) for text in digests) % 2**256
    has_spatial, has_logits = (any(comm.all_gather_json(bool(x))) for x in (spatial.count, logits))
    return Measured(
        source.shape, f"{whole:064x}"[:16], moments.reduce(), spatial.reduce() if has_spatial else None,
        gather_rows(features), gather_rows(logits) if has_logits else None, source.labels,
    )  # fmt: skip


def gather_rows(parts: list[np.ndarray]) -> np.ndarray:
    """The rows of all ranks, in rank order, on rank 0; on the others (0,) only. Collective.

    They travel in pieces, so that no rank but 0 holds more than its own.
    """
    mine = np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
    if comm.world_size() == 1:
        return mine
    known = comm.all_gather_json([*mine.shape, str(mine.dtype)])
    count, width = max(rows for rows, _, _ in known), max(columns for _, columns, _ in known)
    kind = next(dtype for rows, _, dtype in known if rows)
    kept: list[list[np.ndarray]] = [[] for _ in known]
    for start in range(0, count, ROWS):
        piece = np.zeros((min(ROWS, count - start), width), kind)
        part = mine[start : start + len(piece)]
        piece[: len(part), : part.shape[1]] = part
        gathered = comm.all_gather(torch.from_numpy(piece).to(comm.device()))
        if comm.is_main():
            for rank, (rows, _, _) in enumerate(known):
                kept[rank].append(gathered[rank][: max(0, min(len(piece), rows - start))].cpu().numpy())
    return np.concatenate([part for parts in kept for part in parts]) if comm.is_main() else np.empty(0, kind)


def check_extracted(name: str, found: Extracted, count: int) -> None:
    """Raise ValueError unless an extractor gave finite rows for so many images."""
    if not isinstance(found, Extracted):
        raise ValueError(f"{name} must give Extracted(...), got {type(found).__name__}.")
    for part, rows in (("features", found.features), ("spatial", found.spatial), ("logits", found.logits)):
        if rows is None and part != "features":
            continue
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or len(rows) != count:
            got = rows.shape if isinstance(rows, np.ndarray) else type(rows).__name__
            raise ValueError(f"{name} must give {part} as an array ({count},D), got {got}.")
        if not np.isfinite(rows).all():
            raise ValueError(f"{name} gives {part} that are NaN or infinite.")


def _digest(image: np.ndarray) -> int:
    """A number for the pixels of an image; sums of them name a set, in whatever order it was read."""
    return int.from_bytes(hashlib.sha256(np.ascontiguousarray(image).data).digest(), "big")
