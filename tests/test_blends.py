"""views/blends.py: golden bytes, the mask against a plain point-in-polygon test, what each parameter does."""

import json
import subprocess
import sys
import zlib
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.spatial import ConvexHull

from kd_dist.errors import DataError
from kd_dist.views.blends import BLEND_DTYPE, CORNERS, MASK, SIDE, as_json, blend, blended, draw_blend, mask
from kd_dist.views.chance import uniform
from kd_dist.views.pictures import Picture
from kd_dist.views.resizing import resized

SIZE = (90, 70)
# Number -> CRC of the record's bytes, CRC of the pixels. Never change these: caches depend on them.
GOLDEN = {
    0: (1642025824, 3631540020),
    1: (1900420104, 1176780992),
    2: (3994352226, 3013228042),
    3: (1603455889, 4177804704),
}


def chance(number: int = 0, seed: int = 0) -> partial:
    return partial(uniform, seed, "face", number)


def picture(rows: int = SIZE[0], columns: int = SIZE[1]) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x * 3 % 256, y * 2 % 256, (x * y + 7 * x) % 256], axis=-1).astype(np.uint8)


def untouched(size: tuple[int, int] = SIZE) -> np.void:
    """A blend that changes nothing: neither colour nor detail nor place, seen all over."""
    made = np.zeros((), BLEND_DTYPE)
    for name in ("brightness", "contrast", "saturation"):
        made[name] = 1
    made["resized"] = made["shrunk"] = size
    made["corners"][:] = SIDE - 1, 0
    made["corners"][:4] = [(0, 0), (0, SIDE - 1), (SIDE - 1, SIDE - 1), (SIDE - 1, 0)]
    made["threshold"], made["ratio"] = 1, 255
    return made[()]


def landmarks(count: int, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).uniform((15, 20), (55, 75), (count, 2)).tolist()


def test_a_blend_is_172_bytes_in_a_fixed_layout():
    assert BLEND_DTYPE.itemsize == 172
    assert [(name, offset) for name, (_, offset) in BLEND_DTYPE.fields.items()] == [
        ("brightness", 0),
        ("contrast", 4),
        ("saturation", 8),
        ("corners", 12),
        ("place", 76),
        ("resized", 80),
        ("shrunk", 84),
        ("grid", 88),
        ("rgb", 160),
        ("sharpened", 163),
        ("changes_source", 164),
        ("blur", 165),
        ("threshold", 167),
        ("ratio", 168),
    ]


@pytest.mark.parametrize("number", GOLDEN)
def test_drawn_parameters_and_blended_pixels_are_golden(number):
    points = landmarks(68) if number % 2 else None
    drawn = draw_blend(chance(number), SIZE, points)
    assert (zlib.crc32(drawn.tobytes()), zlib.crc32(blend(picture(), drawn))) == GOLDEN[number]


