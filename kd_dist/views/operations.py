"""The operations of RandAugment, each with one whole number that says how much: the same bytes on any machine.

After Cubuk et al., "RandAugment: Practical automated data augmentation", 2019 (1909.13719), section 3; at full strength
as strong as in torchvision's `RandAugment`. A picture is (h, w, 3) uint8, and each operation returns a new one.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from kd_dist.views.colours import away, coloured, mapped

FACTOR = 1 << 14  # the factor 1 of brightness, contrast, colour and sharpness
TURN = 1 << 15  # the sine of a right angle, and the shear 1
FILL = 128  # the level of what a picture that was moved leaves open
LANES = np.array([0, 21, 42], np.uint64)  # where red, green and blue begin in 64 bits; sums of 20 bits fit

Size = tuple[int, int]


def identity(pixels: np.ndarray, amount: int) -> np.ndarray:
    """The picture as it is."""
    return pixels.copy()


def autocontrast(pixels: np.ndarray, amount: int) -> np.ndarray:
    """Each channel stretched, so that its least level becomes 0 and its largest 255; one of a single level stays."""

    def stretched(counts: np.ndarray) -> np.ndarray:
        least, largest = np.flatnonzero(counts)[[0, -1]].tolist()
        spread = largest - least
        levels = (np.arange(256) - least) * 510 + spread
        return np.clip(levels // (2 * spread), 0, 255) if spread else np.arange(256)

    return _by_tables(pixels, stretched)


def equalize(pixels: np.ndarray, amount: int) -> np.ndarray:
    """Each channel's histogram made as even as can be; as Pillow's `ImageOps.equalize`."""

    def evened(counts: np.ndarray) -> np.ndarray:
        step = (int(counts.sum()) - int(counts[np.flatnonzero(counts)[-1]])) // 255
        below = np.cumsum(counts) - counts
        return np.minimum((below + step // 2) // step, 255) if step else np.arange(256)

    return _by_tables(pixels, evened)


def posterize(pixels: np.ndarray, amount: int) -> np.ndarray:
    """The upper `amount` bits of each level, 1 to 8; the others become 0."""
    return pixels & np.uint8(256 - (1 << 8 - amount))


def solarize(pixels: np.ndarray, amount: int) -> np.ndarray:
    """Levels from `amount` on, 0 to 256, become 255 less the level."""
    return pixels ^ (pixels >= amount) * np.uint8(255)


def factored(pixels: np.ndarray, amount: int, which: int) -> np.ndarray:
    """Brightness (0), contrast (1) or colour (2) multiplied by `amount` / FACTOR, as `coloured` does it."""
    return coloured(Image.fromarray(pixels), *(amount / FACTOR if place == which else 1 for place in range(3)))


def sharpness(pixels: np.ndarray, amount: int) -> np.ndarray:
    """The distance of each level from the mean of the 3 x 3 about it, multiplied by `amount` / FACTOR."""
    mean = np.asarray(Image.fromarray(pixels).filter(ImageFilter.BoxBlur(1)))
    return away(pixels, mean, amount / FACTOR)


def rotate(pixels: np.ndarray, amount: int) -> np.ndarray:
    """Turned about its centre by less than a right angle, of which `amount` / TURN is the sine; above 0: clockwise."""
    cosine = math.isqrt(TURN**2 - amount**2)
    return moved(pixels, (cosine, amount, -amount, cosine))


def shear_x(pixels: np.ndarray, amount: int) -> np.ndarray:
    """Rows moved to the left by `amount` / TURN of how far they are below the centre."""
    return moved(pixels, (TURN, amount, 0, TURN))


def shear_y(pixels: np.ndarray, amount: int) -> np.ndarray:
    """Columns moved up by `amount` / TURN of how far they are to the right of the centre."""
    return moved(pixels, (TURN, 0, amount, TURN))


def translate_x(pixels: np.ndarray, amount: int) -> np.ndarray:
    """Moved to the right by `amount` pixels."""
    return moved(pixels, (TURN, 0, 0, TURN), (-amount, 0))


def translate_y(pixels: np.ndarray, amount: int) -> np.ndarray:
    """Moved down by `amount` pixels."""
    return moved(pixels, (TURN, 0, 0, TURN), (0, -amount))


def moved(pixels: np.ndarray, matrix: tuple[int, int, int, int], shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Each pixel takes what lies at M p + `shift`, with p its place (x, y) from the centre: the matrix (a, b, c, d) in
    units of TURN, x' = a x + b y and y' = c x + d y; the shift in pixels.

    Between pixels it is bilinear, by places rounded to 1/64 of a pixel; around the picture everything is FILL.
    """
    height, width = pixels.shape[:2]
    a, b, c, d = matrix
    # Twice a place from the centre is whole, so that its product with the matrix is in 1/65,536 of a pixel.
    x, y = (2 * np.arange(side, dtype=np.int64) - (side - 1) for side in (width, height))
    y = y[:, None]
    columns = _in_64ths(a * x + b * y, width, shift[0])
    rows = _in_64ths(c * x + d * y, height, shift[1])
    packed = np.full((height + 3, width + 3), _packed(np.full((1, 3), FILL, np.uint8))[0])
    packed[1:-2, 1:-2] = _packed(pixels)
    place = (rows >> 6) * (width + 3) + (columns >> 6) + (width + 4)
    right, down = (columns & 63).view(np.uint64), (rows & 63).view(np.uint64)
    left, up = np.uint64(64) - right, np.uint64(64) - down
    # In place as far as can be: fresh memory costs more than the arithmetic.
    seen, below = (_between(packed.ravel()[start:], place, left, right) for start in (0, width + 3))
    seen *= up
    below *= down
    seen += below
    seen += (np.uint64(1 << 11) << LANES).sum()
    made = np.empty_like(pixels)
    for channel, lane in enumerate(LANES):
        made[..., channel] = seen >> (lane + np.uint64(12))  # what is left of other lanes is cut off
    return made


