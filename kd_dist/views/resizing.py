"""Antialiased bilinear resizing that gives the same bytes with every version of Pillow."""

import math

import numpy as np
from PIL import Image

BILINEAR = Image.Resampling.BILINEAR
Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels


def resized(picture: Image.Image | np.ndarray, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    """Pillow's bilinear resize of `box` to `size` (width, height): across, then down. Of an array (H, W, 3) or (H, W)
    uint8 only what the box needs is brought to Pillow.

    Each pass rounds to bytes, so their order shows. Pillow before 13.0 always goes across first; from 13.0 on it goes
    down first where the height loses more than twice as many pixels as the width.
    """
    rows, columns = picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
    (width, height), (left, top, right, bottom) = size, box or (0, 0, columns, rows)
    # Down, a pixel is made of rows as far from it as the ratio of the heights, those beyond the box too.
    reach = math.ceil(max(1.0, (bottom - top) / height)) + 1
    first, last = max(0, top - reach), min(rows, bottom + reach)
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture[first:last])
    elif (first, last) != (0, rows):
        picture = picture.crop((0, first, columns, last))
    across = picture.resize((width, last - first), BILINEAR, box=(left, 0, right, last - first))
    return across.resize(size, BILINEAR, box=(0, top - first, width, bottom - first))
