"""views/mixed.py: two images in one view, from the policy to the cache, to what a student is given."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import done, inside, laboratory, run
from trainings import arguments, pack, result

from kd_dist import assemble, cache_teacher, caches, train
from kd_dist.batch import Batch, Example, Mixture, StudentOutput, TeacherSignal, valid_rows
from kd_dist.config import load
from kd_dist.data import Corridor
from kd_dist.errors import DataError, MismatchError, RecipeError, ShardError
from kd_dist.folders import read_examples, with_partners
from kd_dist.loader import batches, to_device
from kd_dist.losses import Objective
from kd_dist.losses.logits import cross_entropy
from kd_dist.manifest import read_manifest
from kd_dist.verify import verify
from kd_dist.views import VIEW_DTYPES, AugmentedViews, ImageViews, MixedViews, input_crc, replayed
from kd_dist.views.mixed import ALONE, CUTMIX, MIXUP, WHOLE, partners_of, second_share

PLAIN = ImageViews((24, 20), (0.5, 1), flip=0.5, brightness=0.3, seed=3)
POLICY = MixedViews(PLAIN, mixup=0.8, cutmix=1.0, mixed=0.75)
RICH = replace(POLICY, views=AugmentedViews(**vars(PLAIN), operations=2, hue=0.1, blur=0.3, erase=0.3))
# View number -> (the CRC of the record's bytes, the CRC of its pixels). Never change these: caches depend on them.
GOLDEN = {
    0: (3724845876, 2349288425),
    1: (3650977188, 3180683338),
    2: (3524351105, 2701124363),
    3: (245746059, 993678316),
}
GOLDEN_RICH = {
    0: (1384441009, 320272859),
    1: (1014314495, 87966493),
    2: (1669586117, 548552688),
    3: (2207521344, 729498553),
}


def picture(rows: int, columns: int, seed: int) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x * 3 % 256, y * (4 + seed) % 256, (x * y + 7 * x) % 256], axis=-1).astype(np.uint8)


OWN, OTHER = picture(40, 32, 0), picture(31, 50, 3)


def example(key: str = "cats/1", place: int = 5) -> Example:
    return Example(key, OWN, 0, partner=(place, Example("dogs/9", OTHER, 2)))


def mixed_views(policy: MixedViews, count: int) -> list[np.void]:
    return [policy.draw_for(example(), number) for number in range(count)]


# ---------------------------------------------------------------------------------------------- records and pixels


def test_views_are_64_and_112_bytes_in_a_fixed_layout():
    for policy, inner, total in ((POLICY, 24, 64), (RICH, 48, 112)):
        layout = {name: (kind.shape, str(kind.base), offset) for name, (kind, offset) in policy.dtype.fields.items()}
        assert (layout.pop("view")[2], layout.pop("other")[2]) == (0, inner)
        assert layout == {
            "partner": ((), "uint32", 2 * inner),
            "share": ((), "uint16", 2 * inner + 4),
            "box": ((4,), "uint16", 2 * inner + 6),
            "mixing": ((), "uint8", 2 * inner + 14),
        }
        assert policy.dtype.itemsize == total and VIEW_DTYPES[policy.kind] == policy.dtype
    assert (POLICY.kind, RICH.kind) == ("mixed", "augmented-mixed")


@pytest.mark.parametrize("name, number", [(name, number) for name in ("POLICY", "RICH") for number in range(4)])
def test_drawn_parameters_and_replayed_pixels_are_golden(name, number):
    policy, golden = {"POLICY": (POLICY, GOLDEN), "RICH": (RICH, GOLDEN_RICH)}[name]
    view = policy.draw_for(example(), number)
    assert (input_crc(np.frombuffer(view.tobytes(), np.uint8)), input_crc(policy.replay(OWN, view, OTHER))) == golden[
        number
    ]


@pytest.mark.parametrize("policy", [POLICY, RICH], ids=["plain", "augmented"])
def test_pixels_are_those_of_both_views_mixed_in_exact_numbers(policy):
    seen = Counter()
    for view in mixed_views(policy, 40):
        own, other = policy.views.replay(OWN, view["view"]), policy.views.replay(OTHER, view["other"])
        share = Fraction(int(view["share"]), WHOLE)
        top, left, height, width = view["box"].tolist()
        wanted = own.copy()
        for place in np.ndindex(own.shape):
            if view["mixing"] == MIXUP:
                value = int(own[place]) * share + int(other[place]) * (1 - share) + Fraction(1, 2)
                wanted[place] = value.numerator // value.denominator
            elif top <= place[0] < top + height and left <= place[1] < left + width:
                wanted[place] = other[place]
        made = policy.replay(OWN, view, OTHER)
        assert np.array_equal(made, wanted)
        assert made.dtype == np.uint8 and made.flags.c_contiguous and made.flags.writeable
        exact = 1 - share if view["mixing"] == MIXUP else Fraction(height * width, 24 * 20)
        assert second_share(view, policy.size) == float(exact)
        seen[int(view["mixing"])] += 1
    assert set(seen) == {MIXUP, CUTMIX} and min(seen.values()) > 10


def test_both_views_are_those_that_the_inner_policy_draws():
    for policy in (POLICY, RICH):
        for number in range(10):
            view = policy.draw_for(example(), number)
            assert view["view"].tobytes() == policy.views.draw_for(Example("cats/1", OWN, 0), number).tobytes()
            assert view["other"].tobytes() == policy.views.draw_for(Example("dogs/9", OTHER, 2), number).tobytes()
            alone = policy.draw_for(Example("cats/1", OWN, 0), number)
            assert alone["view"].tobytes() == view["view"].tobytes()
            assert alone["mixing"] == ALONE and not any(alone.tobytes()[policy.views.dtype.itemsize :])
            assert np.array_equal(policy.replay(OWN, alone), policy.views.replay(OWN, view["view"]))
        assert policy.canonical((40, 32))["view"].tobytes() == policy.views.canonical((40, 32)).tobytes()


def test_another_process_replays_stored_views_from_their_bytes_alone(tmp_path):
    views = mixed_views(RICH, 30)
    for name, image in (("own", OWN), ("other", OTHER)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    code = (
        "import json, sys, numpy as np\nfrom PIL import Image\n"
        "from kd_dist.views import AugmentedViews, MixedViews, input_crc\n"
        "policy = MixedViews(AugmentedViews((24, 20), seed=99), cutmix=0.5)\n"
        f"views = np.frombuffer(bytes.fromhex('{b''.join(view.tobytes() for view in views).hex()}'), policy.dtype)\n"
        "own, other = (np.asarray(Image.open(name)) for name in ('own.png', 'other.png'))\n"
        "print(json.dumps([input_crc(policy.replay(own, view, other)) for view in views]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert json.loads(ended.stdout) == [input_crc(RICH.replay(OWN, view, OTHER)) for view in views], ended.stderr


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.8, 1.0, 3.0, 20.0])
def test_shares_are_of_the_beta_distribution(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)); no share prefers a side."""
    shares = np.array([second_share(view, (24, 20)) for view in mixed_views(MixedViews(PLAIN, mixup=alpha), 1500)])
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.12)
    assert shares.min() >= 0 and shares.max() <= 1


