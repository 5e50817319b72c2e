"""views.py: golden bytes, an oracle in plain Python, and the statistics of what is drawn."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_dist.errors import DataError, RecipeError
from kd_dist.views import input_crc
from kd_dist.views.images import VIEW_DTYPE, ImageViews, replay, replay_mask, sample
from kd_dist.views.spectrograms import SpectrogramViews

draw, canonical = ImageViews.draw, ImageViews.canonical

POLICY = ImageViews((32, 24), (0.2, 1), (0.75, 1.333), flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, seed=7)

# View number -> (the bytes of the drawn record, the CRC of its pixels). Never change these: caches depend on them.
GOLDEN = {
    0: ("c86e953ff94d5d3f50d5a13f020006003a002e0001000000", 1650151681),
    1: ("77f1393f91899a3f657e1f3f0c0019002a00260001000000", 77285853),
    2: ("753b303fca58613fe1918b3f03000e003900390000000000", 1627723608),
    3: ("e67a983fed469d3f83c8a73f000022003800260001000000", 2574264110),
}
CANONICAL = ("0000803f0000803f0000803f000011003c002d0000000000", 2327480728)
# One parameter of the canonical view changed -> the CRC of its pixels.
SINGLE = {
    "flip": (1, 2525699426),
    "brightness": (1.5, 2177645188),
    "contrast": (1.5, 317185392),
    "saturation": (1.5, 3767154961),
}


def picture(rows: int = 60, columns: int = 80) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x * 3 % 256, y * 4 % 256, (x * y + 7 * x) % 256], axis=-1).astype(np.uint8)


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def view_of(rows: int, columns: int, **changes: float) -> np.void:
    """The whole image of rows x columns, with some fields changed."""
    view = canonical(ImageViews((rows, columns)), (rows, columns))
    for name, value in changes.items():
        view[name] = value
    return view


# ---------------------------------------------------------------------------------------------- golden bytes


def test_a_view_is_24_bytes_in_a_fixed_layout():
    layout = {name: (str(kind), offset) for name, (kind, offset) in VIEW_DTYPE.fields.items()}
    assert layout == {
        "brightness": ("float32", 0),
        "contrast": ("float32", 4),
        "saturation": ("float32", 8),
        "top": ("uint16", 12),
        "left": ("uint16", 14),
        "height": ("uint16", 16),
        "width": ("uint16", 18),
        "flip": ("uint8", 20),
    }
    assert VIEW_DTYPE.itemsize == 24 and VIEW_DTYPE.isalignedstruct


@pytest.mark.parametrize("number", GOLDEN)
def test_drawn_parameters_and_replayed_pixels_are_golden(number):
    view = draw(POLICY, "cats/1", number, (60, 80))
    assert (view.tobytes().hex(), input_crc(replay(picture(), view, POLICY.size))) == GOLDEN[number]


def test_the_canonical_view_is_golden():
    view = canonical(POLICY, (60, 80))
    assert (view.tobytes().hex(), input_crc(replay(picture(), view, POLICY.size))) == CANONICAL


@pytest.mark.parametrize("name", SINGLE)
def test_each_parameter_alone_is_golden(name):
    value, crc = SINGLE[name]
    view = canonical(POLICY, (60, 80))
    view[name] = value
    assert input_crc(replay(picture(), view, POLICY.size)) == crc


def test_a_fresh_process_draws_and_replays_the_same():
    script = (
        "import json\n"
        "from test_views import POLICY, draw, input_crc, noise, replay\n"
        "views = [draw(POLICY, 'cats/1', n, (91, 70)) for n in range(20)]\n"
        "print(json.dumps([[v.tobytes().hex(), input_crc(replay(noise(91, 70), v, POLICY.size))] for v in views]))\n"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    path = os.pathsep.join([os.path.dirname(here), here])
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    views = [draw(POLICY, "cats/1", n, (91, 70)) for n in range(20)]
    here = [[v.tobytes().hex(), input_crc(replay(noise(91, 70), v, POLICY.size))] for v in views]
    assert json.loads(done.stdout) == here


# ---------------------------------------------------------------------------------------------- replay


def test_the_identity_view_is_the_plain_image():
    image = noise(17, 23)
    pixels = replay(image, view_of(17, 23), (17, 23))
    assert np.array_equal(pixels, image)
    assert pixels is not image and not np.shares_memory(pixels, image)


@pytest.mark.parametrize("saturation", [1.0, 1.3])
def test_pixels_are_fresh_writable_and_contiguous(saturation):
    pixels = replay(noise(9, 12), view_of(9, 12, saturation=saturation, flip=1), (5, 7))
    assert pixels.shape == (5, 7, 3) and pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous and pixels.flags.writeable


def test_a_crop_without_a_resize_is_a_slice():
    image = noise(20, 30)
    pixels = replay(image, view_of(20, 30, top=3, left=11, height=8, width=9), (8, 9))
    assert np.array_equal(pixels, image[3:11, 11:20])


def test_size_is_rows_then_columns():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 4:] = 200
    pixels = replay(image, view_of(4, 8), (2, 6))
    assert pixels.shape == (2, 6, 3)
    assert (pixels[:, 0] == 0).all() and (pixels[:, -1] == 200).all()


def test_shrinking_averages_and_does_not_alias():
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    pixels = replay(np.repeat(board[..., None], 3, axis=2).astype(np.uint8), view_of(64, 64), (8, 8))
    assert abs(pixels.astype(int) - 127).max() <= 3


def test_two_flips_are_none():
    image, flipped = noise(6, 7), view_of(6, 7, flip=1)
    once = replay(image, flipped, (6, 7))
    assert np.array_equal(once, image[:, ::-1]) and not np.array_equal(once, image)
    assert np.array_equal(replay(once, flipped, (6, 7)), image)


def test_brightness_0_is_black_and_saturation_0_is_grey():
    image = noise(6, 7)
    assert not replay(image, view_of(6, 7, brightness=0), (6, 7)).any()
    grey = replay(image, view_of(6, 7, saturation=0), (6, 7))
    assert (grey == grey[..., :1]).all() and grey.std() > 0
    flat = replay(image, view_of(6, 7, contrast=0), (6, 7))
    assert len(np.unique(flat)) == 1


def rounded(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


def held(value: int) -> int:
    return min(255, max(0, value))


def luma(pixel: list[int]) -> int:
    red, green, blue = pixel
    return rounded(Fraction(19595 * red + 38470 * green + 7471 * blue, 65536))


def in_exact_numbers(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """What replay does to the colours, pixel by pixel in fractions, written from its docstring."""
    b, c, s = (Fraction(rounded(Fraction(x) * 65536), 65536) for x in (brightness, contrast, saturation))
    pixels = [[held(rounded(value * b)) for value in pixel] for pixel in image.reshape(-1, 3).tolist()]
    mean = rounded(Fraction(sum(map(luma, pixels)), len(pixels)))
    pixels = [[held(mean + rounded((value - mean) * c)) for value in pixel] for pixel in pixels]
    out = []
    for pixel in pixels:
        grey = luma(pixel)
        out.append([held(grey + rounded((value - grey) * s)) for value in pixel])
    return np.array(out, np.uint8).reshape(image.shape)


factors = st.floats(0, 2, width=32)


@given(factors, factors, factors, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_photometric_steps_equal_exact_arithmetic(brightness, contrast, saturation, seed):
    image = noise(5, 9, seed)
    view = view_of(5, 9, brightness=brightness, contrast=contrast, saturation=saturation)
    assert np.array_equal(replay(image, view, (5, 9)), in_exact_numbers(image, brightness, contrast, saturation))


def test_photometric_extremes_do_not_wrap():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0] = 255
    image[1, 0] = (255, 0, 0)
    for brightness in (0, 1, 2):
        view = view_of(2, 2, brightness=brightness, contrast=2, saturation=2)
        assert np.array_equal(replay(image, view, (2, 2)), in_exact_numbers(image, brightness, 2, 2))


@pytest.mark.parametrize(
    ("box", "named"),
    [
        ({"top": 4, "height": 7}, r"box of 7 x 12 pixels at row 4, column 0 is not inside the image of 10 x 12"),
        ({"left": 1}, r"box of 10 x 12 pixels at row 0, column 1 is not inside the image of 10 x 12"),
        ({"width": 0}, r"box of 10 x 0 pixels"),
        ({"height": 0}, r"box of 0 x 12 pixels"),
        ({"top": 65535, "height": 3}, r"box of 3 x 12 pixels at row 65535"),
        ({"left": 65535, "width": 65535}, r"column 65535 is not inside .* cache the teacher again"),
    ],
)
def test_a_box_outside_the_image_is_refused(box, named):
    with pytest.raises(DataError, match=named):
        replay(noise(10, 12), view_of(10, 12, **box), (4, 4))


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (np.zeros((4, 4), np.uint8), r"not uint8 \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"not uint8 \(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), r"not float32 \(4, 4, 3\)"),
    ],
)
def test_another_kind_of_image_is_refused(image, named):
    with pytest.raises(DataError, match=named):
        replay(image, view_of(4, 4), (4, 4))


def test_input_crc_is_of_the_bytes_in_row_order():
    pixels = np.frombuffer(b"123456789", np.uint8).reshape(1, 3, 3)
    assert input_crc(pixels) == 0xCBF43926  # the check value of CRC-32
    image = noise(4, 5)
    assert input_crc(image[:, ::-1]) == input_crc(image[:, ::-1].copy()) != input_crc(image)
    changed = image.copy()
    changed[3, 4, 2] ^= 1
    assert input_crc(changed) != input_crc(image)


# ---------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(("old", "new"), [(7, 7), (60, 21), (21, 60), (1, 5), (9, 1), (65535, 3), (5, 4)])
def test_a_sample_is_what_lies_under_the_centre(old, new):
    values = np.arange(old, dtype=np.uint16)
    expected = [math.floor(Fraction(2 * i + 1, 2) * old / new) for i in range(new)]
    assert sample(values[None], (1, new))[0].tolist() == expected
    assert sample(values[:, None], (new, 1))[:, 0].tolist() == expected


def test_the_mask_of_the_whole_view_is_the_mask():
    mask = noise(17, 23)[..., 0]
    seen = replay_mask(mask, view_of(17, 23), (17, 23))
    assert np.array_equal(seen, mask)
    assert seen is not mask and not np.shares_memory(seen, mask)


def blocks(rows: int, columns: int, side: int, seed: int) -> np.ndarray:
    """A mask of squares of 21 classes and 255, ignored."""
    classes = np.random.default_rng(seed).choice([*range(21), 255], (-(-rows // side), -(-columns // side)))
    return np.kron(classes, np.ones((side, side)))[:rows, :columns].astype(np.uint8)


@pytest.mark.parametrize("whole", [False, True])
def test_a_mask_moves_exactly_as_its_image(whole):
    """An image whose colour is its class: wherever a pixel of the view is of one colour, the mask says its class."""
    policy = ImageViews((40, 56), (0.1, 1), (0.5, 2), flip=0.5, whole=whole)
    agreed = flipped = 0
    for number in range(120):
        rows, columns = 90 + number % 37, 70 + number % 53
        mask = blocks(rows, columns, 24, number)
        view = draw(policy, "a", number, mask.shape)
        pixels = replay(np.stack([mask, 255 - mask, mask ^ 0b1010101], axis=-1), view, policy.size)
        seen = replay_mask(mask, view, policy.size)
        assert (seen.shape, seen.dtype) == (policy.size, np.uint8)
        assert seen.flags.c_contiguous and seen.flags.writeable
        assert set(np.unique(seen)) <= set(np.unique(mask))
        # Away from an edge a bilinear pixel has one colour, and so have its neighbours.
        around = np.lib.stride_tricks.sliding_window_view(seen, (5, 5)).reshape(36, 52, 25)
        flat = (around == around[..., :1]).all(axis=-1)
        assert np.array_equal(pixels[2:-2, 2:-2, 0][flat], seen[2:-2, 2:-2][flat])
        agreed, flipped = agreed + flat.sum(), flipped + view["flip"]
    assert agreed > 50_000 and 40 < flipped < 80


def test_edges_of_image_and_mask_are_at_the_same_place():
    """Half black, half white: the mask's edge is where the image crosses the middle, for every box and both flips."""
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 29:] = 255
    for left in range(29):
        for flip in (0, 1):
            view = view_of(64, 64, left=left, width=36, flip=flip)
            pixels = replay(np.repeat(mask[..., None], 3, axis=2), view, (8, 13))[..., 0]
            seen = replay_mask(mask, view, (8, 13))
            sure = abs(pixels.astype(int) - 127) > 8  # the antialiased pixel on the edge may be near the middle
            assert sure.mean() > 0.9
            assert np.array_equal((pixels > 127)[sure], (seen > 127)[sure])


