"""views/augmented.py: golden bytes, the order of what is done, the spread of what is drawn, any parameters at all."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kd_dist import assemble, caches, policies
from kd_dist.config import load
from kd_dist.errors import DataError, RecipeError
from kd_dist.views import VIEW_DTYPES, ImageViews, input_crc
from kd_dist.views.augmented import AUGMENTED_DTYPE, MOST_OPERATIONS, AugmentedViews, augmented, blurred
from kd_dist.views.colours import hued
from kd_dist.views.images import replay_mask
from kd_dist.views.operations import OPERATIONS

POLICY = AugmentedViews(
    (32, 24),
    (0.2, 1),
    flip=0.5,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    seed=7,
    operations=2,
    magnitude=(0.1, 0.9),
    hue=0.1,
    blur=0.5,
    erase=0.5,
)
PLAIN = ImageViews(**{one.name: getattr(POLICY, one.name) for one in fields(ImageViews)})
# View number -> (the bytes of the drawn record, the CRC of its pixels). Never change these: caches depend on them.
GOLDEN = {
    0: (
        "c86e953ff94d5d3f50d5a13f020006003a002e000100000007000500000026ff00000000000000000000030d005f2fde",
        2702921,
    ),
    1: (
        "77f1393f91899a3f657e1f3f0c0019002a00260001000000551206000000710000000e000f000e0009000b0300a0316a",
        1772095881,
    ),
    2: (
        "753b303fca58613fe1918b3f03000e003900390000000000fbffd745000084ff0e000c000800100006000c05009507c5",
        1097393357,
    ),
    3: (
        "e67a983fed469d3f83c8a73f000022003800260001000000000079260000970100000c000d0014000900010900d8abb4",
        2215896104,
    ),
    4: (
        "96617e3f11dd3f3f6cc6673f02001d0039002200000000005950060000003e0151010000000000000000070300a293c2",
        4292803675,
    ),
    5: (
        "a09ead3f6dee553fca66273f0100220036002a000000000008000000000006011d0000000000000000000c0000a81c0f",
        3806842809,
    ),
}


def picture(rows: int = 60, columns: int = 80) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x * 3 % 256, y * 4 % 256, (x * y + 7 * x) % 256], axis=-1).astype(np.uint8)


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def view_of(**changes: object) -> np.void:
    """The canonical view of `picture()`, with more done to it."""
    view = POLICY.canonical((60, 80)).copy()
    for name, value in changes.items():
        view[name] = value
    return view[()]


def test_a_view_is_48_bytes_in_a_fixed_layout():
    layout = {name: (kind.shape, str(kind.base), offset) for name, (kind, offset) in AUGMENTED_DTYPE.fields.items()}
    assert layout.pop("view")[2] == 0 and AUGMENTED_DTYPE["view"] == VIEW_DTYPES["image"]
    assert layout == {
        "amounts": ((3,), "int16", 24),
        "hue": ((), "int16", 30),
        "blur": ((), "uint16", 32),
        "erased": ((4,), "uint16", 34),
        "operations": ((3,), "uint8", 42),
        "colour": ((3,), "uint8", 45),
    }
    assert AUGMENTED_DTYPE.itemsize == 48 and VIEW_DTYPES["augmented"] == AUGMENTED_DTYPE
    assert VIEW_DTYPES["image"].itemsize == 24


@pytest.mark.parametrize("number", range(6))
def test_drawn_parameters_and_replayed_pixels_are_golden(number):
    view = POLICY.draw("cats/1", number, (60, 80))
    assert (view.tobytes().hex(), input_crc(POLICY.replay(picture(), view))) == GOLDEN[number]


def test_another_process_replays_stored_views_from_their_bytes_alone(tmp_path):
    views = [POLICY.draw("cats/1", number, (60, 80)) for number in range(80)]
    assert {number for view in views for number in view["operations"].tolist()} == set(range(len(OPERATIONS)))
    assert sum(bool(view["blur"]) for view in views) > 20 < sum(bool(view["erased"][2]) for view in views)
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    code = (
        "import json, sys, numpy as np\nfrom PIL import Image\nfrom kd_dist.views import input_crc\n"
        "from kd_dist.views.augmented import AUGMENTED_DTYPE, AugmentedViews\n"
        f"views = np.frombuffer(bytes.fromhex('{b''.join(view.tobytes() for view in views).hex()}'), AUGMENTED_DTYPE)\n"
        "image, policy = np.asarray(Image.open('picture.png')), AugmentedViews((32, 24), seed=99)\n"
        "print(json.dumps([input_crc(policy.replay(image, view)) for view in views]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == [input_crc(POLICY.replay(picture(), view)) for view in views], done.stderr


def test_the_order_is_the_plain_view_then_hue_operations_blur_and_erasing():
    for number in range(60):
        view = POLICY.draw("a", number, (60, 80))
        pixels = PLAIN.replay(picture(), view["view"])
        pixels = hued(pixels, int(view["hue"]))
        for one, amount in zip(view["operations"].tolist(), view["amounts"].tolist(), strict=True):
            pixels = OPERATIONS[one].apply(pixels, amount)
        pixels = blurred(pixels, int(view["blur"])) if view["blur"] else pixels
        top, left, height, width = view["erased"].tolist()
        for row in range(top, top + height):
            for column in range(left, left + width):
                pixels[row, column] = view["colour"]
        made = POLICY.replay(picture(), view)
        assert np.array_equal(made, pixels)
        assert made.flags.c_contiguous and made.flags.writeable


def test_a_view_to_which_nothing_is_done_is_the_plain_one():
    assert np.array_equal(POLICY.replay(picture(), view_of()), PLAIN.replay(picture(), PLAIN.canonical((60, 80))))
    nothing = AugmentedViews(**vars(PLAIN))
    for number in range(20):
        view = nothing.draw("a", number, (60, 80))
        assert view["view"].tobytes() == PLAIN.draw("a", number, (60, 80)).tobytes()
        assert not any(view.tobytes()[24:])
        assert POLICY.draw("a", number, (60, 80))["view"].tobytes() == view["view"].tobytes()


def test_what_is_drawn_has_the_spread_that_is_meant():
    views = np.array([POLICY.draw("a", number, (60, 80)) for number in range(4000)], AUGMENTED_DTYPE)
    counts = Counter(views["operations"][:, :2].ravel().tolist())
    assert set(counts) == set(range(14)) and all(8000 / 14 * 0.8 < many < 8000 / 14 * 1.2 for many in counts.values())
    assert not views["operations"][:, 2].any() and not views["amounts"][:, 2].any()
    assert np.corrcoef(views["operations"][:, :2].T)[0, 1] == pytest.approx(0, abs=0.06)
    assert views["hue"].min() == pytest.approx(-410, abs=3) and views["hue"].max() == pytest.approx(410, abs=3)
    shown = views["blur"] > 0
    assert 0.44 < shown.mean() < 0.52  # some are so narrow that they round to none
    assert 0 < views["blur"].max() <= round(256 * (17**0.5 - 1) / 2)
    top, left, height, width = views["erased"].astype(int).T
    assert 0.46 < (height > 0).mean() < 0.54
    assert (top + height).max() == 32 and (left + width).max() == 24 and min(top.min(), left.min()) == 0
    area = (height * width)[height > 0] / (32 * 24)
    assert area.min() < 0.04 and 0.3 < area.max() < 0.36
    assert views["colour"].min() == 0 and views["colour"].max() == 255
    turns = views["amounts"][:, 0][views["operations"][:, 0] == 9]
    assert turns.min() < -12_000 and turns.max() > 12_000 and np.abs(turns).min() > 1000  # strengths from 0.1 to 0.9
    assert 0.4 < (turns > 0).mean() < 0.6


@pytest.mark.parametrize("name", ["operations", "hue", "blur", "erase"])
def test_a_parameter_leaves_the_others_as_they_were(name):
    fewer, own = replace(POLICY, **{name: 0}), {"operations": {"operations", "amounts"}, "erase": {"erased", "colour"}}
    for number in range(30):
        before, after = (policy.draw("a", number, (60, 80)) for policy in (POLICY, fewer))
        for field in AUGMENTED_DTYPE.names:
            if field in own.get(name, {name}):
                assert not after[field].any()
            else:
                assert before[field].tobytes() == after[field].tobytes()


def test_one_strength_is_that_of_randaugment():
    policy = replace(POLICY, magnitude=(0.3, 0.3), operations=3)
    found = {}
    for number in range(300):
        view = policy.draw("a", number, (60, 80))
        for one, amount in zip(view["operations"].tolist(), view["amounts"].tolist(), strict=True):
            found.setdefault(OPERATIONS[one].name, set()).add(amount)
    assert found["posterize"] == {7} and found["solarize"] == {179} and found["translate_x"] == {-3, 3}
    assert found["brightness"] == {round(16384 * 0.73), round(16384 * 1.27)}  # 1 - 0.9 * 9/30, 1 + 0.9 * 9/30
    assert found["shear_x"] == {-2949, 2949} and found["rotate"] == {-5126, 5126}  # 0.09; the sine of 9 degrees
    assert len(found) == 14


@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**30), st.booleans()
)
@settings(max_examples=80)
def test_every_drawn_view_can_be_replayed_and_keeps_its_bounds(rows, columns, height, width, number, strong):
    policy = replace(POLICY, size=(height, width), operations=MOST_OPERATIONS, blur=1.0, erase=1.0, hue=0.5)
    if strong:
        policy = replace(policy, magnitude=(1.0, 1.0), blur_sigma=(16.0, 16.0), erase_scale=(1.0, 1.0))
    view = policy.draw("a", number, (rows, columns))
    pixels = policy.replay(noise(rows, columns), view)
    assert pixels.shape == (height, width, 3) and pixels.dtype == np.uint8
    assert view.tobytes() == np.frombuffer(view.tobytes(), AUGMENTED_DTYPE)[0].tobytes()


@given(st.binary(min_size=24, max_size=24))
@settings(max_examples=150)
def test_any_bytes_are_replayed_or_refused(payload):
    view = np.frombuffer(PLAIN.canonical((60, 80)).tobytes() + payload, AUGMENTED_DTYPE)[0]
    try:
        pixels = augmented(PLAIN.replay(picture(), view["view"]), view)
    except DataError:
        return
    assert pixels.shape == (32, 24, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"operations": (0, 14, 0)}, "the view's operation 14 with 0 is none"),
        ({"operations": (3, 0, 0), "amounts": (9, 0, 0)}, "the view's operation 3 with 9 is none"),
        ({"operations": (5, 0, 0), "amounts": (-1, 0, 0)}, "the view's operation 5 with -1 is none"),
        ({"operations": (0, 0, 0), "amounts": (1, 0, 0)}, "the view's operation 0 with 1 is none"),
        ({"erased": (30, 0, 3, 1)}, "the view erases 3 x 1 pixels at row 30, column 0 of 32 x 24; .* cache the"),
        ({"erased": (0, 65535, 1, 65535)}, "the view erases 1 x 65535 pixels at row 0, column 65535"),
    ],
)
def test_what_no_policy_draws_is_refused(changes, problem):
    with pytest.raises(DataError, match=f"^{problem}"):
        POLICY.replay(picture(), view_of(**changes))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"size": (65536, 4)}, "size must be at most 65535"),
        ({"operations": 4}, "operations must be from 0 to 3, not 4"),
        ({"operations": -1}, "operations must be from 0 to 3, not -1"),
        ({"hue": 0.6}, "hue must be from 0 to 0.5, not 0.6"),
        ({"blur": 1.5}, "blur must be from 0 to 1, not 1.5"),
        ({"erase": float("nan")}, "erase must be from 0 to 1, not nan"),
        ({"magnitude": (0.5, 0.4)}, "magnitude must be 0 <= low <= high <= 1, not"),
        ({"magnitude": (0.5, 1.1)}, "magnitude must be"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma must be 0 < low <= high <= 16, not"),
        ({"blur_sigma": (1.0, 16.5)}, "blur_sigma must be"),
        ({"erase_scale": (0.1, 1.5)}, "erase_scale must be 0 < low <= high <= 1"),
        ({"flip": 2}, "flip must be from 0 to 1"),
    ],
)
def test_an_impossible_policy_is_refused(options, problem):
    with pytest.raises(RecipeError, match=f"^views: {problem}"):
        replace(POLICY, **options)


def test_a_mask_follows_the_plain_view():
    mask = noise(60, 80)[..., 0]
    for number in range(10):
        view = replace(POLICY, operations=0, erase=0.0).draw("a", number, (60, 80))
        assert np.array_equal(replay_mask(mask, view, (32, 24)), replay_mask(mask, view["view"], (32, 24)))


# ---------------------------------------------------------------------------------------------- from a recipe


def test_a_recipe_without_these_options_keeps_the_plain_record(experiment):
    assert assemble.view_policy(load("tiny.yaml")).dtype.itemsize == 24
    quiet = ["views.magnitude=[0.5, 1]", "views.blur_sigma=[1, 2]", "views.erase_scale=[0.1, 0.2]", "views.mixed=0.5"]
    assert assemble.view_policy(load("tiny.yaml", quiet)).kind == "image"
    said = [caches.views_identity(load("tiny.yaml", words), "train") for words in ([], quiet)]
    assert said[0] == said[1]


@pytest.mark.parametrize("word", ["hue=0.1", "operations=2", "blur=0.2", "erase=0.25"])
def test_each_option_alone_makes_the_views_augmented_in_training_only(experiment, word):
    recipe, plain = load("tiny.yaml", [f"views.{word}"]), load("tiny.yaml")
    name, value = word.split("=")
    policy = assemble.view_policy(recipe)
    assert isinstance(policy, AugmentedViews) and getattr(policy, name) == float(value)
    said = caches.views_identity(recipe, "train")
    assert (said["kind"], said[name]) == ("augmented", float(value)) and said["magnitude"] == [0.3, 0.3]
    assert policies.split_policy(recipe, "val").kind == "image"
    assert caches.views_identity(recipe, "val") == caches.views_identity(plain, "val")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["operations=4"], "views.operations: must be a whole number, from 0 to 3, not 4"),
        (["hue=0.7"], "views.hue: must be a number, between 0 and 0.5, not 0.7"),
        (["magnitude=[0.5, 0.2]"], "views.magnitude: the range must begin with its lower end, not 0.5 before 0.2"),
        (["blur_sigma=[1, 17]"], "views.blur_sigma: a blur is 16 pixels wide at most, not 17"),
        (["erase_scale=[0.1, 1.2]"], "views.erase_scale: no more than the view can be erased: 1.2 is above 1"),
    ],
)
def test_an_impossible_option_is_one_sentence(experiment, words, problem):
    with pytest.raises(RecipeError, match=problem.replace("[", r"\[")):
        load("tiny.yaml", [f"views.{word}" for word in words])


def test_masks_do_not_follow_what_moves_or_hides(scenery: Path):
    for word in ("operations=1", "erase=0.5"):
        with pytest.raises(RecipeError, match="moves or hides pixels, which a mask does not follow; it is not"):
            load("scenes.yaml", [f"views.{word}"])
    recipe = load("scenes.yaml", ["views.hue=0.1", "views.blur=0.5"])
    corridor = assemble.training_corridor(recipe, "pretrain", 0, 1)
    plain = assemble.training_corridor(load("scenes.yaml"), "pretrain", 0, 1)
    assert (corridor[0].targets == plain[0].targets).all() and (corridor[0].images != plain[0].images).any()


@pytest.mark.parametrize("word", ["hue=0.1", "operations=1", "blur=0.5", "erase=0.5", "mixup=0.2", "cutmix=1"])
def test_what_does_not_go_with_self_blended_views_or_audio(experiment, word):
    name = word.split("=")[0]
    words = [f"views.{word}", "views.self_blend=0.5", "task.classes=2"]
    with pytest.raises(RecipeError, match=f"views.{name}: would cover the traces of self_blend's fakes; leave one of"):
        load("tiny.yaml", words)
    with pytest.raises(RecipeError, match=f"views.{name}: is an option of views of images; this recipe has `audio`"):
        load("tiny.yaml", [f"views={{size: 8, {name}: {word.split('=')[1]}}}", "audio={mels: 8}"])
