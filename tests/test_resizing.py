"""views/resizing.py: golden bytes, Pillow's own resize where its versions agree, and boxes at every edge."""

import zlib

import numpy as np
import pytest
from PIL import Image

from kd_dist.views.resizing import BILINEAR, resized

CASES = 400
GOLDEN = 738955370  # CRC32


def picture(height: int, width: int) -> Image.Image:
    places = np.arange(height * width * 3, dtype=np.int64)
    return Image.fromarray((places**2 % 251).astype(np.uint8).reshape(height, width, 3))


def boxes() -> list[tuple[Image.Image, tuple[int, int], tuple[int, int, int, int]]]:
    """Pictures from 1 to 90 pixels a side, a box in each, which may touch any edge, and a size to bring it to."""
    chance = np.random.default_rng(0)
    found = []
    while len(found) < CASES:
        height, width = chance.integers(1, 91, 2).tolist()
        size = tuple(chance.integers(1, 61, 2).tolist())
        (top, bottom), (left, right) = (sorted(chance.integers(0, side + 1, 2).tolist()) for side in (height, width))
        if top < bottom and left < right:
            found.append((picture(height, width), size, (left, top, right, bottom)))
    return found


def test_the_bytes_are_golden():
    """The value was computed with Pillow 10.0.1, 11.3.0 and 13.0.0, and is that of the first two's own resize."""
    crc = 0
    for image, size, box in boxes():
        crc = zlib.crc32(resized(image, size, box).tobytes(), crc)
    assert crc == GOLDEN


def test_across_comes_first():
    tall = picture(40, 5)
    across = tall.resize((4, 40), BILINEAR).resize((4, 4), BILINEAR)
    down = tall.resize((5, 4), BILINEAR).resize((4, 4), BILINEAR)
    assert across.tobytes() != down.tobytes()
    assert resized(tall, (4, 4)).tobytes() == across.tobytes()


def test_where_all_versions_agree_it_is_pillows_own_resize():
    compared = 0
    for image, (width, height), box in boxes():
        if not (image.height > height and image.height - height > 2 * (image.width - width)):
            compared += 1
            own = image.resize((width, height), BILINEAR, box=box)
            assert resized(image, (width, height), box).tobytes() == own.tobytes()
    assert compared >= CASES // 2


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_whole_picture_of_its_own_size_stays_as_it_is(mode):
    image = picture(7, 5).convert(mode)
    same = resized(image, image.size)
    assert (same.mode, same.tobytes()) == (mode, image.tobytes())