def test_a_flipped_mask_is_the_mirror_image():
    mask = noise(6, 7)[..., 0]
    for size in ((6, 7), (4, 4), (13, 11)):
        plain, mirrored = (replay_mask(mask, view_of(6, 7, flip=flip), size) for flip in (0, 1))
        assert np.array_equal(mirrored, plain[:, ::-1]) and not np.array_equal(mirrored, plain)


def test_colours_do_not_touch_a_mask():
    mask = noise(6, 7)[..., 0]
    view = view_of(6, 7, brightness=0.5, contrast=1.5, saturation=0.2)
    assert np.array_equal(replay_mask(mask, view, (6, 7)), mask)


def test_a_mask_of_another_image_or_kind_is_refused():
    named = r"box of 10 x 12 pixels at row 0, column 0 is not inside the mask of 10 x 11; .* another mask: cache the"
    with pytest.raises(DataError, match=named):
        replay_mask(np.zeros((10, 11), np.uint8), view_of(10, 12), (4, 4))
    with pytest.raises(DataError, match="box of 0 x 12"):
        replay_mask(np.zeros((10, 12), np.uint8), view_of(10, 12, height=0), (4, 4))
    with pytest.raises(DataError, match=r"a mask must be uint8 \(H, W\), not int64 \(4, 4\); mend its decoder"):
        replay_mask(np.zeros((4, 4), np.int64), view_of(4, 4), (4, 4))
    with pytest.raises(DataError, match=r"not uint8 \(4, 4, 1\)"):
        replay_mask(np.zeros((4, 4, 1), np.uint8), view_of(4, 4), (4, 4))


