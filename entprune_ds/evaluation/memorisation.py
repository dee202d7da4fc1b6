"""How near samples come to the training images: copies would lie nearer than unseen images of the same kind do."""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from entprune_ds.evaluation.images import check_images

CHUNK = 1024


def nearest_distances(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Distance of each image to the nearest training image, (N,) f64: root mean square over pixels in [0, 1].

    Args:
        images: uint8 (N,H,W,C).
        training: uint8 (M,H,W,C).

    Raises:
        ValueError: for images of another kind or size.
    """
    check_images(images)
    check_images(training, "training images")
    if images.shape[1:] != training.shape[1:]:
        raise ValueError(f"images are {images.shape[1:]}, the training images {training.shape[1:]} (H,W,C).")
    flat, others = (part.reshape(len(part), -1) / 255.0 for part in (images, training))
    parts = [cdist(flat[i : i + CHUNK], others).min(axis=1) for i in range(0, len(flat), CHUNK)]
    return np.concatenate(parts) / np.sqrt(flat.shape[1])


def memorisation(images: np.ndarray, training: np.ndarray, validation: np.ndarray) -> dict[str, float]:
    """Distances of samples, and of the unseen validation split, to the nearest training image.

    Returns:
        samples, validation: mean distances; ratio: the first over the second, far below 1 for copies; copies: the
        share of samples that lie nearer than all but the nearest 1 % of the validation split (0.01 is as unseen data).
    """
    mine, unseen = nearest_distances(images, training), nearest_distances(validation, training)
    near = float(np.quantile(unseen, 0.01))
    result = {"samples": float(mine.mean()), "validation": float(unseen.mean()), "copies": float((mine < near).mean())}
    return result | {"ratio": result["samples"] / result["validation"]}
