"""Colours of a picture, changed in whole numbers: the same bytes on any machine."""

import numpy as np
from PIL import Image

ONE = 1 << 16  # the factor 1 in Q16 fixed point
HALF = ONE // 2
HUES = 1 << 12  # steps of hue in a turn
CHUNK = 1 << 16  # levels at a time, which stay in the processor's cache


def coloured(picture: Image.Image, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """An RGB picture as (h, w, 3) uint8, its brightness, contrast and saturation multiplied in this order by factors
    from 0 to 2.

    Contrast moves pixels away from the picture's mean grey and saturation from each pixel's own grey; grey is ITU-R
    601 luma.
    """
    table = _away_from(0, brightness)
    if contrast != 1:
        bright = mapped(picture, list(table) * 3) if brightness != 1 else picture
        table = table.translate(_away_from(_mean_grey(bright), contrast))
    if brightness != 1 or contrast != 1:
        picture = mapped(picture, list(table) * 3)
    return _saturated(picture, saturation) if saturation != 1 else np.array(picture)


def mapped(picture: Image.Image, table: list[int]) -> Image.Image:
    """Every level of an RGB picture replaced by its entry in the table, 256 of red, of green, then of blue.

    As `picture.point(table)`, which would round each of the whole numbers once more, and take longer for it than for a
    small picture.
    """
    return picture._new(picture.im.point(table, None))


def away(pixels: np.ndarray, centres: np.ndarray, times: float) -> np.ndarray:
    """Levels (h, w, 3) uint8 moved away from `centres`, as many levels, to `times` their distance from them, rounded
    half up and held to 0..255: a new array. `times` is a multiple of 1 / ONE, from 0 to 2.

    In 32-bit floats: their 24 bits hold each product, at most 255 with 16 bits behind the point, and each sum from
    0 to 256 exactly; what is rounded lies outside and is cut off.
    """
    made = np.empty(pixels.shape, np.uint8)
    flat = pixels.reshape(-1), centres.reshape(-1), made.reshape(-1)
    for start in range(0, pixels.size, CHUNK):
        levels, moved, out = (one[start : start + CHUNK] for one in flat)
        levels, moved = levels.astype(np.float32), moved.astype(np.float32)
        np.subtract(levels, moved, out=moved)
        moved *= np.float32(times - 1)
        moved += levels
        moved += np.float32(0.5)
        out[:] = np.clip(moved, 0, 255, out=moved)
    return made


def hued(pixels: np.ndarray, amount: int) -> np.ndarray:
    """(h, w, 3) uint8 with the hue of HSV turned by `amount` / HUES of a turn, from red to green; saturation and value
    stay. A new array."""
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    # The hue in units of which a turn has 6 times the chroma: whole numbers, 0 for red. The first largest decides.
    hue = np.where(
        value == red, green - blue, np.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    )
    sector = chroma * HUES
    turn = 6 * sector
    hue = hue * HUES + 6 * chroma * (amount % HUES)
    made = np.empty_like(pixels)
    for channel, offset in enumerate((5, 3, 1)):  # from HSV back: how far each channel is below the value
        place = hue + offset * sector
        place -= turn * (place >= turn)
        place -= turn * (place >= turn)
        below = np.clip(np.minimum(place, 4 * sector - place), 0, sector)
        made[..., channel] = value - (below + HUES // 2 >> 12)
    return made


def _fixed(factor: float) -> int:
    """A factor as a Q16 number. A float32 factor times 65,536 is exact, so only this rounding happens."""
    return int(factor * ONE + 0.5)


def _away_from(centre: int, factor: float) -> bytes:
    """The table of 256 levels for `centre + (level - centre) * factor`, rounded and held to 0..255."""
    moved = ((np.arange(256) - centre) * _fixed(factor) + HALF >> 16) + centre
    return np.minimum(np.maximum(moved, 0), 255).astype(np.uint8).tobytes()  # np.clip takes longer than the rest


def _mean_grey(picture: Image.Image) -> int:
    """The mean luma of an RGB picture, rounded to a whole number."""
    grey = np.asarray(picture.convert("L"))
    return (2 * int(grey.sum(dtype=np.int64)) + grey.size) // (2 * grey.size)


def _saturated(picture: Image.Image, factor: float) -> np.ndarray:
    """(h, w, 3) uint8: each pixel moved away from its own grey by `factor`."""
    grey = picture.convert("L").convert("RGB")  # three times, so that one loop runs over all levels
    return away(np.asarray(picture), np.asarray(grey), _fixed(factor) / ONE)