# ---------------------------------------------------------------------------------------------- draw


def test_every_drawn_view_can_be_replayed_and_keeps_its_bounds():
    sizes = [(1, 1), (1, 400), (400, 1), (3, 5), (60, 80), (480, 640), (65535, 65535)]
    for image_size in sizes:
        for number in range(200):
            view = draw(POLICY, "a", number, image_size)
            assert 1 <= view["height"] <= image_size[0] and int(view["top"]) + view["height"] <= image_size[0]
            assert 1 <= view["width"] <= image_size[1] and int(view["left"]) + view["width"] <= image_size[1]
            assert view["flip"] in (0, 1)
            for name in ("brightness", "contrast", "saturation"):
                assert np.float32(0.6) <= view[name] <= np.float32(1.4)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_drawn_view_replays_on_its_image(rows, columns, seed, number):
    policy = replace(POLICY, seed=seed)
    assert replay(noise(rows, columns), draw(policy, "k", number, (rows, columns)), (4, 6)).shape == (4, 6, 3)


def many(policy: ImageViews, image_size: tuple[int, int], count: int = 4000) -> np.ndarray:
    return np.array([draw(policy, f"example{i}", i % 8, image_size) for i in range(count)], VIEW_DTYPE)


def test_area_ratio_and_place_are_drawn_as_promised():
    policy = ImageViews((224, 224), crop_scale=(0.1, 0.4), crop_ratio=(0.75, 1.333))
    views = many(policy, (4000, 4000))
    height, width = views["height"].astype(float), views["width"].astype(float)
    area = height * width / 4000**2
    assert 0.0999 < area.min() < 0.102 and 0.398 < area.max() < 0.4001
    assert abs(area.mean() - 0.25) < 0.005  # uniform: standard error of the mean 0.0014
    log_ratio = np.log(width / height)
    assert math.log(0.75) - 1e-3 < log_ratio.min() and log_ratio.max() < math.log(1.333) + 1e-3
    assert abs(log_ratio.mean()) < 0.01  # log-uniform and nearly symmetric: standard error 0.0026
    assert abs(log_ratio.std() - (math.log(1.333) - math.log(0.75)) / math.sqrt(12)) < 0.005
    for start, room in ((views["top"], 4000 - height), (views["left"], 4000 - width)):
        place = start / room
        assert 0 <= place.min() < 0.003 and 0.997 < place.max() <= 1
        assert abs(place.mean() - 0.5) < 0.02 and abs(place.std() - 1 / math.sqrt(12)) < 0.01


