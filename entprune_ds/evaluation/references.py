"""Statistics of real images that samples are compared with: made from images, or read from an npz.

Ours holds mu, sigma (mu_s, sigma_s of the spatial features), features of up to 10,000 images for KID, precision and
recall, and `about`: JSON with count, resolution, extractor and its digest, resize mode, a digest of the images and,
where they came from shards, the number of classes and a digest of their names.
ADM's reference batches hold mu, sigma, mu_s, sigma_s, and often arr_0 (10,000 images), and say nothing else. Files of
clean-fid, pytorch-fid and others hold mu and sigma alone: nothing in them says how the images were resized.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entprune_ds.evaluation.extractor import ImageExtractor
from entprune_ds.evaluation.images import write_whole
from entprune_ds.evaluation.measure import Measured
from entprune_ds.evaluation.npz import member_names, member_shape, open_member
from entprune_ds.evaluation.statistics import Moments
from entprune_ds.plain_json import parse_json

KEPT = 10_000
"""Images whose features are used: as many as ADM's reference batches hold, whether they come from a file or not."""
UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Reference:
    """Real images, as far as figures need them."""

    name: str
    moments: Moments
    """Their count is 0 where a file does not say it."""
    spatial: Moments | None
    features: np.ndarray | None
    """(M,D) for KID, precision and recall, M at most KEPT; on rank 0."""
    about: dict[str, Any]
    """Plain values for the protocol."""


def of_images(measured: Measured, name: str, extractor: ImageExtractor, data: dict[str, Any]) -> Reference:
    """The reference that measured images are.

    Args:
        name: where the images lie.
        data: what is known of their data set, as plain values.
    """
    about = data | {
        "images": name, "count": measured.shape[0], "resolution": list(measured.shape[1:]), "digest": measured.digest,
        "features": min(KEPT, measured.shape[0]), **extractor.description,
    }  # fmt: skip
    return Reference(name, measured.moments, measured.spatial, kept(measured.features), about)


def kept(features: np.ndarray) -> np.ndarray:
    """At most KEPT rows of features (M,D), evenly spaced, so that figures do not depend on where they were stored."""
    chosen = np.linspace(0, len(features) - 1, min(KEPT, len(features))).round().astype(np.int64)
    return features[chosen]


def save_reference(reference: Reference, path: Path) -> None:
    """Write it, for later evaluations. On rank 0.

    Raises:
        ValueError: the file cannot be written.
    """
    assert reference.features is not None
    arrays = {"mu": reference.moments.mean, "sigma": reference.moments.covariance, "features": reference.features}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    arrays["about"] = np.array(json.dumps(reference.about))
    write_whole(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


def holds_statistics(path: Path) -> bool:
    """Whether an npz holds statistics, or images only.

    Raises:
        ValueError: it holds neither, or cannot be read.
    """
    names = member_names(path)
    if {"mu", "sigma"} <= set(names):
        return True
    if "arr_0" in names:
        return False
    shown = ", ".join(names) or "nothing"
    raise ValueError(f"{path} must hold mu and sigma (statistics), or arr_0 (images), got {shown}.")


def read_about(path: Path) -> dict[str, Any]:
    """What a file of statistics says of itself; of files of others only what their arrays show.

    Raises:
        ValueError: the file is missing, damaged, or not of this kind.
    """
    names = member_names(path)
    width = member_shape(path, "mu")
    if len(width) != 1 or member_shape(path, "sigma") != (width[0], width[0]):
        raise ValueError(f"{path}: mu and sigma must be (D,) and (D,D), got {width}, {member_shape(path, 'sigma')}.")
    if "about" not in names:
        by_adm = "mu_s" in names
        found = {"images": str(path), "count": UNKNOWN, "extractor": UNKNOWN + (" (ADM's form)" if by_adm else "")}
        found |= {"resize_mode": "legacy_tensorflow" if by_adm else UNKNOWN}
        return found | ({"resolution": list(member_shape(path)[1:])} if "arr_0" in names else {})
    try:
        about = parse_json(str(open_member(path, "about")))
    except ValueError as error:
        raise ValueError(f"{path}: `about` is damaged ({error}). Make the statistics again.") from error
    if not isinstance(about, dict) or not {"count", "resolution", "extractor_digest", "resize_mode"} <= set(about):
        raise ValueError(f"{path}: `about` does not say count, resolution and extractor. Make the statistics again.")
    return about


def statistics_problems(path: Path, extractor: ImageExtractor, width: int, inception: bool) -> list[str]:
    """Why statistics do not go with an extractor: empty if they do.

    Args:
        width: D of the extractor's features.
        inception: whether it is the Inception network.

    Raises:
        ValueError: as read_about.
    """
    about, found = read_about(path), []
    if member_shape(path, "mu") != (width,):
        held = member_shape(path, "mu")[0]
        found.append(f"`evaluate.reference`: {path} holds {held} features, {extractor.name} makes {width}.")
    if "extractor_digest" not in about:
        if not inception:
            message = f"`evaluate.reference`: {path} does not say which network made it, so its statistics cannot be "
            message += f"compared with those of {extractor.name}. Give images, or a file of evaluate.save_reference."
            found.append(message)
        elif about["resize_mode"] not in (UNKNOWN, extractor.mode):
            message = f"`evaluate.mode` is {extractor.mode}, but {path} has ADM's form, statistics of "
            found.append(message + "legacy_tensorflow. Set evaluate.mode=legacy_tensorflow.")
        return found
    for key, now in extractor.description.items():
        if key != "extractor" and about.get(key) != now:  # the name may hold a path
            message = f"`evaluate.reference`: {path} was made with {key} {about.get(key)} ({about.get('extractor')}), "
            found.append(
                message + f"the extractor here is {now} ({extractor.name}). Make the statistics again with it."
            )
    if about["count"] <= width:
        message = f"`evaluate.reference`: {path} was made from {about['count']} images, too few for {width} features. "
        found.append(message + f"Use {width + 1} or more.")
    return found


def load_reference(path: Path, images: Measured | None) -> Reference:
    """A file without `statistics_problems`.

    Args:
        images: its arr_0, where it has one, measured by the extractor in use.
    """
    names, about = member_names(path), read_about(path)
    count = about["count"] if isinstance(about["count"], int) else 0
    spatial = None
    if {"mu_s", "sigma_s"} <= set(names):
        spatial = Moments(count, np.array(open_member(path, "mu_s")), np.array(open_member(path, "sigma_s")))
    features = np.array(open_member(path, "features")) if "features" in names else None
    features = images.features if images is not None else features
    if features is not None:
        features = kept(features)
        about |= {"features": len(features)}
    moments = Moments(count, np.array(open_member(path, "mu")), np.array(open_member(path, "sigma")))
    return Reference(str(path), moments, spatial, features, about)