def test_a_fresh_process_blends_the_same_from_the_stored_bytes():
    drawn = draw_blend(chance(5), SIZE)
    code = (
        "import sys, zlib, numpy as np; from kd_dist.views.blends import BLEND_DTYPE, blend\n"
        "y, x = np.mgrid[:90, :70]\n"
        "image = np.stack([x * 3 % 256, y * 2 % 256, (x * y + 7 * x) % 256], axis=-1).astype(np.uint8)\n"
        f"record = np.frombuffer(bytes.fromhex('{drawn.tobytes().hex()}'), BLEND_DTYPE)[0]\n"
        "print(zlib.crc32(blend(image, record)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(zlib.crc32(blend(picture(), drawn))), done.stderr


def plainly_changed(image: np.ndarray, parameters: np.void) -> np.ndarray:
    """The copy of other colours and detail, a step at a time in whole numbers."""

    def moved(levels, centres, factor: float) -> np.ndarray:
        return np.clip(((levels - centres) * int(factor * 65536 + 0.5) + 32768 >> 16) + centres, 0, 255)

    def grey(levels: np.ndarray) -> np.ndarray:
        return levels @ np.array([19595, 38470, 7471]) + 32768 >> 16

    brightness, contrast, saturation, sharpened = (
        parameters[name].item() for name in ("brightness", "contrast", "saturation", "sharpened")
    )
    levels = moved(image.astype(np.int64), 0, brightness)
    levels = moved(levels, int(grey(levels).mean() + 0.5), contrast)
    levels = moved(levels, grey(levels)[..., None], saturation)
    shift = parameters["rgb"].astype(np.int64)
    levels += shift.sum() // 3 if (levels == levels[..., :1]).all() else shift
    pixels = np.clip(levels, 0, 255).astype(np.uint8)
    rows, columns = parameters["shrunk"].tolist()
    if (rows, columns) != image.shape[:2]:
        small = resized(Image.fromarray(pixels), (columns, rows))
        return np.asarray(resized(small, image.shape[1::-1]))
    mean = np.asarray(Image.fromarray(pixels).filter(ImageFilter.BoxBlur(1)), np.int64)
    return np.clip(pixels + ((pixels - mean) * sharpened + 8 >> 4), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("is_grey", [False, True])
def test_the_changed_copy_is_that_of_the_plain_way(is_grey):
    """Seen all over, as the source that is neither moved nor resized."""
    size, sharp = (150, 160), 0
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image = np.repeat(image[..., :1], 3, axis=2) if is_grey else image
    for number in range(12):
        drawn, parameters = draw_blend(chance(number), size), untouched(size)
        for name in ("brightness", "contrast", "saturation", "rgb", "sharpened", "shrunk"):
            parameters[name] = drawn[name]
        parameters["changes_source"] = 1
        wanted = plainly_changed(image, parameters)
        assert np.array_equal(blend(image, parameters), wanted)
        assert np.array_equal(blended(Picture(Image.fromarray(image)), parameters), wanted)
        sharp += bool(drawn["sharpened"])
    assert 0 < sharp < 12


def test_a_blend_that_changes_nothing_is_the_image():
    image = picture()
    made = blend(image, untouched())
    assert np.array_equal(made, image) and made is not image and made.flags.writeable


@pytest.mark.parametrize("which", [0, 1])
def test_within_the_mask_the_source_is_seen_and_outside_the_target(which):
    """The left half, sharply; one copy is brighter by 10 levels."""
    given = untouched()
    given["corners"][:4] = [(0, 0), (0, SIDE - 1), (SIDE // 2, SIDE - 1), (SIDE // 2, 0)]
    given["corners"][4:] = SIDE // 2, 0
    given["rgb"], given["changes_source"] = 10, which
    image = np.full((MASK, MASK, 3), (100, 110, 120), np.uint8)
    given["resized"] = given["shrunk"] = MASK
    made = blend(image, given).astype(int) - image
    inside, outside = made[:, : MASK // 2], made[:, MASK // 2 :]
    assert (inside == 10 * which).all() and (outside == 10 * (1 - which)).all()


@pytest.mark.parametrize("ratio", [64, 128, 191, 255])
def test_the_ratio_is_how_much_of_the_source_is_seen(ratio):
    given = untouched()
    given["rgb"], given["changes_source"], given["ratio"] = 20, 1, ratio
    image = np.full((*SIZE, 3), (100, 110, 121), np.uint8)
    middle = blend(image, given)[20:-20, 20:-20].astype(int) - image[20:-20, 20:-20]
    assert np.abs(middle - 20 * ratio / 255).max() <= 0.51


def test_a_grey_image_stays_grey_and_a_coloured_one_is_tinted():
    tinted = 0
    for number in range(20):
        drawn = draw_blend(chance(number), SIZE)
        grey = np.repeat(picture()[..., :1], 3, axis=2)
        made = blend(grey, drawn)
        assert (made[..., 0] == made[..., 1]).all() and (made[..., 1] == made[..., 2]).all()
        seen = blend(np.full((*SIZE, 3), (100, 110, 120), np.uint8), drawn).astype(int)
        tinted += bool((np.diff(seen, axis=2) != 10).any())
    assert tinted >= 15


def test_the_source_is_moved_and_resized_in_place():
    given = untouched()
    given["place"], given["resized"] = (3, -2), SIZE
    image = picture()
    made = blend(image, given)
    assert np.array_equal(made[3:, :-2], image[:-3, 2:])
    assert np.array_equal(made[:3], image[:3]) and np.array_equal(made[:, -2:], image[:, -2:])


def test_detail_is_lost_or_exaggerated():
    image, given = picture(), untouched()
    given["changes_source"] = 1
    edges = np.abs(np.diff(image.astype(int), axis=1)).mean()
    given["shrunk"] = SIZE[0] // 4, SIZE[1] // 4
    assert np.abs(np.diff(blend(image, given).astype(int), axis=1)).mean() < 0.7 * edges
    given["shrunk"], given["sharpened"] = SIZE, 16
    sharp = blend(image, given).astype(int)
    mean = np.asarray(Image.fromarray(image)).astype(int)
    inner = sum(np.roll(mean, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))[1:-1, 1:-1] / 9
    wanted = np.clip(2 * mean[1:-1, 1:-1] - inner, 0, 255)
    assert np.abs(sharp[1:-1, 1:-1] - wanted).max() <= 1


def test_the_mask_is_the_polygon_by_a_plain_test():
    drawn = draw_blend(chance(3), SIZE, landmarks(30)).copy()
    drawn["grid"], drawn["blur"], drawn["threshold"], drawn["ratio"] = 0, 0, 128, 255
    corners, made = drawn["corners"].tolist(), np.asarray(mask(drawn[()]))

    def inside(x: int, y: int) -> bool:
        """Whether a ray to the right crosses the edges an odd number of times."""
        crossings = 0
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            crossings += (ay > y) != (by > y) and x < (bx - ax) * (y - ay) / (by - ay) + ax
        return crossings % 2 == 1

    centre = SIDE // MASK
    wanted = [[inside(x * centre + centre // 2, y * centre + centre // 2) for x in range(MASK)] for y in range(MASK)]
    assert set(np.unique(made)) == {0, 255}
    assert (np.array(wanted) != (made == 255)).mean() < 0.001 and 500 < np.sum(wanted) < 12_000


def test_the_grid_displaces_the_mask_smoothly():
    drawn = untouched().copy()
    drawn["corners"][:3] = [(SIDE // 4, SIDE // 4), (SIDE // 4, 3 * SIDE // 4), (3 * SIDE // 4,) * 2]
    drawn["corners"][3:] = 3 * SIDE // 4, SIDE // 4
    plain = np.asarray(mask(drawn[()]))
    drawn["grid"][..., 0] = 64  # 64 of 1,024ths of a side, everywhere, to the right: what is seen moves to the left
    moved = np.asarray(mask(drawn[()]))
    assert np.array_equal(moved[:, : -MASK // 16], plain[:, MASK // 16 :])
    drawn["grid"][..., 0] = 0
    drawn["grid"][:3, :, 1] = 32
    bent = np.asarray(mask(drawn[()]))
    assert (bent != plain).any() and np.array_equal(bent[MASK // 2 + 13 :], plain[MASK // 2 + 13 :])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([None, 1, 2, 3, 5, 30, 68, 81]), st.integers(1, 300), st.integers(1, 300))
def test_every_drawn_blend_is_a_soft_convex_mask_within_the_image(number, count, rows, columns):
    points = None
    if count is not None:
        points = (np.random.default_rng(number).uniform(-0.1, 1.1, (count, 2)) * (columns, rows)).tolist()
    drawn = draw_blend(chance(number), (rows, columns), points)
    assert drawn.tobytes() == draw_blend(chance(number), (rows, columns), points).tobytes()
    corners = np.unique(drawn["corners"].astype(int), axis=0)
    assert 3 <= len(corners) <= CORNERS and len(ConvexHull(corners).vertices) >= 3
    made = blend(np.random.default_rng(0).integers(0, 256, (rows, columns, 3), np.uint8), drawn)
    assert made.shape == (rows, columns, 3) and made.dtype == np.uint8
    assert np.asarray(mask(drawn)).max() <= drawn["ratio"]
    again = json.loads(json.dumps(as_json(drawn)))
    copy = np.zeros((), BLEND_DTYPE)
    for name, value in again.items():
        copy[name] = value
    assert copy.tobytes() == drawn.tobytes()


def test_what_is_drawn_has_the_spread_that_is_meant():
    drawn = np.array([draw_blend(chance(number), SIZE) for number in range(2000)], BLEND_DTYPE)
    assert drawn["rgb"].min() == -20 and drawn["rgb"].max() == 20 and abs(drawn["rgb"].mean()) < 1
    assert 0.45 < drawn["changes_source"].mean() < 0.55
    assert 0.45 < (drawn["shrunk"][:, 0] < SIZE[0]).mean() < 0.55
    assert ((drawn["sharpened"] > 0) == (drawn["shrunk"][:, 0] == SIZE[0])).all()
    shares = {ratio: (drawn["ratio"] == ratio).mean() for ratio in (64, 128, 191, 255)}
    assert all(0.13 < shares[ratio] < 0.2 for ratio in (64, 128, 191)) and 0.45 < shares[255] < 0.55
    assert drawn["grid"].min() == -32 and drawn["grid"].max() == 32
    for axis, side in enumerate(SIZE):
        assert 0.94 * side < drawn["resized"][:, axis].min() and drawn["resized"][:, axis].max() < 1.06 * side


def test_landmarks_of_a_whole_face_give_masks_of_its_parts():
    """68 of them: the jaw's line below, nose and mouth in the middle; masks reach as far as what they cover."""
    points = np.tile((35.0, 40.0), (68, 1))
    points[:17] = [(20 + 30 * step / 16, 60 + 20 * np.sin(np.pi * step / 16)) for step in range(17)]
    points[17:27] = [(24 + 22 * step / 9, 14) for step in range(10)]
    points[27:48] = [(24 + step % 22, 28 + step % 17) for step in range(21)]
    points[48:68] = [(26 + step % 18, 55 + step % 4) for step in range(20)]
    lowest = set()
    for number in range(40):
        corners = draw_blend(chance(number), SIZE, points.tolist())["corners"]
        lowest.add(round(corners[:, 1].max() / (SIDE - 1) * SIZE[0]))
    assert lowest == {80, 58, 44}  # all; without the jaw's line, and nose and mouth; brows and eyes


@pytest.mark.parametrize("count", [3, 5, 68])
@pytest.mark.parametrize("share", [0.001, 0.05, 0.15, 0.3])
def test_a_small_or_thin_face_has_a_mask_that_is_seen(count, share):
    """Else a fake would be its real image, byte for byte."""
    given, image = np.random.default_rng(count), np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    for number in range(60):
        points = (given.uniform(0.3, 0.7, 2) + given.uniform(0, 1, (count, 2)) * (share, 0.4)) * SIZE[::-1]
        drawn = draw_blend(chance(number), SIZE, points.tolist())
        assert (np.asarray(mask(drawn)) > drawn["ratio"] / 2).mean() >= 0.01
        assert (blend(image, drawn) != image).mean() > 0.005


FAR = [[1e308, 1]] * 3


@pytest.mark.parametrize("wrong", [[[1, 2, 3]], ["nose"], [[1, None]], [[float("nan"), 1]], FAR, 7, [[1], [2, 3]]])
def test_landmarks_that_are_none_are_refused(wrong):
    with pytest.raises(DataError, match="landmarks are no list of pairs of numbers"):
        draw_blend(chance(), SIZE, wrong)


def test_another_image_than_it_was_drawn_for_is_refused():
    drawn = draw_blend(chance(), SIZE)
    for size in ((40, 30), (200, 300)):
        with pytest.raises(DataError, match=f"do not fit an image of {size[0]} x {size[1]} pixels"):
            blend(picture(*size), drawn)
    damaged = drawn.copy()
    damaged["brightness"] = np.nan
    with pytest.raises(DataError, match="do not fit"):
        blend(picture(), damaged[()])


def test_landmarks_on_a_line_fall_back_on_the_middle_of_the_image():
    line = [[10.0 + step, 20.0] for step in range(12)]
    assert np.array_equal(draw_blend(chance(1), SIZE, line)["corners"], draw_blend(chance(1), SIZE)["corners"])