def test_both_ends_of_the_room_are_reached():
    policy = ImageViews((4, 4), crop_scale=(0.5, 0.5), crop_ratio=(1, 1))
    tops = many(policy, (4, 4), 300)["top"]
    assert set(tops.tolist()) == {0, 1}  # 4 x 4 pixels at half the area: a box of 3 x 3
    assert 110 < (tops == 0).sum() < 190


def test_factors_and_flips_are_drawn_as_promised():
    policy = ImageViews((8, 8), flip=0.3, brightness=0.5, contrast=1.0, saturation=0.0)
    views = many(policy, (8, 8))
    assert abs(views["flip"].mean() - 0.3) < 0.03
    assert 0.5 <= views["brightness"].min() < 0.502 and 1.498 < views["brightness"].max() <= 1.5
    assert 0 <= views["contrast"].min() < 0.003 and 1.997 < views["contrast"].max() <= 2
    assert abs(views["brightness"].mean() - 1) < 0.02
    assert (views["saturation"] == 1).all()
    drawn = np.stack([views["flip"], views["brightness"], views["contrast"]]).astype(float)
    assert abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.07  # independent: standard error 0.016


@pytest.mark.parametrize(("flip", "flipped"), [(0.0, 0), (1.0, 100)])
def test_a_certain_flip_is_certain(flip, flipped):
    assert many(ImageViews((8, 8), flip=flip), (8, 8), 100)["flip"].sum() == flipped


