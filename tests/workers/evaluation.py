"""Worker functions of test_evaluation_figures.py: one pass over images on several ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from entprune_ds import comm
from entprune_ds.evaluation.extractor import ImageExtractor, load_own
from entprune_ds.evaluation.fetch import fetch
from entprune_ds.evaluation.fid import kernel_distance_of
from entprune_ds.evaluation.frechet import frechet_distance
from entprune_ds.evaluation.inception import load_inception
from entprune_ds.evaluation.measure import measure
from entprune_ds.evaluation.sources import open_images


def extractor_of(path: str, mode: str) -> ImageExtractor:
    """The network of a test."""
    return load_inception(Path(path), mode) if mode else load_own(Path(path))


def measured(folders: list[str], network: str, mode: str) -> dict:
    """Figures of two sets of images, from distributed statistics."""
    extractor = extractor_of(network, mode)
    a, b = (measure(open_images(Path(folder)), extractor, 7) for folder in folders)
    found = {"fid": frechet_distance(a.moments, b.moments), "digests": [a.digest, b.digest]}
    if a.spatial is not None and b.spatial is not None:
        found["sfid"] = frechet_distance(a.spatial, b.spatial)
    if comm.is_main():
        found["kid"] = kernel_distance_of(a.features, b.features, seed=5)
        found["rows"] = [float(np.abs(x.features).sum()) for x in (a, b)]
        found["first"] = a.features[:, 0].tolist()
    return found


def one_fails(folder: str, network: str) -> str:
    """What the ranks say when the pictures of one of them are damaged."""
    try:
        measure(open_images(Path(folder)), load_own(Path(network)), 4)
    except comm.DistributedError as error:
        return str(error)
    return ""


def fetched(url: str, path: str) -> str:
    """Why a download failed on this rank, or the empty text."""
    comm.barrier()  # all ask at a time
    try:
        fetch(url, Path(path), timeout=60)
    except OSError as error:
        return str(error)
    return ""