def test_boxes_of_cutmix_lie_in_the_view_and_cover_what_is_meant():
    views = np.array(mixed_views(MixedViews(ImageViews((60, 80)), cutmix=1.0), 1500))
    top, left, height, width = views["box"].astype(int).T
    assert (top + height).max() <= 60 and (left + width).max() <= 80 and min(top.min(), left.min()) == 0
    # The edges cut off something: without them the mean were a half.
    assert 0.3 < (height * width / (60 * 80)).mean() < 0.45
    assert set(views["mixing"].tolist()) == {CUTMIX} and not views["share"].any()


def test_a_partner_is_any_other_example_of_the_shard():
    policy = replace(POLICY, mixed=1.0)
    for examples, place in ((2, 0), (2, 1), (7, 3)):
        found = Counter(policy.partner("a", number, place, examples) for number in range(700))
        assert set(found) == set(range(examples)) - {place}
        assert max(found.values()) < 1.4 * min(found.values())
    assert {policy.partner("a", number, 0, 1) for number in range(20)} == {-1}
    some = [POLICY.partner("a", number, 0, 9) for number in range(1000)]
    assert 0.2 < np.mean([one == -1 for one in some]) < 0.3


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**30))
@settings(max_examples=60)
def test_every_drawn_view_can_be_replayed(rows, columns, height, width, number):
    policy = replace(RICH, views=replace(RICH.views, size=(height, width), operations=3, magnitude=(0, 1)), mixed=1.0)
    image = picture(rows, columns, 1)
    both = Example("a", image, 0, partner=(1, Example("b", OTHER, 1)))
    view = policy.draw_for(both, number)
    pixels = replayed(policy, both, view)
    assert pixels.shape == (height, width, 3) and pixels.dtype == np.uint8
    assert 0 <= second_share(view, policy.size) <= 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mixing": 3}, "the view is mixed in way 3 with a share of"),
        ({"mixing": MIXUP, "share": WHOLE + 1}, "the view is mixed in way 1 with a share of 32769"),
        ({"mixing": CUTMIX, "box": (20, 0, 5, 1)}, ".* a box of 5 x 1 pixels at row 20, column 0 of 24 x 20; it was"),
        ({"mixing": CUTMIX, "box": (0, 65535, 1, 65535)}, ".* a box of 1 x 65535 pixels at row 0, column 65535 of"),
    ],
)
def test_what_no_policy_draws_is_refused(changes, problem):
    view = POLICY.draw_for(example(), 0).copy()
    for name, value in changes.items():
        view[name] = value
    with pytest.raises(DataError, match=f"^{problem}"):
        POLICY.replay(OWN, view[()], OTHER)
    with pytest.raises(DataError, match=f"^{problem}"):
        second_share(view[()], POLICY.size)