def test_keys_numbers_and_seeds_all_draw_differently():
    drawn = [
        draw(replace(POLICY, seed=seed), key, number, (500, 500)).tobytes()
        for seed in (0, 1, 2**40)
        for key in ("a", "b", "a/1", "1/a", "0/a", "")
        for number in (0, 1, 10)
    ]
    assert len(drawn) == 54 and len(set(drawn)) == 54
    assert draw(POLICY, "a", 0, (500, 500)).tobytes() == draw(POLICY, "a", 0, (500, 500)).tobytes()


def test_each_parameter_has_its_own_stream():
    before = draw(POLICY, "a", 0, (60, 80))
    after = draw(replace(POLICY, brightness=0.0, crop_scale=(1, 1)), "a", 0, (60, 80))
    assert after["brightness"] == 1 != before["brightness"]
    assert [after[name] for name in ("contrast", "saturation", "flip")] == [
        before[name] for name in ("contrast", "saturation", "flip")
    ]


# ---------------------------------------------------------------------------------------------- the centred box


def box_of(view: np.void) -> tuple[int, ...]:
    return tuple(int(view[name]) for name in ("top", "left", "height", "width"))


@pytest.mark.parametrize(
    ("size", "image_size", "box"),
    [
        ((8, 8), (8, 8), (0, 0, 8, 8)),
        ((8, 8), (10, 20), (0, 5, 10, 10)),
        ((8, 8), (20, 11), (4, 0, 11, 11)),
        ((10, 20), (100, 100), (25, 0, 50, 100)),
        ((20, 10), (100, 100), (0, 25, 100, 50)),
        ((2, 3), (100, 10), (46, 0, 7, 10)),
        ((3, 2), (10, 100), (0, 46, 10, 7)),
        ((1, 1000), (3, 4), (1, 0, 1, 4)),
        ((224, 224), (1, 1), (0, 0, 1, 1)),
        ((32, 24), (65535, 65535), (0, 8192, 65535, 49151)),
    ],
)
def test_the_canonical_view_is_the_largest_centred_box(size, image_size, box):
    view = canonical(ImageViews(size, (0.1, 0.2), flip=1.0, brightness=1.0, contrast=1.0, saturation=1.0), image_size)
    assert box_of(view) == box
    assert (view["brightness"], view["contrast"], view["saturation"], view["flip"]) == (1, 1, 1, 0)


def test_the_default_policy_draws_the_canonical_view():
    policy = ImageViews((8, 8))
    for image_size in ((8, 8), (480, 640), (641, 333)):
        expected = canonical(policy, image_size)
        assert all(draw(policy, "a", number, image_size) == expected for number in range(50))


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    policy = ImageViews((8, 8), crop_scale=(0.9, 0.95), crop_ratio=(1, 1))
    assert all(box_of(draw(policy, "a", number, (10, 100))) == (0, 45, 10, 10) for number in range(20))


@pytest.mark.parametrize("image_size", [(10, 20), (20, 11), (8, 8), (1, 400), (65535, 3)])
def test_the_canonical_view_may_be_the_whole_image(image_size):
    policy = ImageViews((8, 8), whole=True)
    view = canonical(policy, image_size)
    assert box_of(view) == (0, 0, *image_size)
    assert (view["brightness"], view["contrast"], view["saturation"], view["flip"]) == (1, 1, 1, 0)
    assert all(draw(policy, "a", number, image_size) == view for number in range(20))
    assert replay(np.zeros((*image_size, 3), np.uint8), view, policy.size).shape == (8, 8, 3)


