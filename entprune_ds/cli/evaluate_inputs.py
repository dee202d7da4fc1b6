"""What `evaluate` measures with, and against: the extractor and the real images, opened and checked before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entprune_ds import comm
from entprune_ds.cli.evaluate_data import data_of
from entprune_ds.config import Config
from entprune_ds.data.index import Index, check_shards, load_index
from entprune_ds.data.reader import read_shard
from entprune_ds.data.stream import read_all
from entprune_ds.evaluation.extractor import Extracted, ImageExtractor, load_own
from entprune_ds.evaluation.features import Extractor, load_or_train
from entprune_ds.evaluation.fetch import inception_file
from entprune_ds.evaluation.images import to_uint8
from entprune_ds.evaluation.inception import load_inception, load_pytorch_inception
from entprune_ds.evaluation.measure import check_extracted, measure
from entprune_ds.evaluation.npz import member_names, member_shape
from entprune_ds.evaluation.references import (
    KEPT,
    Reference,
    holds_statistics,
    load_reference,
    of_images,
    read_about,
    statistics_problems,
)
from entprune_ds.evaluation.sources import ImageSource, from_array, from_npz, open_images, own_range
from entprune_ds.interop.torch_file import read_torch_file
from entprune_ds.logs import get_logger
from entprune_ds.preflight import validation_spec

ANY_IMAGE = (64, 64, 3)


@dataclass(frozen=True)
class Bench:
    """The extractor, and the real images before they are measured."""

    extractor: ImageExtractor
    probe: Extracted
    """What the extractor says of one black image: the widths."""
    resolution: tuple[int, ...] | None
    """(H,W,C) of the real images, where it is known."""
    images: dict[str, ImageSource]
    """Real images to look at: whole, validation."""
    statistics: Path | None
    """A file of statistics instead of `whole`; its own images, if any, are `images["whole"]`."""
    description: str
    """What the reference is, in words."""
    about: dict[str, Any]
    """What is known of the images before they are measured: where they lie (`images`), and of which data set."""

    @property
    def reference_rows(self) -> int:
        """Features of real images that there will be."""
        if self.images:
            return min(KEPT, self.images["whole"].shape[0])
        assert self.statistics is not None
        held = "features" in member_names(self.statistics)
        return min(KEPT, member_shape(self.statistics, "features")[0]) if held else 0

    @property
    def spatial_width(self) -> int | None:
        """Width of the spatial statistics that there will be."""
        if self.statistics is None:
            return None if self.probe.spatial is None else self.probe.spatial.shape[1]
        return member_shape(self.statistics, "mu_s")[0] if "mu_s" in member_names(self.statistics) else None

    def measured(self, batch_size: int) -> dict[str, Reference]:
        """The references. Collective."""
        seen = {name: measure(source, self.extractor, batch_size) for name, source in self.images.items()}
        if self.statistics is not None:
            return {"whole": load_reference(self.statistics, seen.get("whole"))}
        data = {key: value for key, value in self.about.items() if key != "images"}
        return {name: of_images(found, self.images[name].name, self.extractor, data) for name, found in seen.items()}


def open_bench(config: Config, cache: Path) -> Bench:
    """Extractor and reference of the settings. Collective.

    Args:
        cache: folder that keeps the digits extractor.

    Raises:
        ValueError: listing what is missing, damaged or does not go together.
    """
    if config.evaluate.extractor == "digits" and not config.evaluate.reference:
        return _digits_bench(config, cache)
    extractor = _extractor(config, cache)
    spec, path = config.evaluate.reference, Path(config.evaluate.reference)
    statistics, images, data = None, {}, dict[str, Any]()
    if not spec:
        index = load_index(config.data.shards, config.data.allow_pipe)
        images["whole"], data = shard_images(index), data_of(index)
    elif path.is_dir():
        images["whole"] = open_images(path)
    elif not path.is_file():
        raise ValueError(f"`evaluate.reference`: {path} does not exist. Give an npz or a folder of images.")
    elif holds_statistics(path):
        statistics = path
        if "arr_0" in member_names(path):
            images["whole"] = from_npz(path)
    else:
        images["whole"] = from_npz(path)
    known = images["whole"].shape[1:] if images else read_about(path).get("resolution")
    resolution = tuple(known) if known else None
    probe = _probe(extractor, resolution or ANY_IMAGE)
    width, problems = probe.features.shape[1], []
    if statistics is not None:
        problems = statistics_problems(path, extractor, width, config.evaluate.extractor == "inception")
    elif images["whole"].shape[0] <= width:
        message = f"{images['whole'].name} holds {images['whole'].shape[0]} images, too few for {width} features. "
        problems = [f"`evaluate.reference`: {message}Use {width + 1} or more."]
    if problems:
        raise ValueError("\n".join(problems))
    if statistics is not None:
        about = read_about(path)
        return Bench(extractor, probe, resolution, images, statistics, f"{about['count']} images: {path}", about)
    whole = images["whole"]
    about = data | {"images": whole.name}
    return Bench(extractor, probe, resolution, images, None, f"{whole.shape[0]} images: {whole.name}", about)


def _probe(extractor: ImageExtractor, shape: tuple[int, ...]) -> Extracted:
    """What an extractor says of a black image.

    Raises:
        ValueError: when it fails, or answers with something else than features.
    """
    try:
        found = extractor.extract(np.zeros((1, *shape), np.uint8))
    except RuntimeError as error:  # of torch
        why = str(error).strip().splitlines()[-1]
        raise ValueError(f"{extractor.name} fails on an image {list(shape)} ({why}).") from error
    check_extracted(extractor.name, found, 1)
    return found


def _digits_bench(config: Config, cache: Path) -> Bench:
    images, val_images, extractor, folder = real_images(config, cache)
    whole = np.concatenate([images, val_images])
    sources = {"whole": from_array(whole, name=str(folder)), "validation": from_array(val_images, name="validation")}
    about = f"{len(whole)} images, of which {len(val_images)} validation: {folder.parent}"
    found, data = digits_extractor(extractor), {"images": str(folder), "num_classes": 10}  # others were refused
    return Bench(found, found.extract(whole[:1]), whole.shape[1:], sources, None, about, data)


def _extractor(config: Config, cache: Path) -> ImageExtractor:
    evaluate = config.evaluate
    if evaluate.extractor == "digits":
        return digits_extractor(real_images(config, cache)[2])
    if evaluate.extractor != "inception":
        return load_own(Path(evaluate.extractor))
    path = inception_file(evaluate.inception, evaluate.mode)
    if evaluate.mode == "legacy_pytorch":
        try:
            return load_pytorch_inception(read_torch_file(path, None).tensors, path)
        except ValueError as error:
            raise ValueError(f"`evaluate.inception`: {error}") from error
    return load_inception(path, evaluate.mode)


def digits_extractor(found: Extractor) -> ImageExtractor:
    """The built-in network of digits as an extractor among others."""

    def extract(images: np.ndarray) -> Extracted:
        return Extracted(found.features(images), logits=found.logits(images))

    digest = found.name.rsplit(" ", 1)[1]
    return ImageExtractor(
        found.name, extract, digest, "none (8x8)", found.kid_scale, classes_are_labels=True,
        test_accuracy=found.test_accuracy,
    )  # fmt: skip


def extractor_problem(index: Index) -> str:
    """Why the built-in extractor says nothing about some data; empty where it does."""
    if tuple(index.shape) == (1, 8, 8) and index.num_classes == 10:
        return ""
    message = f"the built-in extractor is made for digits (1x8x8, 10 classes), {index.folder} holds "
    message += f"{list(index.shape)} with {index.num_classes} classes. "
    return message + "For photographs set evaluate.extractor=inception, or give a file of your own."


def real_images(config: Config, cache: Path) -> tuple[np.ndarray, np.ndarray, Extractor, Any]:
    """Training and validation images, uint8 (N,H,W,C), the extractor made from them, and the folder of the shards.

    Rank 0 trains the extractor, the others find it in the cache. Collective.

    Raises:
        ValueError: when the data is not digits.
    """
    pipe = config.data.allow_pipe
    index = load_index(config.data.shards, pipe)
    if problem := extractor_problem(index):
        raise ValueError(problem)
    (train, train_labels), (val, val_labels) = read_all(index), read_all(validation_spec(config), pipe)
    images, val_images = to_uint8(train), to_uint8(val)
    if not comm.is_main():
        comm.barrier()
    extractor = load_or_train(images, train_labels.numpy(), val_images, val_labels.numpy(), cache=cache)
    if comm.is_main():
        comm.barrier()
    return images, val_images, extractor, index.folder


def shard_images(index: Index) -> ImageSource:
    """The images of data.shards, read shard by shard; every rank takes shards that follow one another.

    Raises:
        ValueError: shards that are missing, or hold no images.
    """
    if missing := check_shards(index, checksums=False):
        raise ValueError("\n".join(missing))
    if index.kind != "pixels" and not (index.kind == "latents" and index.shape[0] in (1, 3)):
        message = f"`data.shards`: {index.folder} holds {index.kind}, not images. Give the images that were encoded, "
        raise ValueError(message + "or evaluate.reference.")

    def batches(rank: int, world_size: int, size: int) -> Iterator[np.ndarray]:
        waiting: list[np.ndarray] = []
        for number in own_range(len(index.shards), rank, world_size):
            for _, array, _ in read_shard(index, index.shards[number]):
                waiting.append(_pixels(array))
                if len(waiting) == size:
                    yield np.stack(waiting)
                    waiting = []
        if waiting:
            yield np.stack(waiting)

    channels, height, width = index.shape
    get_logger().info("reference: %d images in %d shards of %s", index.total, len(index.shards), index.folder)
    return ImageSource(str(index.folder), (index.total, height, width, channels), batches)


def _pixels(array: np.ndarray) -> np.ndarray:
    """uint8 (H,W,C) of an example (C,H,W), stored as pixels or in [-1, 1]."""
    import torch

    if array.dtype != np.uint8:
        return to_uint8(torch.from_numpy(np.array(array))[None])[0]
    return array.transpose(1, 2, 0)
