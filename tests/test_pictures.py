"""views/pictures.py, and the fast ways from an encoded image to a view: each beside the plain one."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from kd_dist.inputs.images import Images
from kd_dist.views.colours import CHUNK, ONE, away
from kd_dist.views.images import VIEW_DTYPE, replay
from kd_dist.views.pictures import Picture, as_pillow
from kd_dist.views.resizing import BILINEAR

MODES = {"L": "PNG", "P": "PNG", "RGB": "JPEG", "RGBA": "PNG", "CMYK": "JPEG", "1": "PNG", "LA": "PNG"}


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, MODES[mode])
    return file.getvalue()


# ---------------------------------------------------------------------------------------------- the plain way


def moved(levels: np.ndarray, centres: np.ndarray | int, factor: float) -> np.ndarray:
    """Levels, in whole numbers of 64 bits, away from `centres`."""
    return np.clip(((levels - centres) * int(factor * ONE + 0.5) + ONE // 2 >> 16) + centres, 0, 255)


def luma(levels: np.ndarray) -> np.ndarray:
    return levels @ np.array([19595, 38470, 7471]) + ONE // 2 >> 16


def plainly(payload: bytes, view: np.void, size: tuple[int, int]) -> np.ndarray:
    """The view of an encoded image: everything a copy, a step at a time."""
    pixels = np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))
    brightness, contrast, saturation, top, left, height, width, flip = view.item()
    reach = math.ceil(max(1.0, height / size[0])) + 1
    first, last = max(0, top - reach), min(len(pixels), top + height + reach)
    picture = Image.fromarray(pixels).crop((0, first, pixels.shape[1], last))
    across = picture.resize((size[1], last - first), BILINEAR, box=(left, 0, left + width, last - first))
    levels = np.asarray(
        across.resize(size[::-1], BILINEAR, box=(0, top - first, size[1], top - first + height)), np.int64
    )
    levels = moved(levels[:, ::-1] if flip else levels, 0, brightness)
    levels = moved(levels, math.floor(luma(levels).mean() + 0.5), contrast)
    return moved(levels, luma(levels)[..., None], saturation).astype(np.uint8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[bytes, np.void, tuple[int, int]]:
    """An encoded image of any mode and shape, a view of it, and the size that it is brought to."""
    rows, columns = draw(st.sampled_from([(1, 1), (1, 300), (300, 1), (40, 57), (133, 90), (200, 9)]))
    top, left = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
    box = top, left, draw(st.integers(1, rows - top)), draw(st.integers(1, columns - left))
    factors = [draw(st.one_of(st.just(1.0), st.floats(0, 2, width=32))) for _ in range(3)]
    view = np.array((*factors, *box, draw(st.integers(0, 1))), VIEW_DTYPE)[()]
    size = draw(st.sampled_from([(1, 1), (24, 32), (7, 90), (160, 170)]))
    return encoded(noise(rows, columns, draw(st.integers(0, 99))), draw(st.sampled_from(list(MODES)))), view, size


LARGE = encoded(noise(60, 80)), np.array((1.25, 0.7, 1.6, 5, 6, 50, 61, 1), VIEW_DTYPE)[()], (160, 170)


@given(cases())
@example(LARGE)
@settings(max_examples=150, deadline=None)
def test_a_view_has_the_bytes_of_the_plain_way(case):
    payload, view, size = case
    picture, wanted = Images().decode({"png": payload}), plainly(*case)
    assert np.array_equal(replay(picture, view, size), wanted)
    assert np.array_equal(replay(np.asarray(picture), view, size), wanted)


def test_the_large_view_is_of_several_chunks():
    assert CHUNK < 160 * 170 * 3


@pytest.mark.parametrize("fixed", [0, 1, 12345, ONE // 2, ONE - 1, ONE, ONE + 1, 99999, 2 * ONE - 1, 2 * ONE])
def test_every_level_moves_from_every_centre_as_in_whole_numbers(fixed):
    levels, centres = np.indices((256, 256)).astype(np.uint8)
    wanted = moved(levels.astype(np.int64), centres.astype(np.int64), fixed / ONE)
    assert np.array_equal(away(levels, centres, fixed / ONE), wanted)


def test_pixels_that_do_not_lie_together_move_too():
    pixels = noise(30, 40)
    assert np.array_equal(away(pixels[::2, ::-1], pixels[1::2], 0.3), away(pixels[::2, ::-1].copy(), pixels[1::2], 0.3))


# ---------------------------------------------------------------------------------------------- as an array


def test_a_picture_is_an_array_to_everyone_else():
    pixels = noise(5, 7)
    picture = Picture(Image.fromarray(pixels))
    assert (picture.shape, picture.dtype, picture.ndim, picture.size) == (pixels.shape, pixels.dtype, 3, pixels.size)
    assert np.array_equal(picture, pixels) and picture.tobytes() == pixels.tobytes()
    assert np.array_equal(picture[1:3, ::2], pixels[1:3, ::2]) and picture.mean() == pixels.mean()
    assert np.array_equal(np.asarray(Image.fromarray(picture)), pixels)
    changed = picture.copy()
    changed[0, 0] ^= 1  # its own, which may be written to
    assert np.array_equal(picture, pixels) and not np.array_equal(changed, pixels)
    for same in (copy.copy(picture), copy.deepcopy(picture), pickle.loads(pickle.dumps(picture))):
        assert np.array_equal(same, pixels)
    with pytest.raises(AttributeError, match="nothing"):
        _ = picture.nothing


def test_nothing_is_copied_on_the_way_to_pillow():
    image = Image.fromarray(noise(5, 7))
    assert as_pillow(Picture(image)) is image
    assert np.array_equal(np.asarray(as_pillow(noise(5, 7))), noise(5, 7))


def test_a_decoded_picture_lets_its_bytes_go():
    assert getattr(Images().decode({"jpg": encoded(noise(5, 7))}).image, "fp", None) is None