def test_a_whole_policy_crops_as_any_other_and_falls_back_to_the_whole_image():
    for number in range(50):
        plain, whole = (draw(replace(POLICY, whole=one), "a", number, (500, 500)) for one in (False, True))
        assert plain == whole
    never = ImageViews((8, 8), crop_scale=(0.9, 0.95), crop_ratio=(1, 1), whole=True)
    assert all(box_of(draw(never, "a", number, (10, 100))) == (0, 0, 10, 100) for number in range(20))


def test_the_ratio_of_the_crop_is_relative_to_the_view():
    policy = ImageViews((100, 200), crop_scale=(0.1, 0.1), crop_ratio=(1, 1))
    for number in range(20):
        assert box_of(draw(policy, "a", number, (1000, 1000)))[2:] == (224, 447)  # 0.1 of the area, twice as wide


@pytest.mark.parametrize("image_size", [(0, 5), (5, 0), (65536, 5), (5, 65536)])
@pytest.mark.parametrize("crop_scale", [(1, 1), (0.5, 1)])
@pytest.mark.parametrize("whole", [False, True])
def test_an_image_without_views_is_refused(image_size, crop_scale, whole):
    policy = ImageViews((4, 4), crop_scale, whole=whole)
    named = f"{image_size[0]} x {image_size[1]} pixels has no views; each side must be from 1 to 65,535"
    with pytest.raises(DataError, match=named):
        draw(policy, "a", 0, image_size)
    with pytest.raises(DataError, match=named):
        canonical(policy, image_size)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"size": (0, 4)}, r"size must be at least 1 pixel on each side, not \(0, 4\)"),
        ({"crop_scale": (0, 1)}, r"crop_scale must be 0 < low <= high <= 1, not \(0, 1\)"),
        ({"crop_scale": (0.5, 0.4)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale"),
        ({"crop_scale": (math.nan, 1)}, "crop_scale"),
        ({"crop_ratio": (0, 1)}, r"crop_ratio must be 0 < low <= high, not \(0, 1\)"),
        ({"crop_ratio": (2, 1)}, "crop_ratio"),
        ({"crop_ratio": (1, math.inf)}, "crop_ratio"),
        ({"flip": 1.5}, "flip must be from 0 to 1, not 1.5"),
        ({"flip": -0.1}, "flip"),
        ({"brightness": 1.1}, "brightness must be from 0 to 1, not 1.1"),
        ({"contrast": -1}, "contrast must be from 0 to 1"),
        ({"saturation": math.nan}, "saturation must be from 0 to 1, not nan"),
    ],
)
def test_an_impossible_policy_is_refused(options, named):
    with pytest.raises(RecipeError, match=named):
        ImageViews(**{"size": (4, 4), **options})


# ---------------------------------------------------------------------------------------------- spectrograms

SOUND = SpectrogramViews((16, 24), gain=20, time_mask=9, band_mask=5, seed=7)
# View number -> (the bytes of the drawn record, the CRC of its levels). Never change these: caches depend on them.
GOLDEN_SOUND = {
    0: ("19000000140003000900090009000c0004000a0001000000", 1502701440),
    1: ("0b000000f7ff130002000e0008000c000400010000000000", 2006272519),
    2: ("200000000a00020000001200060008000200090002000000", 3238492976),
}


def spectrogram(mels: int = 16, frames: int = 60) -> np.ndarray:
    y, x = np.mgrid[:mels, :frames]
    return ((x * 7 + y * 11) % 256).astype(np.uint8)[..., None]


def test_a_view_of_a_spectrogram_is_24_bytes_in_a_fixed_layout():
    layout = {name: (kind.shape, str(kind.base), offset) for name, (kind, offset) in SOUND.dtype.fields.items()}
    assert layout == {
        "start": ((), "uint32", 0),
        "gain": ((), "int16", 4),
        "time": ((2, 2), "uint16", 6),
        "band": ((2, 2), "uint16", 14),
    }
    assert SOUND.dtype.itemsize == 24 and SOUND.dtype.isalignedstruct


@pytest.mark.parametrize("number", range(3))
def test_drawn_parameters_and_replayed_levels_are_golden(number):
    view = SOUND.draw("songs/1", number, (16, 60))
    assert (view.tobytes().hex(), input_crc(SOUND.replay(spectrogram(), view))) == GOLDEN_SOUND[number]


