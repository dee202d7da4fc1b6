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
from typing import TypeVar

import numpy as np
import torch

from entprune_ds import comm
from entprune_ds.atomic import file_sha256
from entprune_ds.user_file import object_of_file

T = TypeVar("T")


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

    def run(images: np.ndarray) -> object:
        with torch.inference_mode():
            return net(to_float(images))

    answer = _guarded(path, run)
    return ImageExtractor(f"torchscript {path.name}", lambda images: _extracted(path, answer(images)), digest)


def _extracted(path: Path, found: object) -> Extracted:
    """What a torchscript file returned, as arrays.

    Raises:
        ValueError: it is neither features nor a pair of features and logits.
    """
    features, *others = found if isinstance(found, tuple) and found else (found,)
    logits = others[0] if others else None
    if not isinstance(features, torch.Tensor) or not isinstance(logits, torch.Tensor | None) or len(others) > 1:
        got = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        message = f"`evaluate.extractor`: {path} must return features (n,D), or a tuple (features, logits), got {got}. "
        raise ValueError(message + "Correct it, or give a .py file.")
    return Extracted(_array(features), logits=None if logits is None else _array(logits))


def _array(found: torch.Tensor) -> np.ndarray:
    """f32 or f64: numpy has no bfloat16, and half precision is too coarse for covariances."""
    return found.to(torch.promote_types(found.dtype, torch.float32)).cpu().numpy()


def to_float(images: np.ndarray) -> torch.Tensor:
    """uint8 (n,H,W,C) -> f32 (n,C,H,W), 0 to 255, on the device of this rank."""
    return torch.from_numpy(np.array(images)).to(comm.device()).permute(0, 3, 1, 2).float()


def _from_python(path: Path, digest: str) -> ImageExtractor:
    example = "evaluation/extractor.py shows"
    found = object_of_file(path, "EXTRACTOR", ImageExtractor, "evaluate.extractor", example)
    return replace(found, extract=_guarded(path, found.extract), digest=found.digest or digest)


def _guarded(path: Path, call: Callable[[np.ndarray], T]) -> Callable[[np.ndarray], T]:
    """The code of a user's file, whatever it raises told as one line."""

    def guarded(images: np.ndarray) -> T:
        try:
            return call(images)
        except Exception as error:
            if path.suffix == ".py":
                frame = traceback.extract_tb(error.__traceback__)[-1]
                why = f"{' '.join(str(error).split())}, {frame.filename}, line {frame.lineno}"
            else:
                why = (str(error).strip().splitlines() or [""])[-1]  # above it stands torchscript's own traceback
            message = f"`evaluate.extractor`: {path} fails on images {list(images.shape)} "
            raise ValueError(message + f"({type(error).__name__}: {why}). Correct it.") from error

    return guarded