@given(st.binary(min_size=16, max_size=16))
@settings(max_examples=150)
def test_any_bytes_are_replayed_or_refused(payload):
    whole = POLICY.draw_for(example(), 0).tobytes()
    view = np.frombuffer(whole[:48] + payload[:14] + bytes([payload[14] % 4, 0]), POLICY.dtype)[0]
    try:
        pixels = POLICY.replay(OWN, view, OTHER)
    except DataError:
        return
    assert pixels.shape == (24, 20, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"mixup": 0.001}, "mixup must be 0, or from 0.01 to 100, not 0.001"),
        ({"cutmix": -1.0}, "cutmix must be 0, or from 0.01 to 100, not -1.0"),
        ({"cutmix": float("nan")}, "cutmix must be 0, or"),
        ({"mixup": 0.0, "cutmix": 0.0}, "to mix, mixup or cutmix must be above 0"),
        ({"mixed": 1.1}, "mixed must be from 0 to 1, not 1.1"),
        ({"views": replace(PLAIN, size=(65536, 1))}, "size must be at most 65535"),
    ],
)
def test_an_impossible_policy_is_refused(options, problem):
    with pytest.raises(RecipeError, match=f"^views: {problem}"):
        replace(POLICY, **options)


# ---------------------------------------------------------------------------------------------- two targets