def test_views_of_spectrograms_fill_their_ranges():
    views = np.array([SOUND.draw("a", number, (16, 60)) for number in range(4000)], SOUND.dtype)
    assert set(views["start"]) == set(range(37)) and set(views["gain"]) == set(range(-20, 21))
    for name, widest, whole in (("time", 9, 24), ("band", 5, 16)):
        first, width = views[name][..., 0].astype(int), views[name][..., 1].astype(int)
        assert set(width.ravel()) == set(range(widest + 1))
        assert (first + width).max() == whole and first.min() == 0
        assert np.corrcoef(width.T)[0, 1] == pytest.approx(0, abs=0.06)  # the two masks know nothing of each other
    assert abs(np.mean(views["start"]) - 18) < 0.6 and abs(np.mean(views["gain"])) < 0.7


def test_a_parameter_of_a_spectrogram_leaves_the_others_as_they_were():
    whole, some = SOUND.draw("a", 3, (16, 60)), replace(SOUND, gain=0, band_mask=0).draw("a", 3, (16, 60))
    assert (some["start"], some["time"].tolist()) == (whole["start"], whole["time"].tolist())
    assert some["gain"] == 0 and not some["band"][:, 1].any()


def sound_view(**changes) -> np.void:
    view = SOUND.canonical((16, 60))
    for name, value in changes.items():
        view[name] = value
    return view


def test_the_canonical_view_is_the_unchanged_middle():
    assert np.array_equal(SOUND.replay(spectrogram(), sound_view()), spectrogram()[:, 18:42])


def test_a_gain_is_added_and_silence_stays_silent():
    image = spectrogram()
    for gain in (-20, 20, 255, -255):
        levels = SOUND.replay(image, sound_view(gain=gain)).astype(int)
        crop = image[:, 18:42].astype(int)
        assert np.array_equal(levels, np.where(crop == 0, 0, np.clip(crop + gain, 0, 255)))


def test_masks_are_silent_and_may_overlap():
    levels = SOUND.replay(spectrogram() | 1, sound_view(time=[[2, 3], [4, 4]], band=[[15, 1], [0, 0]]))
    silent = levels[..., 0] == 0
    assert silent[:, 2:8].all() and silent[15].all() and silent.sum() == 6 * 16 + 24 - 6


def test_a_recording_shorter_than_a_view_is_followed_by_silence():
    image = spectrogram(frames=10)
    for view in (SOUND.canonical((16, 10)), SOUND.draw("a", 0, (16, 10))):
        assert view["start"] == 0
    levels = SOUND.replay(image, SOUND.canonical((16, 10)))
    assert np.array_equal(levels[:, :10], image) and not levels[:, 10:].any()


def test_levels_are_fresh_writable_and_contiguous():
    image = spectrogram()
    levels = SOUND.replay(image, sound_view())
    assert levels.flags.c_contiguous and levels.flags.writeable and not np.shares_memory(levels, image)


@pytest.mark.parametrize(
    ("image", "changes", "problem"),
    [
        (spectrogram(8), {}, "a spectrogram of 8 mels has no views of 16"),
        (spectrogram()[..., 0].astype(np.float32)[..., None], {}, "a spectrogram must be uint8"),
        (spectrogram(frames=41), {}, "the view begins at frame 18 with a gain of 0 levels, the spectrogram has 41"),
        (spectrogram(), {"gain": 256}, "the view begins at frame 18 with a gain of 256 levels"),
    ],
)
def test_what_a_view_of_a_spectrogram_cannot_be_replayed_on(image, changes, problem):
    with pytest.raises(DataError, match=f"^{problem}"):
        SOUND.replay(image, sound_view(**changes))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"size": (0, 5)}, "size must be from 1 to 65535"),
        ({"size": (5, 65536)}, "size must be from 1 to 65535"),
        ({"gain": 256}, "gain must be from 0 to 255, not 256"),
        ({"time_mask": 25}, "time_mask must be from 0 to 24, not 25"),
        ({"band_mask": 17}, "band_mask must be from 0 to 16, not 17"),
    ],
)
def test_a_policy_of_spectrograms_that_cannot_be(changes, problem):
    with pytest.raises(RecipeError, match=f"^views: {problem}"):
        replace(SOUND, **changes)
