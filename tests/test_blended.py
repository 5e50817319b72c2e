"""views/blended.py: which views of a face are fakes, from a policy to the cache and to what a student is given."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from processes import inside, laboratory

from kd_dist import assemble, cache_teacher, caches, journey, manifest
from kd_dist.batch import Example
from kd_dist.config import load
from kd_dist.errors import DataError, MismatchError, RecipeError
from kd_dist.signals import LogitsCodec, row_dtype
from kd_dist.views import VIEW_DTYPES, ImageViews, input_crc
from kd_dist.views.blended import BLENDED_DTYPE, UNTOUCHED, BlendedViews, is_fake
from kd_dist.views.blends import blend

POLICY = BlendedViews((24, 20), (0.5, 1), flip=0.5, brightness=0.3, seed=3)
PLAIN = ImageViews(**{one.name: getattr(POLICY, one.name) for one in fields(ImageViews)})
PEOPLE, VIEWS = 6, 8


def face(seed: int, size: tuple[int, int] = (40, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def example(key: str, target: int = 0, **about: object) -> Example:
    return Example(key, face(1), target, about)


def test_a_view_is_200_bytes_in_a_fixed_layout():
    assert BLENDED_DTYPE.itemsize == 200
    assert [(name, offset) for name, (_, offset) in BLENDED_DTYPE.fields.items()] == [
        ("view", 0),
        ("blended", 24),
        ("blend", 28),
    ]
    assert VIEW_DTYPES["self-blended"] == BLENDED_DTYPE


def test_a_row_of_two_classes_is_36_bytes_and_212_with_a_blend():
    margin = LogitsCodec("fp16", 2).fields()
    assert [row_dtype(kind.dtype, margin).itemsize for kind in (ImageViews, BlendedViews)] == [36, 212]


def test_a_share_of_the_views_of_real_images_are_fakes_and_none_of_fakes():
    drawn = [POLICY.draw_for(example(f"face-{key}"), number) for key in range(40) for number in range(50)]
    assert 0.46 < np.mean([is_fake(view) for view in drawn]) < 0.54
    assert not any(is_fake(POLICY.draw_for(example("fake", target=1), number)) for number in range(200))
    everyone = replace(POLICY, self_blend=1.0)
    assert all(is_fake(everyone.draw_for(example("face"), number)) for number in range(50))
    assert not is_fake(everyone.canonical((40, 32)))


def test_the_rest_of_a_view_is_that_of_the_plain_policy():
    image = example("face")
    for number in range(40):
        view = POLICY.draw_for(image, number)
        assert view["view"].tobytes() == PLAIN.draw_for(image, number).tobytes()
        seen = blend(image.image, view["blend"]) if view["blended"] else image.image
        assert np.array_equal(POLICY.replay(image.image, view), PLAIN.replay(seen, view["view"]))
        assert view["blended"] or view["blend"].tobytes() == UNTOUCHED.tobytes()
    assert POLICY.canonical((40, 32))["view"].tobytes() == PLAIN.canonical((40, 32)).tobytes()


def test_landmarks_decide_where_the_mask_is():
    policy = replace(POLICY, self_blend=1.0)
    landmarks = np.random.default_rng(0).uniform((1, 1), (31, 14), (120, 2)).tolist()
    blends = [policy.draw_for(example("face", landmarks=landmarks), number)["blend"] for number in range(20)]
    assert max(one["corners"][:, 1].max() for one in blends) <= 15 / 40 * 65536
    with pytest.raises(DataError, match="landmarks are no list of pairs"):
        policy.draw_for(example("face", landmarks="none"), 0)


def test_a_share_is_between_0_and_1():
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(RecipeError, match="self_blend must be from 0 to 1"):
            replace(POLICY, self_blend=share)


@pytest.fixture
def home(tmp_path) -> Path:
    """A packed data set of real faces, and a fake."""
    laboratory(tmp_path)
    for split in ("train", "val"):
        for person in range(PEOPLE):
            name = "a_real" if person < PEOPLE - 1 else "b_fake"
            place = tmp_path / "faces" / split / name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(face(person)).save(place / f"{person}.png")
    return tmp_path


WORDS = ["task.classes=2", "data.root=faces", "teacher.weights=null", f"views.count={VIEWS}", "evaluate.split=val"]
WORDS += ["views.self_blend=0.5"]


def test_the_cache_and_the_student_know_which_views_are_fakes(home):
    with inside(home):
        recipe = load("tiny.yaml", WORDS)
        journey.pack_recipe(recipe)
        for split in ("train", "val"):
            cache_teacher.cache_split(recipe, split, assemble.teacher(recipe), Accelerator(cpu=True))
        corridor = assemble.training_corridor(recipe, "distill", 0, 1)
        stored = caches.signals(recipe, "train", assemble.examples(recipe, "train"))
        about = manifest.read_manifest(stored.folder)
        assert about["views"]["kind"] == "self-blended" and about["views"]["self_blend"] == 0.5
        assert about["teacher_report"]["labelled_per_class"][1] > VIEWS  # the fakes among the views, and the fake's own
        fakes, plain = 0, replace(corridor, policy=assemble.view_policy(load("tiny.yaml", WORDS[:-1])), signals=None)
        for cursor in range(len(corridor)):
            batch = corridor[cursor]
            ids = corridor.plan.share(cursor, 0, 0)
            rows = stored.rows(ids, corridor._view_numbers(ids, cursor // corridor.plan.steps_per_epoch))
            for row, view in enumerate(rows["view"]):
                image = batch.images[row].permute(1, 2, 0).numpy()
                assert input_crc(image) == rows["input_crc"][row]
                own = "b_fake" in batch.keys[row]
                assert batch.targets[row] == (1 if own else int(view["blended"])) and not (own and view["blended"])
                fakes += int(view["blended"])
            changed = (batch.images != plain[cursor].images).flatten(1).any(1).numpy()
            assert np.array_equal(changed, rows["view"]["blended"] == 1)
        assert fakes >= PEOPLE


def test_fakes_that_come_first_are_refused(home):
    (home / "faces/train/a_real").rename(home / "faces/train/c_real")
    (home / "faces/val/a_real").rename(home / "faces/val/c_real")
    with inside(home):
        recipe = load("tiny.yaml", WORDS)
        journey.pack_recipe(recipe)
        with pytest.raises(MismatchError, match="class 0 is 'b_fake', and views.self_blend makes fakes, class 1, of"):
            assemble.examples(recipe, "train")
        assert len(assemble.examples(load("tiny.yaml", WORDS[:-1]), "train")) == PEOPLE


def test_another_process_replays_a_stored_view_from_its_bytes_alone(home):
    view = replace(POLICY, self_blend=1.0).draw_for(example("face"), 2)
    Image.fromarray(example("face").image).save(home / "face.png")
    code = (
        "import json, sys, numpy as np\nfrom PIL import Image\nfrom kd_dist.views import input_crc\n"
        "from kd_dist.views.blended import BLENDED_DTYPE, BlendedViews\n"
        f"view = np.frombuffer(bytes.fromhex('{view.tobytes().hex()}'), BLENDED_DTYPE)[0]\n"
        "image = np.asarray(Image.open('face.png'))\n"
        "print(json.dumps(input_crc(BlendedViews((24, 20), seed=99).replay(image, view))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == input_crc(POLICY.replay(example("face").image, view)), done.stderr
