"""Antialiased bilinear resizing that gives the same bytes with every version of Pillow."""

import math

from PIL import Image

BILINEAR = Image.Resampling.BILINEAR


def resized(picture: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """Pillow's bilinear resize of `box` (left, top, right, bottom) to `size` (width, height): across, then down.

    Each pass rounds to bytes, so their order shows. Pillow before 13.0 always goes across first; from 13.0 on it goes
    down first where the height loses more than twice as many pixels as the width.
    """
    (width, height), (left, top, right, bottom) = size, box or (0, 0, *picture.size)
    # Down, a pixel is made of rows as far from it as the ratio of the heights, those beyond the box too.
    reach = math.ceil(max(1.0, (bottom - top) / height)) + 1
    first, last = max(0, top - reach), min(picture.height, bottom + reach)
    if (first, last) != (0, picture.height):
        picture = picture.crop((0, first, picture.width, last))
    across = picture.resize((width, last - first), BILINEAR, box=(left, 0, right, last - first))
    return across.resize(size, BILINEAR, box=(0, top - first, width, bottom - first))
