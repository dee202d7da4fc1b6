"""All figures of measured samples against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from entprune_ds.evaluation.extractor import Extracted, ImageExtractor
from entprune_ds.evaluation.fid import kernel_distance_of
from entprune_ds.evaluation.frechet import frechet_distance
from entprune_ds.evaluation.measure import Measured
from entprune_ds.evaluation.references import Reference
from entprune_ds.evaluation.scores import inception_score, precision_recall


def lacking(
    probe: Extracted, count: int, reference_rows: int, spatial_width: int | None, neighbours: int, extractor: str
) -> dict[str, str]:
    """Which figures cannot be computed, and why; known before any image is drawn.

    Args:
        probe: what the extractor says of one image.
        count: samples.
        reference_rows: features of reference images that will be at hand, 0 where the reference holds none.
        spatial_width: of the reference's spatial statistics, where it has them.
        neighbours: of precision and recall.
    """
    found, width = {}, probe.features.shape[1]
    if count <= width:
        found["fid"] = f"{width + 1} samples or more are needed for {width} features, got {count}"
    if not reference_rows:
        found["kid"] = found["precision_recall"] = "the reference holds neither features nor images"
    for name, least, why in (("kid", 2, ""), ("precision_recall", neighbours + 1, f" for {neighbours} neighbours")):
        if reference_rows and min(count, reference_rows) < least:
            got = f"got {count} and {reference_rows}"
            found[name] = f"{least} samples and reference images or more are needed{why}, {got}"
    if probe.spatial is None:
        found["sfid"] = f"{extractor} gives no spatial features"
    elif spatial_width != probe.spatial.shape[1]:
        found["sfid"] = f"the reference has spatial statistics of width {spatial_width}, not {probe.spatial.shape[1]}"
    elif count <= probe.spatial.shape[1]:
        found["sfid"] = f"{probe.spatial.shape[1] + 1} samples or more are needed, got {count}"
    if probe.logits is None:
        found["is"] = f"{extractor} gives no class logits"
    return found


def figures(
    measured: Measured,
    references: dict[str, Reference],
    extractor: ImageExtractor,
    metrics: Sequence[str],
    neighbours: int = 3,
    kid_seed: int = 0,
) -> dict[str, Any]:
    """The wanted figures. On rank 0.

    Args:
        references: "whole", for all figures; others, for fid_NAME and kid_NAME.
        metrics: of fid, kid, sfid, is, precision_recall, without those that are `lacking`.
        neighbours: of precision and recall.
        kid_seed: numpy seed of the subsets of KID.

    Raises:
        ValueError: sets that are too small.
    """
    result: dict[str, Any] = {}
    for name, reference in references.items():
        suffix = "" if name == "whole" else f"_{name}"
        if "fid" in metrics:
            result[f"fid{suffix}"] = frechet_distance(measured.moments, reference.moments)
        if "kid" in metrics and reference.features is not None:
            scale = extractor.kid_scale
            result[f"kid{suffix}"] = kernel_distance_of(measured.features * scale, reference.features * scale, kid_seed)
    whole = references["whole"]
    if "sfid" in metrics and measured.spatial is not None and whole.spatial is not None:
        result["sfid"] = frechet_distance(measured.spatial, whole.spatial)
    if "is" in metrics and measured.logits is not None:
        result["inception_score"] = inception_score(measured.logits)
    if "precision_recall" in metrics and whole.features is not None:
        result["precision"], result["recall"] = precision_recall(whole.features, measured.features, neighbours)
    if extractor.classes_are_labels and measured.logits is not None and measured.labels is not None:
        result["class_accuracy"] = float((measured.logits.argmax(axis=1) == np.asarray(measured.labels)).mean())
    return result | {"num_samples": measured.shape[0], "images_digest": measured.digest}
