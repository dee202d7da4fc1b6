"""Image files to square uint8 arrays, cropped as ADM crops, with a limit on the number of pixels.

The crop is the one of ADM [Dhariwal & Nichol 2021, arXiv 2105.05233, code guided-diffusion], which DiT and SiT train
on: halve by a box filter while the short side is at least twice the target, then bicubic until the short side is the
target, then the centre square.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow may decode; its other decoders run programs or are rarely used."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
"""Endings (lower case) of file names that are taken for images."""


class ImageError(ValueError):
    """An image that cannot be used; the message names the file and the reason."""


def load_image(data: bytes, name: str, size: int, max_pixels: int) -> np.ndarray:
    """Decode, turn upright, crop and resize one image.

    The EXIF orientation is applied; grey, palette and CMYK images become RGB, transparency is dropped (as in ADM),
    16-bit grey keeps its upper 8 bits; of an animation the first frame counts.

    Args:
        data: content of the file.
        name: name of the file, for messages.
        size: side of the result in pixels.
        max_pixels: largest width x height, of the file and of what the resize makes of a narrow image.

    Returns:
        (3,size,size) uint8.

    Raises:
        ImageError: for an empty, truncated, unknown or too large file.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty (0 bytes)")
    try:
        with _pixel_limit(max_pixels), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            square = center_crop(_to_rgb(ImageOps.exif_transpose(image), name), size, max_pixels, name)
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: more than {max_pixels} pixels (`data.max_pixels`)") from error
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image of a known format ({', '.join(FORMATS)})"
        raise ImageError(f"{name}: {reason}") from error
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's own limit, as an error and before it decodes; it compares the size in the header."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"{name}: its 32-bit values have no known range")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int, max_pixels: int, name: str = "image") -> Image.Image:
    """The centre square of an RGB image at `size` pixels (see the head of this file).

    Raises:
        ImageError: when the image is so narrow that the resize would exceed `max_pixels`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max_pixels:
        raise ImageError(f"{name}: {image.width}x{image.height} is too narrow to crop a square of {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
