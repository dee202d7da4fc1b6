"""Data sets that need no download: scikit-learn's handwritten digits, 1797 images of 8x8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entprune_ds import rng
from entprune_ds.data.latents import Example
from entprune_ds.data.shards import write_shards

NUM_IMAGES = 1797
NUM_VALIDATION = 297
"""Validation images; the other 1500 are for training."""
NUM_CLASSES = 10


def write_digits(
    out: Path, shard_size: int, seed: int, watch: Callable[[int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """Write OUT/train (1500 images) and OUT/val (297), each class in the same proportion.

    Args:
        out: folder of the two folders.
        shard_size: examples per tar.
        seed: decides which images are for validation.
        watch: called with the number of images read so far, over both folders.

    Returns:
        The index of "train" and of "val".
    """
    images, labels = load_digits()
    indices, before = {}, 0
    for split, chosen in split_digits(labels, seed).items():
        examples = _examples(images, labels, chosen, before, watch)
        description = {"source": "digits", "split": split, "seed": seed, "scaling": "pixel / 8 - 1"}
        indices[split] = write_shards(examples, out / split, shard_size, description, num_classes=NUM_CLASSES)
        before += len(chosen)
    return indices


def _examples(
    images: np.ndarray, labels: np.ndarray, chosen: list[int], before: int, watch: Callable[[int], None] | None
) -> Iterator[Example]:
    for done, position in enumerate(chosen, before + 1):
        if watch is not None:
            watch(done)
        meta = {"source": "digits", "position": position}
        yield f"digit-{position:04d}", images[position], int(labels[position]), meta


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The images (1797,1,8,8) f32 in [-1, 1] (0..16 on disk) and their labels (1797,) i64.

    Raises:
        ValueError: when scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # only this function needs it
    except ImportError as error:
        message = "The digits come with scikit-learn, which is missing. Install it: pip install 'entprune_ds[demo]'"
        raise ValueError(message) from error
    digits = datasets.load_digits()
    images = (digits.images / 8 - 1).astype(np.float32)[:, None]
    return images, digits.target.astype(np.int64)


def split_digits(labels: np.ndarray, seed: int) -> dict[str, list[int]]:
    """Positions of the "train" and of the "val" images, ascending; stratified by class.

    Every class gives its share of the validation images, rounded down; the classes with the largest remainders give
    one more, so that the sum is exact.
    """
    counts = np.bincount(labels, minlength=NUM_CLASSES)
    shares = counts * NUM_VALIDATION / len(labels)
    quota = np.floor(shares).astype(int)
    largest = np.argsort(quota - shares, kind="stable")[: NUM_VALIDATION - quota.sum()]
    quota[largest] += 1
    val: list[int] = []
    for label in range(NUM_CLASSES):
        members = np.flatnonzero(labels == label)
        order = rng.permutation(seed, "digits split", 0, label, len(members))
        val += members[order[: quota[label]]].tolist()
    chosen = set(val)
    return {"train": [i for i in range(len(labels)) if i not in chosen], "val": sorted(val)}
