"""What the figures need of a network that looks at images, and how a user gives one of their own.

A Python file (evaluate.extractor=mine.py) defines EXTRACTOR; its code runs on every rank:

    import numpy as np
    import torch
    from entprune_ds.evaluation.extractor import Extracted, ImageExtractor

    net = torch.hub.load("facebookresearch/dinov2", "dinov2_vitl14").eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))

    def extract(images: np.ndarray) -> Extracted:                      # uint8 (n,H,W,C), as they were drawn
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255    # (n,3,H,W)
        pixels = torch.nn.functional.interpolate(pixels, (224, 224), mode="bicubic", antialias=True)
        with torch.inference_mode():
            features = net((pixels - mean) / std)                      # (n,D)
        return Extracted(features.numpy())                             # spatial= and logits=, if there are any

    EXTRACTOR = ImageExtractor(name="DINOv2 ViT-L/14, bicubic 224", extract=extract)

A torchscript file (evaluate.extractor=mine.pt) is called with the images as f32 (n,C,H,W), 0 to 255, not resized, and
returns features (n,D), or a tuple (features, logits).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from entprune_ds import comm
from entprune_ds.atomic import file_sha256
from entprune_ds.user_file import object_of_file


@dataclass(frozen=True)
class Extracted:
    """What a network says of some images."""

    features: np.ndarray
    """(n,D) floats: FID, KID, precision and recall."""
    spatial: np.ndarray | None = None
    """(n,S): features that keep the places in the image, for sFID."""
    logits: np.ndarray | None = None
    """(n,K): class logits, for the Inception score and the accuracy of the classes."""


@dataclass(frozen=True)
class ImageExtractor:
    """A network as a function of images."""

    name: str
    """What it is; stands beside every figure."""
    extract: Callable[[np.ndarray], Extracted]
    """uint8 (n,H,W,C) -> what it says; every image by itself."""
    digest: str = ""
    """Which weights these are."""
    mode: str = "its own"
    """How images are resized before: a mode of clean-fid, or what the extractor does itself."""
    kid_scale: float = 1.0
    """Factor of the features before the kernel of KID, which is not scale-free."""
    classes_are_labels: bool = False
    """Whether class k of the logits is label k of the samples."""
    test_accuracy: float | None = None
    """Share of unseen real images that it classifies rightly, where that was measured."""

    @property
    def description(self) -> dict[str, str]:
        """Plain values that name it."""
        return {"extractor": self.name, "extractor_digest": self.digest, "resize_mode": self.mode}


def load_own(path: Path) -> ImageExtractor:
    """The extractor of a user's file.

    Raises:
        ValueError: no such file, or one that does not hold an extractor.
    """
    if not path.is_file():
        raise ValueError(f"`evaluate.extractor`: {path} does not exist.")
    digest = file_sha256(path)[:16]
    if path.suffix == ".py":
        return _from_python(path, digest)
    try:
        net = torch.jit.load(path, map_location=comm.device()).eval()
    except (RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[-1]
        raise ValueError(f"`evaluate.extractor`: {path} is no torchscript file ({why}). See torch.jit.save.") from error

    def extract(images: np.ndarray) -> Extracted:
        with torch.inference_mode():
            found = net(to_float(images))
        features, logits = found if isinstance(found, tuple) else (found, None)
        return Extracted(features.cpu().numpy(), logits=None if logits is None else logits.cpu().numpy())

    return ImageExtractor(f"torchscript {path.name}", extract, digest)


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 (n,H,W,C) -> f32 (n,C,H,W), 0 to 255, on the device of this rank."""
    return torch.from_numpy(np.array(images)).to(comm.device()).permute(0, 3, 1, 2).float()


def _from_python(path: Path, digest: str) -> ImageExtractor:
    example = "evaluation/extractor.py shows"
    found = object_of_file(path, "EXTRACTOR", ImageExtractor, "evaluate.extractor", example)

    def guarded(images: np.ndarray) -> Extracted:
        try:
            return found.extract(images)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error}, {place.filename}, line {place.lineno}"
            message = f"`evaluate.extractor`: {path} fails on images {list(images.shape)} ({why}). Correct it."
            raise ValueError(message) from error

    return replace(found, extract=guarded, digest=found.digest or digest)