def _between(flat: np.ndarray, place: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Packed pixels at `place` and behind it, times their weights."""
    seen, behind = flat.take(place), flat[1:].take(place)
    seen *= left
    behind *= right
    seen += behind
    return seen


def _in_64ths(products: np.ndarray, side: int, shift: int) -> np.ndarray:
    """Where a pixel looks along a side, in 1/64 of a pixel from the first one's centre; at most one pixel outside."""
    places = products + ((side - 1 << 15) + (shift << 16) + 512) >> 10
    return np.clip(places, -64, side * 64, out=places)


def _packed(pixels: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> (...) uint64, a channel in each lane."""
    red, green, blue = (pixels[..., channel].astype(np.uint64) << LANES[channel] for channel in range(3))
    return red | green | blue


def _by_tables(pixels: np.ndarray, table_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Each level replaced by its entry in the table of 256 of its channel, which is made of how often the channel has
    each level."""
    picture = Image.fromarray(pixels)
    counts = np.array(picture.histogram()).reshape(3, 256)
    return np.array(mapped(picture, np.concatenate([table_of(channel) for channel in counts]).tolist()))


class Operation(NamedTuple):
    """A row of the list."""

    name: str
    apply: Callable[[np.ndarray, int], np.ndarray]
    draw: Callable[[float, Size], int]  # a strength from -1 to 1, and (h, w) of the picture, to the amount
    least: int  # the smallest amount that can be applied
    most: int  # the largest


def _none(strength: float, size: Size) -> int:
    return 0


def _factor(strength: float, size: Size) -> int:
    return round(FACTOR * (1 + 0.9 * strength))


_FACTORS = (0, 2**15 - 1)
_SHEAR = {"draw": lambda strength, size: round(TURN * 0.3 * strength), "least": -(2**15), "most": 2**15 - 1}
_PIXELS = {"least": -(2**15), "most": 2**15 - 1}
LONGEST = 150 / 331  # of a side, what is translated at most

# By their number in a row on disk: never change the order, add at the end.
OPERATIONS = (
    Operation("identity", identity, _none, 0, 0),
    Operation("autocontrast", autocontrast, _none, 0, 0),
    Operation("equalize", equalize, _none, 0, 0),
    Operation("posterize", posterize, lambda strength, size: 8 - round(4 * abs(strength)), 1, 8),
    Operation("solarize", solarize, lambda strength, size: 256 - round(256 * abs(strength)), 0, 256),
    Operation("brightness", partial(factored, which=0), _factor, *_FACTORS),
    Operation("contrast", partial(factored, which=1), _factor, *_FACTORS),
    Operation("colour", partial(factored, which=2), _factor, *_FACTORS),
    Operation("sharpness", sharpness, _factor, *_FACTORS),
    Operation(
        "rotate", rotate, lambda strength, size: round(TURN * math.sin(math.radians(30 * strength))), -TURN, TURN - 1
    ),
    Operation("shear_x", shear_x, **_SHEAR),
    Operation("shear_y", shear_y, **_SHEAR),
    Operation("translate_x", translate_x, lambda strength, size: round(LONGEST * size[1] * strength), **_PIXELS),
    Operation("translate_y", translate_y, lambda strength, size: round(LONGEST * size[0] * strength), **_PIXELS),
)
