"""Drawing samples: noise and labels by sample index, in batches, as uint8 images.

Every sample has its own noise stream, so neither the batch size nor the number of ranks changes what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from entprune_ds import rng
from entprune_ds.evaluation.images import to_uint8

NoiseAt = Callable[[int], Tensor]
"""noise_at(step) -> fresh standard normal noise (n,C,H,W) f32 for a step of a stochastic sampler."""

SampleFn = Callable[[Tensor, Tensor, NoiseAt], Tensor]


def make_labels(kind: str, num_samples: int, num_classes: int, seed: int) -> Tensor:
    """Class labels (num_samples,) i64; label i depends on (kind, i, num_classes, seed) alone.

    Args:
        kind: "uniform" (independent uniform draws, as in the papers) or "balanced" (0, 1, 2, ... repeated).

    Raises:
        ValueError: unknown kind, or a count below 1.
    """
    if num_samples < 1 or num_classes < 1:
        raise ValueError(f"num_samples and num_classes must be at least 1, got {num_samples} and {num_classes}.")
    if kind == "balanced":
        return torch.arange(num_samples) % num_classes
    if kind == "uniform":
        uniform = rng.uniform_per_slot(seed, "sample_labels", 0, list(range(num_samples)))
        return (uniform.double() * num_classes).floor().long()  # float64: the product stays below num_classes
    raise ValueError(f"labels must be uniform or balanced, got {kind!r}.")


def generate(
    sample_fn: SampleFn,
    labels: Tensor,
    *,
    shape: tuple[int, int, int],
    seed: int,
    batch_size: int,
    slots: Sequence[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Draw one image per label.

    Args:
        sample_fn: as in `drawn_batches`, but its images are in [-1, 1]: a model of latents decodes in there.
        labels, shape, seed, batch_size, slots: as in `drawn_batches`.
        on_batch: called with the number of finished samples after every batch.

    Returns:
        uint8 (N, H', W', C').

    Raises:
        ValueError: as `drawn_batches`, or samples that are not finite.
    """
    images: list[np.ndarray] = []
    for batch in drawn_batches(sample_fn, labels, shape=shape, seed=seed, batch_size=batch_size, slots=slots):
        images.append(to_uint8(batch))  # [-1, 1] -> uint8 NHWC
        if on_batch is not None:
            on_batch(sum(map(len, images)))
    return np.concatenate(images)


def drawn_batches(
    sample_fn: SampleFn,
    labels: Tensor,
    *,
    shape: tuple[int, int, int],
    seed: int,
    batch_size: int,
    slots: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Draw one sample per label, and hand them out as they come, (n,C',H',W').

    The noise is the same to the bit for every batch size and every split over ranks. The samples are too, as far as
    `sample_fn` treats examples independently; matrix kernels may round differently at another batch size.

    Args:
        sample_fn: maps (noise (n,C,H,W) f32, labels (n,) i64, noise_at) to samples (n,C',H',W').
        labels: (N,) i64; noise is put on the same device.
        shape: (C, H, W) of the noise.
        seed: seed of the noise.
        batch_size: samples drawn together.
        slots: index of each label in the whole set; None means 0..N-1. Rank r of R passes labels[r::R] and
            range(r, total, R).

    Raises:
        ValueError: empty or wrong labels, slots of another length, a batch size below 1, or samples of another shape.
    """
    if labels.ndim != 1 or len(labels) == 0 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be a non-empty (N,) int64 tensor, got {tuple(labels.shape)} {labels.dtype}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    slots = range(len(labels)) if slots is None else slots
    if len(slots) != len(labels):
        raise ValueError(f"slots must name one index per label ({len(labels)}), got {len(slots)}.")
    for start in range(0, len(labels), batch_size):
        part = labels[start : start + batch_size]  # (n,)
        mine = list(slots[start : start + batch_size])
        noise = rng.normal_per_slot(seed, "sample", 0, mine, shape).to(part.device)  # (n,C,H,W)
        with torch.no_grad():  # not inference_mode: weights that ZeRO gathers in here serve training again afterwards
            images = sample_fn(noise, part, _noise_at(seed, mine, shape, part.device))
        if images.ndim != 4 or len(images) != len(part):
            raise ValueError(f"sample_fn must return ({len(part)},C,H,W) images, got {tuple(images.shape)}.")
        yield images


def _noise_at(seed: int, slots: list[int], shape: tuple[int, int, int], device: torch.device) -> NoiseAt:
    """Noise of every sampler step for some images, each from its own stream."""
    return lambda step: rng.normal_per_slot(seed, "sample/step", step, slots, shape).to(device)
