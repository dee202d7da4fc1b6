"""FID, KID and class accuracy of samples that lie in memory; KID by clean-fid's own function.

clean-fid downloads Inception and reference statistics only in functions that are not used here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from cleanfid.fid import kernel_distance

from entprune_ds.evaluation.frechet import frechet_distance
from entprune_ds.evaluation.images import check_images
from entprune_ds.evaluation.statistics import moments_of

KID_SEED = 0


class ImageFeatures(Protocol):
    """What the figures need of an extractor."""

    @property
    def kid_scale(self) -> float:
        """Factor of the features before the kernel of KID, which is not scale-free; 1 for Inception."""

    def features(self, images: np.ndarray) -> np.ndarray:
        """(N,D) f64 of uint8 images (N,H,W,C)."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        """(N,K) class logits of uint8 images (N,H,W,C)."""


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two feature sets (N,D) and (M,D) f64, with the sample mean and the unbiased covariance.

    Raises:
        ValueError: fewer than D + 1 examples in a set, other shapes, or values that are not finite.
    """
    _check_features(features, reference)
    return frechet_distance(moments_of(features), moments_of(reference))


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """`kernel_distance_of` sets that are large enough.

    Raises:
        ValueError: as `fid`.
    """
    _check_features(features, reference)
    return kernel_distance_of(features, reference)


def kernel_distance_of(features: np.ndarray, reference: np.ndarray, seed: int = KID_SEED) -> float:
    """Kernel distance (Binkowski et al. 2018): unbiased MMD^2 with kernel (x.y / D + 1)^3, mean over 100 subsets.

    Unbiased means that it can be slightly negative. clean-fid draws the subsets from numpy's global generator; it is
    seeded inside, so the figure is reproducible, and restored after.
    """
    with _numpy_seed(seed):
        return kernel_distance(reference, features)


def class_accuracy(extractor: ImageFeatures, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images (N,H,W,C) uint8 that the extractor puts into the class (N,) they were drawn for.

    Raises:
        ValueError: labels of another number or kind, or outside the extractor's classes.
    """
    check_images(images)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be {len(images)} integers, got {labels.dtype} {tuple(labels.shape)}.")
    logits = extractor.logits(images)
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        got = f"{labels.min()}..{labels.max()}"
        raise ValueError(f"labels must lie in 0..{logits.shape[1] - 1}, the extractor's classes, got {got}.")
    return float((logits.argmax(axis=1) == labels).mean())


def evaluate_samples(
    images: np.ndarray, labels: np.ndarray, references: dict[str, np.ndarray], extractor: ImageFeatures
) -> dict[str, float]:
    """All figures of one set of samples.

    Args:
        images: uint8 (N,H,W,C), with the classes (N,) they were drawn for.
        references: named real images uint8 (M,H,W,C): "whole", and any other, e.g. "validation".
        extractor: gives features and logits.

    Returns:
        fid, kid (against "whole"), fid_NAME, kid_NAME for each other reference, class_accuracy, num_samples.

    Raises:
        ValueError: no "whole", shapes that differ, or too few images for the number of features.
    """
    check_images(images, "samples")
    if "whole" not in references:
        raise ValueError(f"references must contain `whole`, got {sorted(references) or 'none'}.")
    for name, reference in references.items():
        check_images(reference, f"reference `{name}`")
        if reference.shape[1:] != images.shape[1:]:
            shapes = f"{reference.shape[1:]}, the samples {images.shape[1:]}"
            raise ValueError(f"images of reference `{name}` are {shapes} (H,W,C). They must be of one size.")
    result: dict[str, float] = {}
    features = extractor.features(images)
    for name, reference in references.items():
        real, suffix = extractor.features(reference), "" if name == "whole" else f"_{name}"
        result[f"fid{suffix}"] = fid(features, real)
        result[f"kid{suffix}"] = kid(features * extractor.kid_scale, real * extractor.kid_scale)
    return result | {"class_accuracy": class_accuracy(extractor, images, labels), "num_samples": len(images)}


def _check_features(features: np.ndarray, reference: np.ndarray) -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features must be (N,D) and (M,D), got {features.shape} and {reference.shape}.")
    least = features.shape[1] + 1  # below it the covariance has no full rank
    for name, values in (("samples", features), ("reference images", reference)):
        if len(values) < least:
            remedy = "Raise sample.num_samples." if name == "samples" else "Use a larger reference."
            raise ValueError(f"{least} {name} or more are needed for {least - 1} features, got {len(values)}. {remedy}")
        if not np.isfinite(values).all():
            raise ValueError(f"features of the {name} contain NaN or infinite values.")


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator inside, and restore its state after."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
