"""views/operations.py: every operation, hue and blur against plain Python, golden CRCs, and any parameters at all."""

import colorsys
import json
import math
import os
import subprocess
import sys
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from kd_dist.views.augmented import PASSES, blurred
from kd_dist.views.colours import HUES, hued
from kd_dist.views.operations import FACTOR, FILL, OPERATIONS, TURN, moved

BY_NAME = {one.name: one for one in OPERATIONS}
NAMES = [
    *("identity", "autocontrast", "equalize", "posterize", "solarize", "brightness", "contrast", "colour", "sharpness"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
]
# Name -> (amount, the CRC of what it makes of `picture()`). Never change these: caches depend on them.
GOLDEN = {
    "identity": (0, 1736802435),
    "autocontrast": (0, 3241281764),
    "equalize": (0, 1031832491),
    "posterize": (3, 466593907),
    "solarize": (100, 3601436343),
    "brightness": (9000, 705944137),
    "contrast": (22000, 3176029992),
    "colour": (26000, 463514415),
    "sharpness": (30000, 1043519256),
    "rotate": (-9000, 2653979726),
    "shear_x": (7000, 4100572922),
    "shear_y": (-6000, 559066872),
    "translate_x": (-5, 4135183515),
    "translate_y": (4, 550394164),
}


def picture(rows: int = 33, columns: int = 42) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x * 3 % 200 + 20, y * 7 % 256, (x * y + 7 * x) % 256], axis=-1).astype(np.uint8)


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def rounded(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def held(value: int) -> int:
    return min(255, max(0, value))


def luma(pixel: list[int]) -> int:
    return rounded(Fraction(19595 * pixel[0] + 38470 * pixel[1] + 7471 * pixel[2], 65536))


# ------------------------------------------------------------------------------------- the oracle, in plain Python


def by_channel(image: np.ndarray, table_of) -> np.ndarray:
    """Each channel through the table that `table_of` makes of its levels, a list."""
    out = image.copy()
    for channel in range(3):
        levels = image[..., channel].ravel().tolist()
        table = table_of(levels)
        out[..., channel] = np.array([table[level] for level in levels]).reshape(image.shape[:2])
    return out


def stretched(levels: list[int]) -> dict[int, int]:
    least, largest = min(levels), max(levels)
    if least == largest:
        return {least: least}
    return {level: rounded(Fraction(255 * (level - least), largest - least)) for level in levels}


def factors(image: np.ndarray, amount: int, what: str) -> np.ndarray:
    pixels, f = image.reshape(-1, 3).tolist(), Fraction(amount, FACTOR)
    mean = rounded(Fraction(sum(map(luma, pixels)), len(pixels)))
    centre = {"brightness": lambda pixel: 0, "contrast": lambda pixel: mean, "colour": luma}[what]
    out = [[held(centre(pixel) + rounded((level - centre(pixel)) * f)) for level in pixel] for pixel in pixels]
    return np.array(out, np.uint8).reshape(image.shape)


def boxed(line: list[int], radius: Fraction) -> list[int]:
    """One line through Pillow's box: weights of 24 bits, the last pixel repeated beyond the edge."""
    whole = int(radius)
    inner = int(np.float32(1 << 24) / np.float32(2 * radius + 1))  # the one quotient is that of 32-bit floats
    outer = ((1 << 24) - (2 * whole + 1) * inner) // 2
    at = lambda place: line[min(max(place, 0), len(line) - 1)]  # noqa: E731
    return [
        sum(at(place + step) for step in range(-whole, whole + 1)) * inner
        + (at(place - whole - 1) + at(place + whole + 1)) * outer
        + (1 << 23)
        >> 24
        for place in range(len(line))
    ]


def box_blurred(image: np.ndarray, radius: Fraction) -> np.ndarray:
    out = image.tolist()
    for channel in range(3):
        grid = [boxed([pixel[channel] for pixel in row], radius) for row in out]
        columns = [boxed([row[place] for row in grid], radius) for place in range(len(grid[0]))]
        for y, row in enumerate(out):
            for x, pixel in enumerate(row):
                pixel[channel] = columns[x][y]
    return np.array(out, np.uint8)


def sharpened(image: np.ndarray, amount: int) -> np.ndarray:
    mean = box_blurred(image, Fraction(1)).ravel().tolist()
    f = Fraction(amount, FACTOR)
    out = [held(m + rounded((level - m) * f)) for level, m in zip(image.ravel().tolist(), mean, strict=True)]
    return np.array(out, np.uint8).reshape(image.shape)


def looked_up(image: np.ndarray, matrix: list[Fraction], shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Bilinear at the matrix times each place from the centre, plus a shift in pixels."""
    height, width = image.shape[:2]
    out = np.zeros_like(image)
    a, b, c, d = matrix

    def level(y: int, x: int, channel: int) -> int:
        return int(image[y, x, channel]) if 0 <= y < height and 0 <= x < width else FILL

    for row in range(height):
        for column in range(width):
            x, y = column - Fraction(width - 1, 2), row - Fraction(height - 1, 2)
            across, along = a * x + b * y + Fraction(width - 1, 2), c * x + d * y + Fraction(height - 1, 2)
            left, right = divmod(rounded(64 * (across + shift[0])), 64)
            top, down = divmod(rounded(64 * (along + shift[1])), 64)
            for channel in range(3):
                near = [[level(top + i, left + j, channel) for j in (0, 1)] for i in (0, 1)]
                above, below = ((64 - right) * one + right * other for one, other in near)
                out[row, column, channel] = rounded(Fraction((64 - down) * above + down * below, 4096))
    return out


def turned(image: np.ndarray, amount: int) -> np.ndarray:
    sine, cosine = Fraction(amount, TURN), Fraction(math.isqrt(TURN**2 - amount**2), TURN)
    return looked_up(image, [cosine, sine, -sine, cosine])


ORACLES = {
    "identity": lambda image, amount: image,
    "autocontrast": lambda image, amount: by_channel(image, stretched),
    "equalize": lambda image, amount: np.asarray(ImageOps.equalize(Image.fromarray(image))),
    "posterize": lambda image, amount: by_channel(image, lambda _: [v >> 8 - amount << 8 - amount for v in range(256)]),
    "solarize": lambda image, amount: by_channel(image, lambda _: [255 - v if v >= amount else v for v in range(256)]),
    "brightness": lambda image, amount: factors(image, amount, "brightness"),
    "contrast": lambda image, amount: factors(image, amount, "contrast"),
    "colour": lambda image, amount: factors(image, amount, "colour"),
    "sharpness": sharpened,
    "rotate": turned,
    "shear_x": lambda image, amount: looked_up(image, [Fraction(1), Fraction(amount, TURN), Fraction(0), Fraction(1)]),
    "shear_y": lambda image, amount: looked_up(image, [Fraction(1), Fraction(0), Fraction(amount, TURN), Fraction(1)]),
    "translate_x": lambda image, amount: looked_up(image, [Fraction(n) for n in (1, 0, 0, 1)], (-amount, 0)),
    "translate_y": lambda image, amount: looked_up(image, [Fraction(n) for n in (1, 0, 0, 1)], (0, -amount)),
}


def test_the_list_has_a_fixed_order():
    assert [one.name for one in OPERATIONS] == NAMES == list(ORACLES) == list(GOLDEN)


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_golden(name):
    amount, crc = GOLDEN[name]
    assert zlib.crc32(np.ascontiguousarray(BY_NAME[name].apply(picture(), amount))) == crc


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25)
def test_every_operation_is_the_oracle(name, data):
    """Of any size, with any amount that the list allows, those that are drawn among them."""
    one = BY_NAME[name]
    size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    image = noise(*size, data.draw(st.integers(0, 2**32 - 1)))
    if data.draw(st.booleans()):
        image = image // 8 + 90  # few levels
    drawn = st.floats(-1, 1).map(lambda strength: one.draw(strength, size))
    amount = data.draw(st.one_of(st.integers(one.least, one.most), drawn))
    assert one.least <= amount <= one.most
    before, made = image.copy(), one.apply(image, amount)
    assert made.dtype == np.uint8 and made.shape == image.shape
    assert np.array_equal(image, before) and not np.shares_memory(made, image)
    assert np.array_equal(made, ORACLES[name](image, amount))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 5)])
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_amounts_are_within_the_list(name, size):
    one, image = BY_NAME[name], noise(*size)
    for strength in (-1.0, -0.5, 0.0, 0.5, 1.0):
        for place in (size, (65535, 65535)):
            assert one.least <= one.draw(strength, place) <= one.most
        assert one.apply(image, one.draw(strength, size)).shape == image.shape


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("autocontrast", "equalize")])
def test_no_strength_changes_nothing(name):
    one, image = BY_NAME[name], picture()
    assert np.array_equal(one.apply(image, one.draw(0.0, image.shape[:2])), image)


def test_where_things_go():
    image = np.zeros((9, 9, 3), np.uint8)
    image[2, 4] = 255  # above the centre
    quarter = round(TURN * math.sin(math.radians(30)))
    turned_right = BY_NAME["rotate"].apply(image, quarter)
    y, x = np.argwhere(turned_right[..., 0] == turned_right[..., 0][2:7, 2:7].max())[0]
    assert y <= 3 and x == 5  # clockwise
    assert BY_NAME["translate_x"].apply(image, 3)[2, 7, 0] == 255
    assert BY_NAME["translate_y"].apply(image, 3)[5, 4, 0] == 255
    assert (BY_NAME["translate_y"].apply(image, 3)[:3] == FILL).all()
    lower = np.roll(image, 4, axis=0)  # 2 below the centre
    assert BY_NAME["shear_x"].apply(lower, TURN // 2)[6, 3, 0] == 255  # by half of 2 to the left


def test_a_whole_turn_in_quarters_by_the_matrix_alone():
    image = picture(12, 12)
    quarter = moved(image, (0, TURN, -TURN, 0))
    assert np.array_equal(quarter, np.rot90(image, -1)) and np.array_equal(moved(quarter, (0, -TURN, TURN, 0)), image)


def in_hsv(pixel: list[int], amount: int) -> list[int]:
    """HSV and back, in fractions."""
    red, green, blue = pixel
    value, chroma = max(pixel), max(pixel) - min(pixel)
    if not chroma:
        return pixel
    if value == red:
        hue = Fraction(green - blue, chroma)
    elif value == green:
        hue = Fraction(blue - red, chroma) + 2
    else:
        hue = Fraction(red - green, chroma) + 4
    hue += Fraction(6 * amount, HUES)
    ramps = [min((offset + hue) % 6, 4 - (offset + hue) % 6) for offset in (5, 3, 1)]
    return [value - rounded(chroma * min(max(ramp, Fraction(0)), Fraction(1))) for ramp in ramps]


@given(st.integers(-(2**15), 2**15 - 1), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60)
def test_hue_is_that_of_hsv(amount, seed, few):
    image = noise(4, 11, seed) // (60 if few else 1)
    wanted = [in_hsv(pixel, amount) for pixel in image.reshape(-1, 3).tolist()]
    assert np.array_equal(hued(image, amount), np.array(wanted, np.uint8).reshape(image.shape))


def test_hue_is_that_of_colorsys_and_keeps_grey():
    image = noise(16, 16)
    for turn in (Fraction(1, 8), Fraction(1, 3), Fraction(-1, 4)):
        made = hued(image, round(turn * HUES)).reshape(-1, 3)
        for before, after in zip(image.reshape(-1, 3).tolist(), made.tolist(), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*(level / 255 for level in before))
            assert np.abs(np.array(colorsys.hsv_to_rgb((h + float(turn)) % 1, s, v)) * 255 - after).max() < 0.65
    red = np.full((1, 1, 3), (200, 10, 10), np.uint8)
    assert hued(red, HUES // 3).tolist() == [[[10, 200, 10]]] or abs(int(hued(red, HUES // 3)[0, 0, 1]) - 200) <= 1
    grey = np.repeat(noise(5, 5)[..., :1], 3, axis=2)
    assert np.array_equal(hued(grey, 1234), grey) and np.array_equal(hued(image, HUES), image)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 1500), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_a_blur_is_three_boxes_in_whole_numbers(rows, columns, radius, seed):
    image = wanted = noise(rows, columns, seed)
    for _ in range(PASSES):
        wanted = box_blurred(wanted, Fraction(radius, 256))
    assert np.array_equal(blurred(image, radius), wanted)


def test_a_fresh_process_makes_the_same_bytes():
    script = (
        "import json, zlib\n"
        "from test_operations import OPERATIONS, blurred, hued, noise\n"
        "image = noise(37, 29)\n"
        "made = [o.apply(image, o.draw(s / 4, (37, 29))) for o in OPERATIONS for s in range(-4, 5)]\n"
        "made += [hued(image, a) for a in range(-2048, 2049, 512)] + [blurred(image, r) for r in (1, 100, 700)]\n"
        "print(json.dumps([zlib.crc32(one.tobytes()) for one in made]))\n"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {**os.environ, "PYTHONHASHSEED": "777", "PYTHONPATH": os.pathsep.join([os.path.dirname(here), here])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    image = noise(37, 29)
    here = [one.apply(image, one.draw(step / 4, (37, 29))) for one in OPERATIONS for step in range(-4, 5)]
    here += [hued(image, a) for a in range(-2048, 2049, 512)] + [blurred(image, r) for r in (1, 100, 700)]
    assert json.loads(done.stdout) == [zlib.crc32(one.tobytes()) for one in here] and len(here) == 14 * 9 + 9 + 3
