"""The cache: the same bytes however it was made, complete or refused, readable by others, honest about bad rows."""

import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import webdataset
from accelerate import Accelerator
from PIL import Image
from processes import Started, contents, done, laboratory, run, sentence, start, start_ranks, wait_until
from safetensors.torch import save_file
from typer.testing import CliRunner

from kd_dist import assemble, cache_teacher, journey, manifest, places, train
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.disk import file_digest
from kd_dist.errors import MismatchError, ShardError, one_sentence
from kd_dist.recipe import Recipe
from kd_dist.rows import BASES
from kd_dist.shards import Shard, index_tar
from kd_dist.signals import LogitsCodec
from kd_dist.signals.codecs import CODECS
from kd_dist.views.images import VIEW_DTYPE, replay

TRAIN, VAL = 21, 9  # examples
RANDOM = "teacher.weights=null"  # a teacher that needs no training
SPLITS = ("train", "val", "test")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A user's folder with packed examples, which is also the working directory."""
    laboratory(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_model", raising=False)
    journey.pack_recipe(load("tiny.yaml"))
    return tmp_path


def cached(recipe: Recipe, split: str = "train") -> dict:
    """Cache one split in this process; returns the manifest."""
    return cache_teacher.cache_split(recipe, split, assemble.teacher(recipe), Accelerator(cpu=True))


def rows(recipe: Recipe, split: str = "train") -> dict[str, np.ndarray]:
    """Every example's rows (V,), read with NumPy alone."""
    found = {}
    for path in sorted(places.signals_folder(recipe, split).glob("*.tar")):
        shard = Shard(path)
        for place in range(len(shard)):
            [payload] = shard.read(place).values()
            found[shard.key(place)] = np.load(io.BytesIO(payload), allow_pickle=False)
    return found


def live(recipe: Recipe, key: str, views: np.ndarray) -> np.ndarray:
    """What the teacher says about these views (V,) of a picture, straight from the raw file."""
    image = np.asarray(Image.open(f"pictures/train/{key}.png").convert("RGB"))
    pixels = np.stack([replay(image, view, recipe.views.shape) for view in views])
    return assemble.teacher(recipe)(torch.from_numpy(pixels).permute(0, 3, 1, 2)).logits.numpy()


def shifted(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max(axis=1, keepdims=True)


# ---------------------------------------------------------------------------------------------- what is stored

# Largest error of z - max(z) that a codec may make on the logits of a tiny network, which are below 4.
ERRORS = {"fp32": 1e-6, "fp16": 4 * 2**-11, "uint16": 0.52 * 4 / 65535 + 1e-6, "uint8": 0.5001 * 4 / 255}


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("batch_size", [7, 64])
def test_every_codec_stores_what_the_live_teacher_says(home, codec, batch_size):
    """42 rows in shards of 16, 16 and 10: a batch of 7 ends inside an example, one of 64 holds a whole shard."""
    recipe = load("tiny.yaml", [RANDOM, f"cache.logits={codec}", f"cache.batch_size={batch_size}"])
    about = cached(recipe)
    stored, decode = rows(recipe), LogitsCodec(codec, 3).decode
    assert len(stored) == TRAIN == about["examples"] and len(about["shards"]) == 3
    policy, worst = assemble.view_policy(recipe), 0.0
    for key, own in stored.items():
        image = np.asarray(Image.open(f"pictures/train/{key}.png").convert("RGB"))
        assert [view.tolist() for view in own["view"]] == [
            policy.draw(key, number, image.shape[:2]).tolist() for number in range(2)
        ]
        error = np.abs(shifted(decode(own)) - shifted(live(recipe, key, own["view"]))).max()
        worst = max(worst, float(error))
    assert worst < ERRORS[codec]
    # The manifest states the error that was measured here.
    assert about["codec_error"]["logits"]["max_abs"] == pytest.approx(worst, abs=1e-6)
    assert about["codec_error"]["logits"]["count"] == 2 * TRAIN


def test_the_validation_split_has_the_canonical_view_alone(home):
    recipe = load("tiny.yaml", [RANDOM])
    assert cached(recipe, "val")["views"] == {"canonical": True, "count": 1, "size": [8, 8]}
    stored = rows(recipe, "val")
    assert len(stored) == VAL
    expected = assemble.view_policy(recipe).canonical((12, 10))
    assert all(len(own) == 1 and own["view"][0] == expected for own in stored.values())


def test_a_feature_that_no_stage_reads_is_pointed_out(scenery, capsys):
    cache_teacher.cache_teacher(load("scenes.yaml", ["student.taps={low: low}"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if "no stage reads" in line]
    assert lines == ["warning: no stage reads the feature 'high', which is cached all the same"]


def test_two_classes_store_one_margin(home):
    shutil.rmtree("shards")
    for split in SPLITS:
        shutil.rmtree(home / "pictures" / split / "blue")
    recipe = load("tiny.yaml", [RANDOM, "task.classes=2"])
    journey.pack_recipe(recipe)
    about, stored = cached(recipe), rows(recipe)
    assert len(stored) == 14
    dtype = next(iter(stored.values())).dtype
    assert dtype.names == ("row_crc", "view", "input_crc", "margin") and dtype["margin"] == np.dtype("<f2")
    assert dtype["view"] == VIEW_DTYPE and about["row_bytes"] == dtype.itemsize == 36
    assert set(about["exact_losses"]) == {"cross_entropy", "hard_label", "kd", "kd_binary", "logit_mse"}
    for key, own in stored.items():
        logits = live(recipe, key, own["view"])
        assert own["margin"] == pytest.approx(logits[:, 1] - logits[:, 0], abs=2e-3)


def test_the_teacher_report_counts_and_measures(home):
    recipe = load("tiny.yaml", [RANDOM, "cache.logits=fp32"])
    said = cached(recipe)["teacher_report"]
    assert said["rows"] == 2 * TRAIN and said["labelled_per_class"] == [14, 14, 14]
    right, nll, entropy = 0, 0.0, 0.0
    for key, own in rows(recipe).items():
        label = ("blue", "green", "red").index(key.split("/")[0])
        log_p = torch.log_softmax(torch.from_numpy(own["logits"].astype(np.float64)), dim=1).numpy()
        right += int((log_p.argmax(axis=1) == label).sum())
        nll -= float(log_p[:, label].sum())
        entropy -= float((np.exp(log_p) * log_p).sum())
    assert said["accuracy"] == pytest.approx(right / 42)
    assert said["nll"] == pytest.approx(nll / 42, rel=1e-5) and said["entropy"] == pytest.approx(entropy / 42, rel=1e-5)
    assert sum(said["predicted_per_class"]) == 42


def test_stock_webdataset_reads_examples_and_signals(home):
    recipe = load("tiny.yaml", [RANDOM])
    cached(recipe)
    stored = rows(recipe)
    urls = [str(path) for path in sorted(Path("shards/tiny/train").glob("*.tar"))]
    examples = {one["__key__"]: one for one in webdataset.WebDataset(urls, shardshuffle=False).decode("pil")}
    urls = [str(path) for path in sorted(Path("shards/tiny/train/teacher").glob("*.tar"))]
    signals = {one["__key__"]: one for one in webdataset.WebDataset(urls, shardshuffle=False).decode()}
    assert list(examples) == list(signals) and len(examples) == TRAIN
    for key, one in examples.items():
        assert np.array_equal(np.asarray(one["png"]), np.asarray(Image.open(f"pictures/train/{key}.png")))
        assert one["json"]["label"] == ("blue", "green", "red").index(key.split("/")[0])
        there = signals[key]["teacher.npy"]
        assert there.dtype == stored[key].dtype and len(there) == 2
        assert all(np.array_equal(there[name], stored[key][name]) for name in there.dtype.names)


# ---------------------------------------------------------------------------------------------- bad rows


def test_rows_that_are_not_finite_are_quarantined_and_listed(home):
    """The white picture, and it alone, makes this teacher say NaN."""
    words = [RANDOM, "teacher.model=tiny_model:fragile", "teacher.options={}"]
    recipe = load("tiny.yaml", words)
    about = cached(recipe)
    reason = "the teacher's logits of views [0, 1] are not finite or too large for a row"
    assert about["quarantined"] == [{"key": "red/00", "reason": reason, "shard": 2, "place": 2}]
    assert about["teacher_report"]["rows"] == 2 * (TRAIN - 1) and about["codec_error"]["logits"]["count"] == 40
    assert not rows(recipe)["red/00"]["logits"].any() and len(rows(recipe)) == TRAIN
    warning = f"warning: 1 examples are quarantined; the first: 'red/00', {reason}"
    assert warning in cache_teacher.summary("train", about, assemble.task(recipe))


def test_a_logit_too_large_for_fp16_is_quarantined_and_fp32_keeps_it(home):
    """One weight makes the margin between two classes 1e5 for every picture."""
    (home / "loud.py").write_text(
        "from torch import nn, stack\n\n\nclass Loud(nn.Module):\n    def forward(self, x):\n"
        "        m = x.mean(dim=(1, 2, 3))\n        return stack([m * 0, m, (m > 0.7) * 1e5], dim=1)\n\n\n"
        "def network(classes):\n    return Loud()\n"
    )
    words = [RANDOM, "teacher.model=loud:network", "teacher.options={}"]
    assert [row["key"] for row in cached(load("tiny.yaml", words))["quarantined"]] == ["red/00"]
    words += ["cache.logits=fp32", "teacher.name=exact"]
    assert cached(load("tiny.yaml", words))["quarantined"] == []


def test_a_teacher_that_says_nothing_finite_is_an_error(home):
    words = [RANDOM, "teacher.model=tiny_model:fragile", "teacher.options={limit: -1.0}"]
    with pytest.raises(ShardError, match="no example has signals that could be stored, the first is"):
        cached(load("tiny.yaml", words))
    assert not manifest.read_manifest("shards/tiny/train/teacher")["complete"]


# ---------------------------------------------------------------------------------------------- done, or of another


def test_a_finished_cache_is_left_alone(home):
    recipe = load("tiny.yaml", [RANDOM])
    cached(recipe)
    folder = places.signals_folder(recipe, "train")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cached(recipe)["examples"] == TRAIN
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()} and len(times) == 7


def test_an_index_that_has_lost_its_notes_is_one_sentence(home):
    """As `index_tar` leaves it, in a folder that is not finished."""
    recipe = load("tiny.yaml", [RANDOM])
    whole, folder = cached(recipe), places.signals_folder(recipe, "train")
    manifest.write_manifest(folder, {**whole, "complete": False})
    index_tar(folder / "signals-000001.tar")
    with pytest.raises(ShardError, match=r"signals-000001.idx: lacks what the command that wrote it noted, 'error'; "):
        cached(recipe)
    (folder / "signals-000001.idx").unlink()
    assert cached(recipe) == whole


@pytest.mark.parametrize(
    "change, place, there, here",
    [
        ("cache.logits=uint8", "codec.logits", "'fp16'", "'uint8'"),
        ("views.flip=0.25", "views.flip", "0.5", "0.25"),
        ("views.seed=1", "views.seed", "0", "1"),
        ("cache.batch_size=9", "execution.batch_size", "8", "9"),
        ("teacher.options={width: 6}", "teacher.options.width", "8", "6"),
        ("teacher.mean=[0.5, 0.5, 0.5]", "teacher.mean", "None", r"\[0.5, 0.5, 0.5\]"),
    ],
)
def test_a_cache_of_another_recipe_is_refused_and_names_both_values(home, change, place, there, here):
    cached(load("tiny.yaml", [RANDOM]))
    with pytest.raises(MismatchError, match=f"was made with {place} = {there}, the recipe says {here}; restore"):
        cached(load("tiny.yaml", [RANDOM, change]))


def test_a_cache_of_other_weights_is_refused_and_names_both_digests(home):
    digests = {}
    for seed in (1, 2):
        recipe = load("tiny.yaml", [RANDOM, f"teacher.seed={seed}"])
        save_file(assemble.teacher(recipe).network.backbone.state_dict(), f"{seed}.safetensors")
        digests[seed] = file_digest(Path(f"{seed}.safetensors"))
    cached(load("tiny.yaml", ["teacher.weights=1.safetensors"]))
    other = load("tiny.yaml", ["teacher.weights=2.safetensors"])
    sentence = f"was made with teacher.weights_sha256 = '{digests[1]}', the recipe says '{digests[2]}'"
    with pytest.raises(MismatchError, match=sentence):
        cached(other)
    # Training says so too, and `run` before it would skip the cache as done.
    with pytest.raises(MismatchError, match=f"{digests[1]}', the recipe has '{digests[2]}'; restore"):
        assemble.training_corridor(other, "distill", 0, 1)


def test_examples_that_were_packed_anew_make_the_cache_stale(home):
    recipe = load("tiny.yaml", [RANDOM])
    cached(recipe)
    shutil.move("shards/tiny/train/teacher", "kept")
    shutil.rmtree("shards")
    Image.new("RGB", (10, 12), "black").save("pictures/train/red/00.png")
    journey.pack_recipe(recipe)
    shutil.move("kept", "shards/tiny/train/teacher")
    with pytest.raises(MismatchError, match="was made with examples_fingerprint = '[0-9a-f]{64}', the recipe says '"):
        cached(recipe)
    with pytest.raises(MismatchError, match="was made from examples [0-9a-f]{12}, .*train now holds [0-9a-f]{12}"):
        assemble.training_corridor(recipe, "distill", 0, 1)


# ---------------------------------------------------------------------------------------------- however it is made


@pytest.mark.slow
def test_one_process_and_two_write_the_same_bytes(home):
    """Batches of 7 rows, two processes of a real `accelerate launch`; the teacher leaves a trace of where it ran."""
    words = [RANDOM, "cache.batch_size=7", "teacher.model=tiny_model:witness"]
    done(run(cache_teacher.main, ["tiny.yaml", *words], folder=home))
    alone = contents(home / "shards")
    # tar and index of each shard, of examples and signals; manifests; the lock of the command that packed
    assert len(alone) == (3 + 2 + 2) * 2 * 2 + 2 * 3 + 1
    for split in SPLITS:
        shutil.rmtree(home / "shards" / "tiny" / split / "teacher")
    options = journey.launcher_options(2, None)
    done(run(journey.launch, ["-m", "kd_dist.cache_teacher", "tiny.yaml", *words], options, folder=home))
    assert {path.name for path in home.glob("rank-*")} == {"rank-None-of-None", "rank-0-of-2", "rank-1-of-2"}
    assert contents(home / "shards") == alone


@pytest.mark.slow
def test_a_killed_extraction_goes_on_and_ends_with_the_same_bytes(home):
    words = [RANDOM, "teacher.model=tiny_model:slow", "teacher.options={}", "cache.batch_size=4"]
    done(run(cache_teacher.main, ["tiny.yaml", *words], folder=home))
    whole = contents(home / "shards")
    folder = home / "shards" / "tiny" / "train" / "teacher"
    for split in SPLITS:
        shutil.rmtree(home / "shards" / "tiny" / split / "teacher")
    kept: dict[str, int] = {}
    for number in range(2):
        child = start(cache_teacher.main, ["tiny.yaml", *words], folder=home)
        wait_until((folder / f"signals-{number:06d}.idx").is_file, f"shard {number}")
        assert child.kill().status == -9
        assert not manifest.read_manifest(folder)["complete"]
        assert not (folder / f"signals-{number + 1:06d}.idx").exists()
        for name, moment in kept.items():
            assert (folder / name).stat().st_mtime_ns == moment, f"{name} was written again"
        kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("signals-*.idx")}
    done(run(cache_teacher.main, ["tiny.yaml", *words], folder=home))
    assert contents(home / "shards") == whole


def test_the_inspect_command_says_what_a_cache_holds(scenery):
    words, recipe = ["inspect", "scenes.yaml"], load("scenes.yaml")
    before = CliRunner().invoke(app, words)
    assert isinstance(before.exception, ShardError) and "there is no manifest" in str(before.exception)
    cache_teacher.cache_teacher(recipe)
    folders = {split: places.signals_folder(recipe, split) for split in ("train", "val")}
    made = {split: manifest.read_manifest(folder) for split, folder in folders.items()}
    found = CliRunner().invoke(app, [*words, "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout) == made
    digest = made["train"]["teacher"]["weights_sha256"][:12]
    text = CliRunner().invoke(app, words).stdout
    for split, folder in folders.items():
        assert f"{folder}: scene_model:network, weights random, seed 0, sha256 {digest}\n" in text
        assert cache_teacher.summary(split, made[split], assemble.task(recipe)) in text
    report = made["train"]["feature_report"]["low"]
    assert text.count("  low: 208 bytes a row, 1/7.4 of fp16; relative error ") == 1
    assert f"relative error {report['relative_error']:.3f}, cosine {report['cosine']:.4f}, gradient cosine " in text
    manifest.write_manifest(folders["val"], {**made["val"], "complete": False})
    assert CliRunner().invoke(app, words).stdout.endswith("not finished; run `kd-dist cache-teacher` again\n")


@pytest.mark.slow
def test_a_half_made_cache_is_refused_in_one_sentence(home):
    recipe = load("tiny.yaml", [RANDOM])
    cached(recipe)
    path = home / "shards" / "tiny" / "train" / "teacher" / manifest.FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "complete": False}))
    said = sentence(run(train.main, ["tiny.yaml", "--stage", "distill", RANDOM], folder=home))
    assert said.endswith("/teacher: not finished; run the command that makes it once more, it goes on where it was")


# ---------------------------------------------------------------------------------------------- whatever happens

SMALL = [RANDOM, "data.shard_size=4"]  # many shards, so many moments between two of them
FEATURES = 'cache.features={body: {tap: "2", pca: 4}}'  # bases to be killed while they are fitted


@pytest.fixture
def ward(tmp_path, monkeypatch) -> Path:
    """A user's folder with its examples in shards of four: 6, 3 and 3 in the splits."""
    laboratory(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_model", raising=False)
    journey.pack_recipe(load("tiny.yaml", SMALL))
    return tmp_path


def undisturbed(home: Path, *words: str) -> dict[str, bytes]:
    """What the command leaves when nothing happens to it; the folders are as before."""
    cache_teacher.main(["tiny.yaml", *words])
    whole = signals(home)
    forget(home)
    return whole


def signals(home: Path) -> dict[str, bytes]:
    return contents(home / "shards" / "tiny", "*/teacher/*")


def forget(home: Path) -> None:
    for split in SPLITS:
        shutil.rmtree(home / "shards" / "tiny" / split / "teacher", ignore_errors=True)


def started(home: Path, words: list[str], count: int) -> list[Started]:
    """The command, in so many processes."""
    if count == 1:
        return [start(cache_teacher.main, ["tiny.yaml", *words], folder=home)]
    return start_ranks(cache_teacher.main, count * [["tiny.yaml", *words]], home)


def published(home: Path) -> int:
    return sum(path.suffix != ".tmp" for path in (home / "shards" / "tiny").glob("*/teacher/*"))


def ward_round(home: Path, words: list[str], total: int, random: Random) -> tuple[bool, int]:
    """Start the command on what is there and send it a signal at some moment of its life. Returns whether it came in
    time, and how many files were there by then."""
    count, number = random.choice((1, 2)), random.choice((signal.SIGKILL, signal.SIGTERM))
    running, moment = started(home, words, count), random.randrange(total + 1)
    if random.random() < 0.7 and moment > published(home):
        over = [one.process for one in running]
        wait_until(lambda: published(home) >= moment or not any(one.is_alive() for one in over), f"file {moment}")
        time.sleep(random.uniform(0, 0.02))
    else:
        time.sleep(random.uniform(0, 1.0))  # while it starts, or finds out what is done
    there = published(home)
    for one in running:
        one.send(number)
    ended = [one.wait() for one in running]
    for one in ended:
        assert one.status in (0, -number) and not re.search("^error|^Traceback", one.output, re.M), one
    hit = [one.status == -number or " stopped by SIGTERM after " in one.stderr for one in ended]
    return any(hit), there


def ward_rounds(home: Path, rounds: int) -> None:
    """Kill and resume, on one process or two; nothing that was published ever differs from the undisturbed run."""
    sleepy = ["teacher.model=tiny_model:slow", "teacher.options={seconds: 0.01}", "cache.batch_size=4"]
    words, random = [*SMALL, FEATURES, *sleepy], Random(rounds)  # mostly at work on a shard, seldom between two
    whole = undisturbed(home, *words)
    assert len(whole) == 2 * (6 + 3 + 3) + 3 + 1  # tars and indexes, manifests, bases
    moments = []
    for _ in range(rounds):
        hit, there = ward_round(home, words, len(whole), random)
        if hit:
            moments.append(there)
        for name, content in signals(home).items():
            unfinished = name.endswith(".tmp") or (name.endswith(".json") and not json.loads(content)["complete"])
            assert unfinished or content == whole[name], name
        if not hit:
            assert signals(home) == whole
            forget(home)
    assert len(moments) > rounds / 2 and sum(0 < there < len(whole) for there in moments) > rounds / 4, moments
    assert 0 in moments
    done(run(cache_teacher.main, ["tiny.yaml", *words], folder=home))
    assert signals(home) == whole


@pytest.mark.slow
def test_killed_or_stopped_at_any_moment_it_ends_with_the_same_bytes(ward):
    ward_rounds(ward, 25)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(4 * 3600)
def test_a_thousand_kills_change_no_byte(ward):
    ward_rounds(ward, 1000)


SABOTEUR = """\
import torch
from torch import nn

strike = None


class Network(nn.Sequential):
    def forward(self, images):
        if strike is not None:
            strike(images)
        return super().forward(images)


def network(classes):
    return Network(
        nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes)
    )
"""
STRUCK = [*SMALL, "teacher.model=saboteur:network", "teacher.options={}", "cache.batch_size=1"]
# Val and test come before train: of each a trial of the teacher's shapes, then its 9 and 12 rows; in 3 and 3 shards.
EARLIER, JUDGED = 1 + 9 + 1 + 12, 6


@pytest.fixture
def struck(ward, monkeypatch) -> Iterator[Callable]:
    """`struck(number, action)`: the user's model calls `action()` in its forward pass of batch `number`, from 1."""
    (ward / "saboteur.py").write_text(SABOTEUR)
    monkeypatch.delitem(sys.modules, "saboteur", raising=False)
    import saboteur

    def arm(number: int, action: Callable[[], object]) -> list[int]:
        """Returns the numbers of the batches that came, for the test to see that the moment has come."""
        came = []

        def strike(images: torch.Tensor) -> None:
            came.append(len(came) + 1)
            if came[-1] == number:
                action()

        monkeypatch.setattr(saboteur, "strike", strike)
        return came

    yield arm


def said(*words: str) -> object:
    """What the command, in this process, ends with."""
    with pytest.raises(SystemExit) as ended, one_sentence():
        cache_teacher.main(["tiny.yaml", *words])
    return ended.value.code


def nothing_wrong(home: Path, whole: dict[str, bytes], shards: int | None = None) -> None:
    """A folder of an unfinished run holds nothing half-written, and what it holds is right."""
    there = signals(home)
    assert not [name for name in there if name.endswith(".tmp")]
    for name, content in there.items():
        assert content == whole[name] or (name.endswith(".json") and not json.loads(content)["complete"]), name
    assert shards is None or sum(name.endswith(".idx") for name in there) == shards


def goes_on(home: Path, whole: dict[str, bytes], *words: str) -> None:
    cache_teacher.main(["tiny.yaml", *words])
    assert signals(home) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_batch_and_keeps_what_is_finished(ward, struck, capsys, number):
    """Eight batches of train a shard: the twentieth is in the third, the first being the trial of the shapes."""
    whole = undisturbed(ward, *STRUCK)
    came = struck(EARLIER + 20, lambda: os.kill(os.getpid(), number))
    assert said(*STRUCK) == 0
    # The teacher speaks in a thread of its own: some batches pass before it is told.
    assert 20 <= len(came) - EARLIER <= 24
    last = capsys.readouterr().err.splitlines()[-1]
    name = signal.Signals(number).name
    assert last == f"cache train: stopped by {name} after 2 of 6 shards; the same command goes on"
    nothing_wrong(ward, whole, shards=JUDGED + 2)
    assert signal.getsignal(number) == signal.SIG_DFL
    struck(0, print)
    goes_on(ward, whole, *STRUCK)


def test_a_signal_while_the_bases_are_fitted(ward, struck, capsys):
    words = [*STRUCK, FEATURES]
    whole = undisturbed(ward, *words)
    came = struck(EARLIER + 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert said(*words) == 0 and 9 <= len(came) - EARLIER <= 13
    assert "cache train: stopped by SIGTERM after 0 of 6 shards; " in capsys.readouterr().err
    assert not [name for name in signals(ward) if name.startswith("train")]
    goes_on(ward, whole, *words)


def test_an_exception_of_the_users_model_is_theirs_and_leaves_nothing_half_written(ward, struck):
    whole = undisturbed(ward, *STRUCK)
    struck(EARLIER + 20, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), one_sentence():
        cache_teacher.main(["tiny.yaml", *STRUCK])
    nothing_wrong(ward, whole, shards=JUDGED + 2)
    goes_on(ward, whole, *STRUCK)


@pytest.mark.parametrize(
    "allocate, words",
    [
        (lambda: torch.empty(2**50), "DefaultCPUAllocator: can't allocate memory: you tried to allocate "),
        (lambda: bytearray(2**60), "MemoryError"),
        (lambda: np.empty(2**55), "Unable to allocate 256. PiB for an array with shape "),
    ],
)
def test_a_teacher_that_needs_too_much_memory(ward, struck, allocate, words):
    whole = undisturbed(ward, *STRUCK)
    struck(EARLIER + 20, allocate)
    sentence = said(*STRUCK)
    assert sentence.startswith("error: cache train: out of memory (") and words in sentence
    assert "or lower cache.batch_size (now 1) or views.size or take a smaller teacher, and delete shards/" in sentence
    nothing_wrong(ward, whole, shards=JUDGED + 2)
    struck(0, print)
    goes_on(ward, whole, *STRUCK)


FULL = ["signals-000001.tar", "signals-000001.idx", BASES, manifest.FILE_NAME]


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_a_sentence_and_what_is_finished_is_kept(ward, same_names, name):
    """The kernel's own full device is put where the file is begun."""
    words = [*SMALL, FEATURES]
    whole, folder = undisturbed(ward, *words), ward / "shards" / "tiny" / "train" / "teacher"
    folder.mkdir()
    same_names(folder / name).symlink_to("/dev/full")
    assert said(*words) == (
        f"error: shards/tiny/train/teacher/{name}: No space left on device; make room or choose another folder, then "
        f"run the same command again: finished shards and checkpoints are kept"
    )
    nothing_wrong(ward, whole, shards=JUDGED + name.startswith("signals"))
    assert (f"train/teacher/{name}" in signals(ward)) is False
    goes_on(ward, whole, *words)


def truncate(path: Path) -> None:
    os.truncate(path, 600)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)


def exchange(path: Path) -> None:
    for kind in (".tar", ".idx"):
        shutil.copy(path.with_name("data-000000" + kind), path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path.with_suffix(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, words",
    [
        (Path.unlink, "the tar cannot be read ("),
        (truncate, "bytes at 0 are there"),
        (flip, "is damaged: the CRC32 of its "),
        (exchange, "is damaged: the CRC32 of its "),
    ],
)
def test_examples_that_are_lost_or_changed_while_it_runs(ward, struck, fault, words):
    done(run(cache_teacher.main, ["tiny.yaml", *STRUCK], folder=ward))  # in this process no tar has been opened yet
    whole, path = signals(ward), ward / "shards" / "tiny" / "train" / "data-000005.tar"
    forget(ward)
    before = {one: one.read_bytes() for one in (path, path.with_suffix(".idx"))}
    came = struck(EARLIER + 3, lambda: fault(path))
    sentence = said(*STRUCK)
    assert {one: one.read_bytes() for one in before if one.exists()} != before and len(came) >= EARLIER + 3
    assert sentence.startswith("error: shards/tiny/train/data-000005.tar: ") and words in sentence
    nothing_wrong(ward, whole, shards=JUDGED + 5)  # all that came before it
    for one, content in before.items():
        one.write_bytes(content)
    struck(0, print)
    goes_on(ward, whole, *STRUCK)


def test_half_a_cache_is_not_continued_with_other_weights(ward, struck):
    """The weights keep their name and change their content between two runs."""
    words, digests = [*STRUCK[1:], "teacher.weights=own.safetensors"], []
    for seed in (2, 1):
        recipe = load("tiny.yaml", [*STRUCK, f"teacher.seed={seed}"])
        save_file(assemble.teacher(recipe).network.backbone.state_dict(), f"{seed}.safetensors")
        digests.append(file_digest(Path(f"{seed}.safetensors")))
    shutil.copy("1.safetensors", "own.safetensors")
    whole = undisturbed(ward, *words)
    struck(EARLIER + 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert said(*words) == 0
    shutil.copy("2.safetensors", "own.safetensors")
    before = signals(ward)
    assert f"made with teacher.weights_sha256 = '{digests[1]}', the recipe says '{digests[0]}';" in said(*words)
    assert signals(ward) == before and 0 < len(before) < len(whole)
    shutil.copy("1.safetensors", "own.safetensors")
    goes_on(ward, whole, *words)


SLOW = [*SMALL, "teacher.model=tiny_model:slow", "teacher.options={seconds: 0.05}", "cache.batch_size=4"]


@pytest.mark.slow
@pytest.mark.parametrize("rank, number", [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_dies_or_hangs_does_not_keep_the_others(ward, rank, number):
    words = [*SLOW, "cache.patience=0.03"]
    whole, folder = undisturbed(ward, *words), ward / "shards" / "tiny" / "train" / "teacher"
    both = started(ward, words, 2)
    wait_until((folder / f"signals-{rank:06d}.idx").is_file, f"the first shard of rank {rank}")
    both[rank].send(number)
    lost, place = sentence(both[1 - rank].wait()), "shards/tiny/train/teacher/signals-00000"
    assert both[rank].kill().status == -signal.SIGKILL
    assert re.match(rf"lost contact with the other processes \({place}\d\.tar is not there, and nothing new has", lost)
    assert lost.endswith("look for its message; the same command goes on from the last checkpoint or finished shards")
    kept = sum((folder / f"signals-{one:06d}.idx").is_file() for one in range(1 - rank, 6, 2))
    assert kept == 3  # all of its own
    for one in started(ward, words, 2):
        done(one.wait())
    assert signals(ward) == whole


NAPPING = """

import os
import time
from pathlib import Path

import tiny_model


class Napping(tiny_model.Noisy):
    def forward(self, images):
        Path(f"asked-{os.environ['RANK']}-{time.monotonic_ns()}").touch()
        return super().forward(images)


def network(classes):
    return Napping(*tiny_model.network(classes, 8), seconds=0.3)
"""


@pytest.mark.slow
def test_each_of_two_processes_stops_by_itself(ward):
    """One is at work on the bases, 11 batches; the other waits for them."""
    (ward / "napping.py").write_text(NAPPING)
    words = [*SMALL, FEATURES, "teacher.model=napping:network", "teacher.options={}", "cache.batch_size=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "before")
        recipe = load("tiny.yaml", words)
        for split in ("val", "test"):
            teacher = assemble.teacher(recipe, recipe.cache.features)
            cache_teacher.cache_split(recipe, split, teacher, Accelerator(cpu=True))
    both = started(ward, words, 2)

    def asked(rank: int) -> int:
        return len(list(ward.glob(f"asked-{rank}-*")))

    # Each tries out the teacher's shapes before, twice for each split; then one asks on.
    wait_until(lambda: asked(1) >= 6 and asked(0) >= asked(1) + 3, "one is at work and the other waits")
    before = asked(1)
    for one in both:
        one.send(signal.SIGTERM)
    for one in both:
        assert "cache train: stopped by SIGTERM after 0 of 6 shards; the same command goes on\n" in done(one.wait())
    assert not [name for name in signals(ward) if name.startswith("train")] and asked(1) == before
