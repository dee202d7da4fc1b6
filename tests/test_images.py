"""Images: ADM's crop, orientation, colours, and one clear error for every file that cannot be used."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from entprune_ds.data.images import ImageError, center_crop, load_image

LIMIT = 100_000_000


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(image, kind="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def load(data, size=16, limit=LIMIT):
    return load_image(data, "a/b.png", size, limit)


def test_halving_is_the_mean_of_2x2_pixels_and_the_centre_is_cut():
    image = noise(32, 44)
    means = image.astype(float).reshape(16, 2, 22, 2, 3).mean((1, 3))
    found = load(file_of(image)).astype(float)
    assert found.shape == (3, 16, 16)
    assert np.abs(found - means[:, 3:19].transpose(2, 0, 1)).max() <= 1  # rounded once per axis
    assert np.array_equal(load(file_of(image), size=32), image[:, 6:38].transpose(2, 0, 1))  # nothing to resize


def test_bicubic_does_the_rest_once_the_short_side_is_below_twice_the_size():
    image = Image.fromarray(noise(100, 70))
    twice = image.resize((35, 50), Image.Resampling.BOX).resize((17, 25), Image.Resampling.BOX)  # 35 >= 32 > 17
    expected = twice.resize((16, 24), Image.Resampling.BICUBIC).crop((0, 4, 16, 20))
    assert np.array_equal(np.asarray(center_crop(image, 16, LIMIT)), np.asarray(expected))
    assert load(file_of(noise(5, 9))).shape == (3, 16, 16)  # small images grow


@pytest.mark.parametrize(("orientation", "turn"), [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)),
                                                   (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])  # fmt: skip
def test_exif_orientation_is_honoured(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = noise(16, 16)
    assert np.array_equal(load(file_of(image, exif=exif)), turn(image).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(mode):
    image = Image.fromarray(noise(16, 16)).convert(mode)
    found = load(file_of(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert found.dtype == np.uint8 and np.array_equal(found.transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_16_bit_grey_keeps_its_upper_bits():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert np.array_equal(load(file_of(Image.fromarray(grey)))[0], (grey >> 8).astype(np.uint8))


def test_unusable_files_are_one_error_that_names_file_and_reason():
    image = noise(64, 64)
    for data, reason in [
        (b"", "the file is empty"),
        (b"not an image at all", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (file_of(image, "JPEG")[:2000], "truncated"),
        (file_of(image)[:4000], "truncated"),
        (file_of(image)[:-40].replace(b"IDAT", b"IDAT\0", 1), ""),
        (file_of(image, "WEBP")[:500], ""),
        (file_of(Image.new("F", (8, 8)), "TIFF"), "32-bit values have no known range"),
    ]:
        with pytest.raises(ImageError) as caught:
            load(data)
        assert str(caught.value).startswith("a/b.png: ") and reason in str(caught.value)


def test_a_decompression_bomb_is_refused_by_its_header():
    bomb = file_of(Image.new("1", (20_000, 10_000)))  # 200 megapixels in 25 kB
    assert len(bomb) < 50_000
    with pytest.raises(ImageError, match=r"a/b.png: more than 100000000 pixels \(`data.max_pixels`\)"):
        load(bomb)
    assert load(file_of(noise(10, 10)), size=8, limit=100).shape == (3, 8, 8)
    with pytest.raises(ImageError, match="more than 99 pixels"):
        load(file_of(noise(10, 10)), size=8, limit=99)
    assert Image.MAX_IMAGE_PIXELS not in (99, 100)  # Pillow's own limit is as it was


def test_a_sliver_does_not_explode_when_it_is_enlarged():
    with pytest.raises(ImageError, match="1x100000 is too narrow"):
        load(file_of(Image.new("L", (1, 100_000))), size=256)
