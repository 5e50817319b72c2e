"""Features in the cache: what the teacher said, within the codec's bound; honest about bad rows; refused elsewhere."""

import io
import itertools
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import pack_examples
from PIL import Image
from processes import contents, done, run, start, wait_until
from safetensors.numpy import load_file
from scenes import MODEL, SPLITS

from kd_dist import assemble, cache_teacher, caches, journey, manifest, places
from kd_dist.config import load
from kd_dist.errors import DataError, MismatchError, ShardError
from kd_dist.extract import NOTED, Extraction, Rows, answers, encode, made_rows, make_rows, read_rows, take
from kd_dist.loader import batches
from kd_dist.recipe import Recipe
from kd_dist.rows import BASES
from kd_dist.signals import LogitsCodec, dtype_from_json, pack_rows, row_dtype, to_npy
from kd_dist.views.images import VIEW_DTYPE, replay

TRAIN, VIEWS = SPLITS["train"], 2
WHITE = "003"  # the training picture that the odd teachers cannot bear
ONE_FEATURE = "cache.features={high: {tap: high, store: fp16}}"
SLACK = 2e-6  # of float32 between batches of other sizes

ODD = '''

import torch


class Odd(nn.Module):
    """Multiplies the feature of bright pictures, and it alone, by `factor`."""

    def __init__(self, classes, factor, limit):
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Identity()
        self.head = nn.Conv2d(4, classes, 1)
        self.factor, self.limit = factor, limit

    def forward(self, images):
        low = self.low(images)
        bright = images.mean(dim=(1, 2, 3)) > self.limit
        self.high(low * torch.where(bright, self.factor, 1.0)[:, None, None, None])
        return self.head(low)


def silent(classes, limit=0.6):
    return Odd(classes, float("nan"), limit)


def loud(classes, limit=0.6):
    return Odd(classes, 1e8, limit)
'''


def cached(recipe: Recipe, split: str = "train") -> dict:
    """Cache one split in this process; returns the manifest."""
    teacher = assemble.teacher(recipe, recipe.cache.features)
    return cache_teacher.cache_split(recipe, split, teacher, Accelerator(cpu=True))