def batch_of(shares: list[float], valid: list[bool] | None = None) -> Batch:
    generator, rows = torch.Generator().manual_seed(0), len(shares)
    own, other = (torch.randint(0, 4, (rows,), generator=generator) for _ in range(2))
    return Batch(
        keys=tuple(map(str, range(rows))),
        images=torch.zeros(rows, 3, 2, 2, dtype=torch.uint8),
        targets=own,
        sizes=None,
        valid=torch.tensor(valid or [True] * rows),
        total=rows,
        signals=TeacherSignal(torch.randn(rows, 4, generator=generator)),
        mixture=Mixture((own + 1 + other % 3) % 4, torch.tensor(shares)),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_on_labels_weighs_both_as_the_cross_entropy_with_the_mixed_label_does(smoothing):
    batch = batch_of([0.0, 0.25, 0.5, 1.0, 0.3])
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    share = batch.mixture.share[:, None]
    label = (1 - share) * torch.eye(4)[batch.targets] + share * torch.eye(4)[batch.mixture.targets]
    label = (1 - smoothing) * label + smoothing / 4
    wanted = -(label * logits.log_softmax(1)).sum(1).mean()
    written = {"cross_entropy": {"label_smoothing": smoothing}}
    loss, _ = Objective(written, 1)(StudentOutput(logits), batch, 0.0)
    torch.testing.assert_close(loss, wanted)
    alone, _ = Objective(written, 1)(StudentOutput(logits), batch._replace(mixture=None), 0.0)
    torch.testing.assert_close(alone, cross_entropy(logits, batch.targets, label_smoothing=smoothing).mean())
    assert abs(alone - loss) > 0.01


def test_a_loss_on_the_teacher_hears_nothing_of_labels():
    batch, logits = batch_of([0.2, 0.9]), torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    alone = batch._replace(mixture=None)
    found = [Objective({"kd": {}}, 1)(StudentOutput(logits), one, 0.0)[0] for one in (batch, alone)]
    assert found[0] == found[1] > 0


def test_rows_that_are_not_valid_take_their_second_target_with_them():
    batch = batch_of([0.1, 0.2, 0.3], [True, False, True])
    kept = valid_rows(batch)
    assert kept.mixture.targets.tolist() == batch.mixture.targets[[0, 2]].tolist()
    assert kept.mixture.share.tolist() == batch.mixture.share[[0, 2]].tolist()
    assert valid_rows(batch._replace(mixture=None)).mixture is None
    moved = to_device(batch, torch.device("cpu"))
    assert torch.equal(moved.mixture.share, batch.mixture.share)


# ---------------------------------------------------------------------------------------------- the cache, end to end

VIEWS = 6
WORDS = ["teacher.weights=null", f"views.count={VIEWS}", "views.mixup=0.8", "views.cutmix=1", "views.mixed=0.8"]
FRAGILE = ["teacher.model=tiny_model:fragile", "teacher.options={}", "teacher.name=fragile"]


def cached(*more: str) -> None:
    recipe = load("tiny.yaml", [*WORDS, *more])
    for split in ("train", "val"):
        cache_teacher.cache_split(recipe, split, assemble.teacher(recipe), Accelerator(cpu=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A user's folder with packed examples, and a cache of mixed views."""
    folder = laboratory(tmp_path_factory.mktemp("mixed"))
    with inside(folder):
        pack()
        cached()
    return folder


@pytest.fixture
def home(made, tmp_path) -> Path:
    """A copy of it to damage, as the working directory."""
    subprocess.run(["cp", "-r", made, tmp_path / "home"], check=True)
    with inside(tmp_path / "home"):
        yield tmp_path / "home"


def corridor(*more: str, stage: str = "distill") -> Corridor:
    return assemble.training_corridor(load("tiny.yaml", [*WORDS, *more]), stage, 0, 1)


def images_of(corridor: Corridor) -> dict[tuple[int, int], tuple[str, np.ndarray, int]]:
    """By shard and place, key, decoded image and label of every packed example, by Pillow and the folder alone."""
    found = {}
    for number in range(len(corridor.examples.paths)):
        shard = corridor.examples.shard(number)
        for place in range(len(shard)):
            members = shard.read(place)
            label = json.loads(bytes(members["json"]))["label"]
            with Image.open(Path("pictures/train") / f"{shard.key(place)}.png") as picture:
                found[number, place] = shard.key(place), np.asarray(picture.convert("RGB")), label
    return found


def test_teacher_and_student_see_the_same_two_images_and_both_labels(made):
    with inside(made):
        whole = replace(corridor(), epochs=VIEWS)
        images, mixed, shards, beyond = images_of(whole), Counter(), Counter(), 0
        for cursor in range(len(whole)):
            batch, epoch = whole[cursor], cursor // whole.plan.steps_per_epoch
            ids = whole.plan.share(cursor, 0, 0)
            stored = whole.signals.rows(ids, whole._view_numbers(ids, epoch))
            numbers, places = whole.examples.locate(ids)
            for row, view in enumerate(stored["view"]):
                pixels = batch.images[row].permute(1, 2, 0).numpy()
                assert input_crc(pixels) == stored["input_crc"][row]
                key, image, label = images[int(numbers[row]), int(places[row])]
                assert (batch.keys[row], batch.targets[row]) == (key, label)
                mixed[int(view["mixing"])] += 1
                if view["mixing"] == ALONE:
                    assert (batch.mixture.targets[row], batch.mixture.share[row]) == (0, 0)
                    continue
                _, other, second = images[int(numbers[row]), int(view["partner"])]
                assert view["partner"] != places[row]
                assert batch.mixture.targets[row] == second
                assert batch.mixture.share[row] == np.float32(second_share(view, whole.policy.size))
                assert np.array_equal(pixels, whole.policy.replay(image, view, other))
                beyond += second != label
                shards[int(numbers[row])] += 1
        assert sum(mixed.values()) == 21 * VIEWS and all(mixed[way] > 15 for way in (ALONE, MIXUP, CUTMIX))
        assert beyond > 20 and set(shards) == {0, 1, 2}  # shards of 8, 8 and 5


def test_what_manifests_say_and_what_rows_take(made):
    with inside(made):
        recipe = load("tiny.yaml", WORDS)
        train_cache, val_cache = (
            caches.signals(recipe, split, assemble.examples(recipe, split)) for split in ("train", "val")
        )
        assert train_cache.dtype["view"].itemsize == 64 and val_cache.dtype["view"].itemsize == 24
        said = read_manifest(train_cache.folder)
        assert said["views"]["kind"] == "mixed" and said["views"]["mixup"] == 0.8 and said["views"]["mixed"] == 0.8
        assert (
            said["views"]["flip"] == 0.5
            and "views" not in said["views"]
            and said["teacher_report"]["rows"] == 21 * VIEWS
        )
        with pytest.raises(MismatchError, match=r"views.mixup = 0.8, the recipe has 0.2; restore the recipe"):
            caches.signals(load("tiny.yaml", [*WORDS, "views.mixup=0.2"]), "train", train_cache.examples)
        plain = load("tiny.yaml", WORDS[:2])
        assert caches.signals(plain, "val", assemble.examples(plain, "val")).views == 1  # of use to both recipes
        with pytest.raises(MismatchError, match=r"views.cutmix = 1.0, the recipe has '\(absent\)'"):
            caches.signals(plain, "train", train_cache.examples)
        for split in ("train", "val"):
            found = verify(recipe, split, 21)
            assert found["ok"] and not found["other_pixels"]


def test_labels_of_the_larger_share_are_what_the_teacher_is_held_to(made):
    with inside(made):
        whole = corridor()
        images, wanted = images_of(whole), Counter()
        for identity in range(21):
            [number], [place] = whole.examples.locate(np.array([identity]))
            for view in range(VIEWS):
                [row] = whole.signals.rows(np.array([identity]), np.array([view]))
                larger = second_share(row["view"], whole.policy.size) > 0.5
                wanted[images[int(number), int(row["view"]["partner"]) if larger else int(place)][2]] += 1
        said = read_manifest(whole.signals.folder)["teacher_report"]["labelled_per_class"]
        assert said == [wanted[label] for label in range(3)] and said != [42, 42, 42]


def test_a_stage_without_a_teacher_draws_fresh_mixed_views(made):
    with inside(made):
        alone = replace(corridor(stage="pretrain"), epochs=3)
        assert alone.signals is None
        images, rows, looks = images_of(alone), 0, {}
        keys = {key: (place, number) for (number, place), (key, _, _) in images.items()}
        for cursor in range(len(alone)):
            batch, epoch = alone[cursor], cursor // alone.plan.steps_per_epoch
            for row, key in enumerate(batch.keys):
                place, number = keys[key]
                count = len(alone.examples.shard(number))
                partner = alone.policy.partner(key, epoch, place, count)
                drawn = Example(key, images[number, place][1], 0)
                if partner >= 0:
                    other = images[number, partner]
                    drawn = drawn._replace(partner=(partner, Example(other[0], other[1], other[2])))
                    assert batch.mixture.targets[row] == other[2]
                view = alone.policy.draw_for(drawn, epoch)
                assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), replayed(alone.policy, drawn, view))
                assert batch.mixture.share[row] == np.float32(second_share(view, alone.policy.size))
                looks.setdefault(key, set()).add(batch.images[row].numpy().tobytes())
                rows += 1
        assert rows == 63 and all(len(seen) == 3 for seen in looks.values())


def test_batches_are_the_same_through_loader_processes(made):
    with inside(made):
        one = corridor()
        for workers in (0, 2):
            for cursor, batch in enumerate(batches(one, 0, len(one), workers, pin=False)):
                assert torch.equal(batch.mixture.share, one[cursor].mixture.share)
                assert torch.equal(batch.images, one[cursor].images)


def test_splits_that_are_judged_by_are_not_mixed(made):
    with inside(made):
        val = assemble.evaluation_corridor(load("tiny.yaml", WORDS), "val", 0, 1, cached=True)
        plain = assemble.evaluation_corridor(load("tiny.yaml", WORDS[:2]), "val", 0, 1, cached=True)
        assert val[0].mixture is None and torch.equal(val[0].images, plain[0].images)


def test_the_only_example_of_a_shard_is_not_mixed(tmp_path):
    with inside(laboratory(tmp_path)):
        words = ["data.shard_size=4", "views.mixed=1", "views.cutmix=0"]  # a mixup shows some of both, but for chance
        pack(*words)
        one = replace(corridor(*words, stage="pretrain"), epochs=2)
        assert np.diff(one.examples.starts).tolist() == [4, 4, 4, 4, 4, 1]
        lonely, shares = one.examples.shard(5).key(0), {}
        for cursor in range(len(one)):
            batch = one[cursor]
            for key, share in zip(batch.keys, batch.mixture.share.tolist(), strict=True):
                shares.setdefault(key, []).append(share)
        assert shares.pop(lonely) == [0, 0] and len(shares) == 20 and all(min(one) > 0 for one in shares.values())


# ---------------------------------------------------------------------------------------------- a partner that fails


def partners_in(whole: Corridor) -> dict[str, set[tuple[str, int]]]:
    """By the key of a partner, the key and the view of every row that shows it."""
    found: dict[str, set[tuple[str, int]]] = {}
    for identity in range(len(whole.examples)):
        [number], [place] = whole.examples.locate(np.array([identity]))
        shard = whole.examples.shard(int(number))
        for view in range(VIEWS):
            rows = whole.signals.rows(np.array([identity]), np.array([view]))
            [partner] = partners_of(rows["view"])
            if partner >= 0:
                found.setdefault(shard.key(int(partner)), set()).add((shard.key(int(place)), view))
    return found


def test_a_quarantined_example_still_lends_its_image(home):
    cached(*FRAGILE)
    whole = replace(corridor(*FRAGILE), epochs=VIEWS)
    quarantined = {row["key"] for row in read_manifest(whole.signals.folder)["quarantined"]}
    assert "red/00" in quarantined and len(quarantined) < 21  # it is white, and so is what shows most of it
    shown = partners_in(whole)["red/00"]
    wanted = {(key, view) for key, view in shown if key not in quarantined}
    seen = Counter(key for cursor in range(len(whole)) for key in whole[cursor].keys)
    assert set(seen).isdisjoint(quarantined) and all(seen[key] == VIEWS for key, _ in wanted)
    assert wanted  # its image is in rows that are learnt from


def damage(key: str) -> None:
    """Flip a byte in the middle of an example's picture."""
    whole = corridor(stage="pretrain")
    for number, path in enumerate(whole.examples.paths):
        shard = whole.examples.shard(number)
        for place in range(len(shard)):
            if shard.key(place) == key:
                offset, size = shard.member(place, "png")
                path.chmod(0o644)
                with open(path, "r+b") as file:
                    file.seek(offset + size // 2)
                    byte = file.read(1)[0]
                    file.seek(offset + size // 2)
                    file.write(bytes([byte ^ 1]))
                return
    raise AssertionError(key)


def test_a_damaged_partner_stops_the_run_or_masks_every_row_that_shows_it(home):
    key = "green/03"
    shown = partners_in(corridor())[key]
    damage(key)
    strict = replace(corridor(), epochs=VIEWS)
    with pytest.raises(ShardError, match=f"'{key}'"):
        for cursor in range(len(strict)):
            strict[cursor]
    lenient = replace(corridor("data.on_error=replace_masked"), epochs=VIEWS)
    lost, said = set(), []
    for cursor in range(len(lenient)):
        batch, epoch = lenient[cursor], cursor // lenient.plan.steps_per_epoch
        ids = lenient.plan.share(cursor, 0, 0)
        views = dict(zip(ids.tolist(), lenient._view_numbers(ids, epoch).tolist(), strict=True))
        names = [lenient._named(int(one))[0] for one in ids]
        for name, one in zip(names, ids.tolist(), strict=True):
            row = batch.keys.index(name) if name in batch.keys else None
            if row is None or not batch.valid[row]:
                lost.add((name, views[one]))
                assert row is None or not batch.images[row].any() and batch.mixture.share[row] == 0
        said += batch.failed
    assert lost == shown | {(key, view) for view in range(VIEWS)} and len(lost) == len(said) > VIEWS
    of_others = [sentence for sentence in said if f"example '{key}' is masked" not in sentence]
    assert len(of_others) == len(shown) and all(f"'{key}'" in sentence for sentence in of_others)


def test_a_stored_partner_beyond_its_shard_is_refused(made):
    with inside(made):
        whole = corridor()
        decoded = read_examples(whole.examples, np.array([20]), whole.task.decode)
        assert whole.examples.starts.tolist() == [0, 8, 16, 21]
        with pytest.raises(DataError, match="a view is mixed with an example beyond its shard's last; cache again"):
            with_partners(whole.examples, decoded, np.array([20]), np.array([5]), whole.task.decode)
        first = read_examples(whole.examples, np.array([0]), whole.task.decode)
        with pytest.raises(DataError, match="beyond its shard's last"):  # the next shard is another one's
            with_partners(whole.examples, first, np.array([0]), np.array([8]), whole.task.decode)


# ---------------------------------------------------------------------------------------------- recipes and stages


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_is_for_classes_and_shards_of_two(experiment, scenery, name):
    with pytest.raises(RecipeError, match=f"views.{name}: shows two examples, whose classes are weighed; it is"):
        load("scenes.yaml", [f"views.{name}=1"])


def test_impossible_mixing_is_one_sentence(experiment):
    for name in ("mixup", "cutmix"):
        with pytest.raises(RecipeError, match=f"views.{name}: shows two examples, .* it is not for regression"):
            load("tiny.yaml", [f"views.{name}=1", "task={name: regression, outputs: [a]}"])
        with pytest.raises(RecipeError, match=f"views.{name}: needs a second example in each shard; data.shard_size m"):
            load("tiny.yaml", [f"views.{name}=1", "data.shard_size=1"])
        with pytest.raises(RecipeError, match=f"views.{name}: must be 0, or from 0.01 to 100, not 1000"):
            load("tiny.yaml", [f"views.{name}=1000"])


@pytest.mark.slow
def test_stages_learn_from_mixed_and_augmented_views(tmp_path):
    lab = laboratory(tmp_path / "lab")
    more = ["views.operations=2", "views.hue=0.05", "views.blur=0.3", "views.erase=0.3", "data.workers=1"]
    words = [*WORDS[1:], *more]
    done(run(pack, folder=lab))
    for stage in ("teacher", "pretrain"):
        done(run(train.main, *arguments(tmp_path / "runs", *words, stage=stage), folder=lab))
    done(run(cache_teacher.main, ["tiny.yaml", *words, f"runs={tmp_path / 'runs'}"], folder=lab))
    said = done(run(train.main, *arguments(tmp_path / "runs", *words), folder=lab))
    assert "epoch 2/2" in said
    with inside(lab):
        about = read_manifest(Path("shards/tiny/train/teacher"))["views"]
        assert about["kind"] == "augmented-mixed" and about["operations"] == 2
    for stage in ("teacher", "pretrain", "distill"):
        history = result(tmp_path / "runs" / "tiny" / stage / "seed-0")["history"]
        assert len(history) == 2 and all(np.isfinite(one["loss"]) and not one["skipped"] for one in history)