def rows(recipe: Recipe, split: str = "train") -> dict[str, np.ndarray]:
    """Every example's rows (V,), read with a stock tar reader and NumPy alone."""
    found = {}
    for path in sorted(places.signals_folder(recipe, split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                payload = io.BytesIO(tar.extractfile(member).read())
                found[member.name.removesuffix(".teacher.npy")] = np.load(payload, allow_pickle=False)
    return found


def live(recipe: Recipe, key: str, views: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the teacher says about these views (V,) of a picture, straight from the raw file: logits, features."""
    image = np.asarray(Image.open(f"scenes/JPEGImages/{key}.jpg").convert("RGB"))
    pixels = np.stack([replay(image, view, recipe.views.shape) for view in views])
    said = assemble.teacher(recipe, recipe.cache.features)(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return said.logits.numpy(), {name: value.numpy() for name, value in said.features.items()}


def folder(recipe: Recipe) -> Path:
    return places.signals_folder(recipe, "train")


# ---------------------------------------------------------------------------------------------- what is stored


def test_a_row_is_what_the_manifest_says(scenery):
    recipe = load("scenes.yaml")
    about, stored = cached(recipe), rows(recipe)
    examples = assemble.examples(recipe, "train")
    assert list(stored) == [key for number in range(3) for key in examples.shard(number).keys] and len(stored) == TRAIN
    fields = [
        ("logits", "<f2", (3, 4, 6)),
        ("high", "<f2", (6, 4, 6)),
        ("low_scale", "<f2", (8,)),
        ("low", "i1", (8, 4, 6)),
    ]
    expected = row_dtype(VIEW_DTYPE, fields)
    assert {one.dtype for one in stored.values()} == {expected} and expected.itemsize == about["row_bytes"]
    assert dtype_from_json(about["row_dtype"]) == expected
    assert all(one.shape == (VIEWS,) for one in stored.values())
    assert about["codec"]["features"] == {
        "high": {"tap": "high", "pool": 1, "pca": 6, "store": "fp16", "dither": False, "shape": [16, 4, 6]},
        "low": {"tap": "low", "pool": 2, "pca": None, "store": "int8", "dither": True, "shape": [8, 8, 12]},
    }
    assert about["overflow"] == {"high": 0, "low": 0} and about["quarantined"] == []


@pytest.mark.parametrize("batch_size", [5, 64])
def test_every_feature_of_every_row_is_what_the_live_teacher_says(scenery, batch_size):
    """Twenty rows in shards of 8, 8 and 4: a batch of 5 ends inside an example, one of 64 holds a whole shard."""
    recipe = load("scenes.yaml", [f"cache.batch_size={batch_size}"])
    cached(recipe)
    basis = load_file(folder(recipe) / BASES)
    mean, components = basis["high.mean"][:, None, None], basis["high.components"]
    policy, decoded, seen = assemble.view_policy(recipe), 0, []
    codecs = caches.signals(recipe, "train", assemble.examples(recipe, "train")).features
    for key, own in rows(recipe).items():
        size = Image.open(f"scenes/JPEGImages/{key}.jpg").size[::-1]
        assert [view.tolist() for view in own["view"]] == [policy.draw(key, view, size).tolist() for view in (0, 1)]
        _, said = live(recipe, key, own["view"])
        # int8, pooled, dithered: within one scale, which is no larger than it must be.
        low = said["low"].reshape(VIEWS, 8, 4, 2, 6, 2).mean(axis=(3, 5))
        scale = own["low_scale"].astype(np.float32)[..., None, None]
        error = own["low"] * scale - low
        assert (np.abs(error) <= scale + SLACK).all()
        seen.append(error / scale)
        assert own["low_scale"] == pytest.approx(np.abs(low).max(axis=(2, 3)) / 127, rel=2e-3)
        # fp16 of the principal components.
        high = np.einsum("kc,bchw->bkhw", components, said["high"] - mean)
        assert (np.abs(own["high"] - high) <= 2**-11 * np.abs(high) + 2**-25 + SLACK).all()
        back = np.einsum("kc,bkhw->bchw", components, high) + mean
        for name, exact in (("low", own["low"] * scale), ("high", back)):
            fields = {field: torch.from_numpy(own[field].copy()) for field, *_ in codecs[name].fields()}
            assert codecs[name].decode(fields).numpy() == pytest.approx(exact, abs=1e-3)
            decoded += 1
    assert decoded == 2 * TRAIN
    # Dithered: right on average, and more than half a step off for some.
    steps = np.concatenate(seen).ravel()
    assert steps.size == TRAIN * VIEWS * 192 and abs(steps.mean()) < 0.02 and np.abs(steps).max() > 0.6


@pytest.mark.parametrize("name", ["fp16", "uint8"])
def test_maps_of_logits_are_within_the_bound_of_their_codec(scenery, name):
    recipe = load("scenes.yaml", [f"cache.logits={name}"])
    about, codec, worst = cached(recipe), LogitsCodec(name, 3, (4, 6)), 0.0
    stored = rows(recipe)
    for key, own in stored.items():
        logits, _ = live(recipe, key, own["view"])
        exact = logits - logits.max(axis=1, keepdims=True)
        error = np.abs(codec.decode(own) - exact)
        bound = 2**-11 * np.abs(exact) + 2**-25
        if name == "uint8":
            scale = own["logits_scale"][:, None, None, None]
            bound = 1.0003 * (np.sqrt(scale * np.abs(exact)) + scale / 4)
        assert (error <= bound + SLACK).all()
        worst = max(worst, float(error.max()))
    assert len(stored) == TRAIN and about["codec_error"]["logits"]["max_abs"] == pytest.approx(worst, abs=SLACK)
    assert about["codec_error"]["logits"]["count"] == TRAIN * VIEWS * 24


def test_the_validation_split_has_no_features(scenery):
    recipe = load("scenes.yaml")
    about, stored = cached(recipe, "val"), rows(recipe, "val")
    assert about["codec"]["features"] == about["feature_report"] == about["overflow"] == {}
    assert about["codec"]["bases_sha256"] is None
    assert not (places.signals_folder(recipe, "val") / BASES).exists()
    assert len(stored) == SPLITS["val"]
    for key, own in stored.items():
        assert own.dtype.names == ("row_crc", "view", "input_crc", "logits") and len(own) == 1
        size = Image.open(f"scenes/JPEGImages/{key}.jpg").size[::-1]
        assert own["view"][0] == assemble.view_policy(recipe).canonical(size)


# ---------------------------------------------------------------------------------------------- read and encoded


def at_work(*words: str) -> Extraction:
    """The extraction of the training split, its features as they are."""
    recipe = load("scenes.yaml", ["cache.features.high.pca=null", *words])
    return cache_teacher.extraction(recipe, "train", assemble.teacher(recipe, recipe.cache.features))


def parts(rows: Rows) -> list:
    """Everything in rows, to compare."""
    return [rows.keys, *(one if one is None else (one.shape, one.tobytes()) for one in rows[1:])]


def test_batches_that_are_read_several_at_a_time_are_those_of_one_after_the_other(scenery):
    work = at_work("cache.batch_size=3", "views.count=7")
    numbers, plain = [2, 0, 1], []
    for number in numbers:  # shards of 4, 4 and 2 examples
        rows = np.arange(work.examples.starts[number] * 7, work.examples.starts[number + 1] * 7)
        plain += [make_rows(work, *np.divmod(rows[first : first + 3], 7)) for first in range(0, len(rows), 3)]
    found = list(read_rows(work, numbers))
    assert len(found) == 5 + 10 + 10 and [parts(one) for one in found] == [parts(one) for one in plain]


def test_what_a_batch_raises_comes_out_in_its_place_and_nothing_is_left_running(scenery):
    work, before = at_work("cache.batch_size=2"), threading.active_count()
    good, bad = (np.array([0, 1]), np.array([0, 1])), (np.array([2, 2]), np.array([0, 1]))
    shard = work.examples.shard(0)
    with open(shard.path, "r+b") as file:
        file.seek(shard.member(2, "jpg")[0])
        file.write(b"\0")
    reading = made_rows(work, iter([good, good, bad, *[good] * 50]))
    assert parts(next(reading)) == parts(next(reading)) == parts(make_rows(work, *good))
    with pytest.raises(ShardError, match=f"example '{shard.key(2)}' is damaged"):
        next(reading)
    assert threading.active_count() == before
    endless = made_rows(work, itertools.repeat(good))
    next(endless)
    endless.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_an_example_is_encoded_as_its_rows_alone_are(scenery, batch_size):
    """Seven views: a batch ends within an example, holds one and a part, or a whole shard."""
    recipe = load("scenes.yaml", ["cache.features.high.pca=null", "views.count=7", f"cache.batch_size={batch_size}"])
    teacher = assemble.teacher(recipe, recipe.cache.features)
    work, device = cache_teacher.extraction(recipe, "train", teacher), torch.device("cpu")
    with answers(work, [0], teacher, device) as ran:
        batches = list(take(ran, 28))
    notes = {"quarantined": [], **dict.fromkeys(NOTED)}
    found = dict(encode(work, iter(batches), notes, lambda count: None))
    fields = {name: np.concatenate([one.fields[name] for one in batches]) for name in batches[0].fields}
    fields |= work.codec.encode(np.concatenate([one.logits for one in batches]))[0]
    views, crcs = (np.concatenate([getattr(one.rows, name) for one in batches]) for name in ("views", "crcs"))
    assert len(batches) == -(-28 // batch_size) and list(found) == work.examples.shard(0).keys
    for place, members in enumerate(found.values()):
        own = slice(7 * place, 7 * place + 7)
        plain = pack_rows(work.dtype, views[own], crcs[own], {name: one[own] for name, one in fields.items()})
        assert members == {"teacher.npy": to_npy(plain)}


# ---------------------------------------------------------------------------------------------- bad rows


@pytest.fixture
def odd(scenery) -> Path:
    """The scenery with one white picture, and teachers that make something of it."""
    (scenery / "scene_model.py").write_text(MODEL + ODD)
    path = scenery / "scenes" / "JPEGImages" / f"{WHITE}.jpg"
    Image.new("RGB", Image.open(path).size, "white").save(path, quality=95)
    shutil.rmtree("shards")
    pack_examples(load("scenes.yaml"))
    return scenery


def odd_recipe(network: str, *words: str) -> Recipe:
    overrides = [f"teacher.model=scene_model:{network}", "teacher.options={}", ONE_FEATURE, "student.taps={high: high}"]
    return load("scenes.yaml", [*overrides, *words])


@pytest.mark.parametrize("network", ["silent", "loud"])
def test_an_example_whose_feature_cannot_be_stored_is_listed_and_left_out(odd, network):
    recipe = odd_recipe(network, "cache.batch_size=1")
    about, stored = cached(recipe), rows(recipe)
    reason = "the teacher's high of views [0, 1] are not finite or too large for a row"
    [row] = about["quarantined"]
    assert row == {"key": WHITE, "reason": reason, "shard": row["shard"], "place": row["place"]}
    said = cache_teacher.summary("train", about, assemble.task(recipe))
    assert f"1 examples are quarantined; the first: '{WHITE}', {reason}" in said
    assert not stored[WHITE]["high"].any() and all(own["high"].any() for key, own in stored.items() if key != WHITE)
    # NaN is no overflow; what is too large for fp16 is counted number by number.
    large = np.abs(live(recipe, WHITE, stored[WHITE]["view"])[1]["high"]) > np.finfo(np.float16).max
    assert about["overflow"] == {"high": large.sum()} and (large.sum() > 0) == (network == "loud")
    warning = f"warning: {large.sum():,} values of 'high' overflow fp16; their rows are quarantined"
    assert (warning in said) == (network == "loud")
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    made = list(batches(corridor, 0, len(corridor), 0, False))
    keys = sorted(key for batch in made for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid)
    assert keys == sorted(2 * [key for key in stored if key != WHITE])
    assert sum(batch.total for batch in made) == 2 * (TRAIN - 1)


def test_bf16_holds_what_fp16_cannot(odd):
    about = cached(odd_recipe("loud", "cache.features={high: {tap: high, store: bf16}}"))
    assert about["quarantined"] == [] and about["overflow"] == {"high": 0}


def test_a_teacher_none_of_whose_rows_can_be_stored_is_one_sentence(odd):
    with pytest.raises(ShardError, match=r"no example has signals that could be stored, the first is '000': the teach"):
        cached(odd_recipe("loud", "teacher.options={limit: -1.0}"))
    assert not manifest.read_manifest(folder(odd_recipe("loud")))["complete"]
    shutil.rmtree(folder(odd_recipe("loud")))
    with pytest.raises(DataError, match="features are not finite on any of 5 views; check its weights and normal"):
        cached(odd_recipe("silent", "teacher.options={limit: -1.0}"))


# ---------------------------------------------------------------------------------------------- the bases


def test_bases_that_are_missing_changed_or_of_another_cache_are_refused(scenery):
    recipe = load("scenes.yaml")
    cached(recipe)
    path, refused = folder(recipe) / BASES, 0
    payload = path.read_bytes()
    flipped = bytearray(payload)
    flipped[-1] ^= 1
    other = load("scenes.yaml", ["teacher.seed=1", "teacher.name=second"])
    cached(other)
    foreign = (folder(other) / BASES).read_bytes()
    assert foreign != payload and len(foreign) == len(payload)
    words = f"^{path}: is missing or not the file that the features were reduced with; delete "
    for content in (None, bytes(flipped), foreign):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ShardError, match=words):
            assemble.training_corridor(recipe, "distill", 0, 1)
        refused += 1
    path.write_bytes(payload)
    assert refused == 3 and len(assemble.training_corridor(recipe, "distill", 0, 1)) > 0


def test_a_shard_that_is_lost_is_written_again_with_the_same_bases(scenery):
    recipe = load("scenes.yaml")
    cached(recipe)
    whole = {path.name: path.read_bytes() for path in folder(recipe).iterdir()}
    assert len(whole) == 3 * 2 + 2
    for name in ("signals-000001.tar", "signals-000001.idx"):
        (folder(recipe) / name).unlink()
    times = {path: path.stat().st_mtime_ns for path in folder(recipe).glob("*[!n]") if path.name != manifest.FILE_NAME}
    cached(recipe)
    assert {path.name: path.read_bytes() for path in folder(recipe).iterdir()} == whole
    assert len(times) == 5 and all(path.stat().st_mtime_ns == time for path, time in times.items())


# ---------------------------------------------------------------------------------------------- of another recipe


@pytest.mark.parametrize(
    "change, place, there, here",
    [
        ("cache.features.low.pool=1", "features.low.pool", "2", "1"),
        ("cache.features.low={tap: low, pool: 2, store: fp16}", "features.low.dither", "True", "False"),
        ("cache.features.high.store=bf16", "features.high.store", "'fp16'", "'bf16'"),
        ("cache.features.high.pca=5", "features.high.pca", "6", "5"),
        ("cache.features.high.tap=head", "features.high.tap", "'high'", "'head'"),
    ],
)
def test_another_codec_of_a_feature_is_refused_and_names_both_values(scenery, change, place, there, here):
    cached(load("scenes.yaml"))
    other = load("scenes.yaml", [change])
    with pytest.raises(MismatchError, match=f"was made with {place} = {there}, the recipe has {here}; restore the rec"):
        assemble.training_corridor(other, "distill", 0, 1)
    if change.endswith("head"):  # of three channels, which have no six principal components
        other = load("scenes.yaml", [change, "cache.features.high.pca=null"])
        place, there, here = "features.high.pca", "6", "None"
    with pytest.raises(MismatchError, match=f"was made with codec.{place} = {there}, the recipe says {here}"):
        cached(other)


def test_fewer_features_than_the_cache_holds_are_fine_and_more_are_yet_to_be_added(scenery):
    one = load("scenes.yaml", [ONE_FEATURE.replace("store", "pca: 6, store"), "student.taps={high: high}"])
    both = load("scenes.yaml")
    cached(both)
    times = {path: path.stat().st_mtime_ns for path in folder(both).iterdir()}
    assert cached(one)["codec"]["features"].keys() == {"low", "high"}  # done before
    assert times == {path: path.stat().st_mtime_ns for path in folder(both).iterdir()} and len(times) == 8
    corridor = assemble.training_corridor(one, "distill", 0, 1)
    assert corridor.features == ("high",) and corridor[0].signals.features.keys() == {"high"}
    shutil.rmtree(folder(both))
    assert cached(one)["codec"]["features"].keys() == {"high"}
    with pytest.raises(DataError, match=r"train/teacher: lacks low of views 0 to 1; run `kd-dist cache-teacher`, "):
        assemble.training_corridor(both, "distill", 0, 1)


# ---------------------------------------------------------------------------------------------- however it is made

LAZY = """

import time


def lazy(classes, width=8):
    parts = network(classes, width)
    parts.register_forward_hook(lambda *_: time.sleep(0.15))
    return parts
"""


@pytest.mark.slow
def test_one_process_and_two_write_the_same_features(scenery):
    """Batches of 3 rows; dithered rows and principal components, two processes of a real `accelerate launch`."""
    words = ["scenes.yaml", "cache.batch_size=3"]
    done(run(cache_teacher.main, words, folder=scenery))
    alone = contents(scenery / "shards", "**/teacher/*")
    assert len(alone) == (3 + 1) * 2 + 2 + 1  # tar and index of each shard; manifests; bases
    for path in (scenery / "shards").glob("scenes/*/teacher"):
        shutil.rmtree(path)
    options = journey.launcher_options(2, None)
    done(run(journey.launch, ["-m", "kd_dist.cache_teacher", *words], options, folder=scenery))
    assert contents(scenery / "shards", "**/teacher/*") == alone


@pytest.mark.slow
def test_a_killed_extraction_goes_on_with_the_same_bases(scenery):
    (scenery / "scene_model.py").write_text(MODEL + LAZY)
    words = ["scenes.yaml", "teacher.model=scene_model:lazy", "cache.batch_size=4"]
    done(run(cache_teacher.main, words, folder=scenery))
    whole = contents(scenery / "shards", "**/teacher/*")
    for path in (scenery / "shards").glob("scenes/*/teacher"):
        shutil.rmtree(path)
    place = scenery / "shards" / "scenes" / "train" / "teacher"
    child = start(cache_teacher.main, words, folder=scenery)
    wait_until((place / "signals-000000.idx").is_file, "shard 0")
    assert child.kill().status == -9
    assert not manifest.read_manifest(place)["complete"] and not (place / "signals-000002.idx").exists()
    times = {name: (place / name).stat().st_mtime_ns for name in (BASES, "signals-000000.tar", "signals-000000.idx")}
    done(run(cache_teacher.main, words, folder=scenery))
    assert contents(scenery / "shards", "**/teacher/*") == whole and len(whole) == 11
    assert times == {name: (place / name).stat().st_mtime_ns for name in times}
