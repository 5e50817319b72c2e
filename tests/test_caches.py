"""Views and features that are added to a cache: what is there stays as it is, and what is read is as if cached at once;
training on the first shards while the others are yet to come."""

import json
import shutil
import signal
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from processes import contents, done, laboratory, ranks, run, start, wait_until
from scenes import MODEL, SPLITS
from typer.testing import CliRunner

from kd_dist import assemble, cache_teacher, caches, journey, manifest, train
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.disk import file_digest
from kd_dist.errors import DataError, MismatchError, ShardError
from kd_dist.joined import JoinedSignals
from kd_dist.loader import batches
from kd_dist.remote import Remote
from kd_dist.rows import LOGITS, LayeredSignals, SignalShards
from kd_dist.verify import verify

TRAIN = SPLITS["train"]  # examples, in shards of 4, 4 and 2
ALONE = ["cache.batch_size=1"]  # a row's bytes do not depend on the rows beside it
HIGH = "cache.features={high: {tap: high, pca: 6, store: fp16}}"
FIRST = [*ALONE, HIGH, "student.taps={high: high}"]  # two views, one feature
SECOND = [*FIRST, "views.count=4"]
THIRD = [*ALONE, "views.count=4"]  # the feature `low`, too
TEACHER = Path("shards/scenes/train/teacher")


def cached(words: list[str], split: str = "train") -> dict:
    """Cache what is missing of one split in this process; returns the last manifest."""
    recipe = load("scenes.yaml", words)
    teacher = assemble.teacher(recipe, recipe.cache.features)
    return cache_teacher.cache_split(recipe, split, teacher, Accelerator(cpu=True))


def read(words: list[str], *features: str) -> caches.Signals:
    recipe = load("scenes.yaml", words)
    return caches.signals(recipe, "train", assemble.examples(recipe, "train"), features)


def every_row(signals: caches.Signals, first: int, end: int) -> np.ndarray:
    """The rows of these views of all training examples, example after example."""
    ids, views = np.divmod(np.arange(TRAIN * (end - first)), end - first)
    return signals.rows(ids, first + views)


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Of each file its sha256 and when it was last written."""
    return {path.name: (file_digest(path), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def identity(words: list[str]) -> dict:
    recipe = load("scenes.yaml", words)
    return assemble.stage_identity(recipe, "distill", assemble.training_corridor(recipe, "distill", 0, 1))


def at_once(words: list[str]) -> list[str]:
    """The words of another recipe, whose cache is made in one go."""
    words = [*words, "name=whole"]
    shutil.copytree("shards/scenes", "shards/whole", ignore=shutil.ignore_patterns("teacher*"))
    cached(words)
    return words


# ---------------------------------------------------------------------------------------------- what is added


def test_what_is_added_leaves_what_is_there_as_it_is_and_reads_as_if_cached_at_once(scenery):
    cached(FIRST)
    files, before, alone = state(TEACHER), identity(FIRST), read(FIRST, "high")
    assert len(files) == 8 and isinstance(alone, SignalShards)
    assert before["signals"] == manifest.fingerprint(manifest.read_manifest(TEACHER))

    about = cached(SECOND)
    assert about["views"]["first"] == about["views"]["count"] == 2 and about["codec"]["features"].keys() == {"high"}
    second = state(Path(f"{TEACHER}.1"))
    about = cached(THIRD)
    assert about["codec"]["logits"] is None and "first" not in about["views"] and about["views"]["count"] == 4
    assert about["codec"]["features"].keys() == {"low"} and about["exact_losses"] == about["near_losses"] == []
    assert manifest.read_manifest(TEACHER)["exact_losses"]
    assert [name for name, *_ in about["row_dtype"]] == ["row_crc", "view", "input_crc", "low_scale", "low"]
    assert cached(THIRD)["shards"] == about["shards"]  # done before
    assert sorted(path.name for path in TEACHER.parent.glob("teacher*")) == ["teacher", "teacher.1", "teacher.2"]
    assert state(TEACHER) == files and state(Path(f"{TEACHER}.1")) == second

    # A run from before is still that run; one that reads more, or fewer views, is another.
    assert identity(FIRST) == before != identity(SECOND) != identity(THIRD)
    assert identity([*FIRST, "views.count=1"])["signals"] == before["signals"]

    whole, layered = read(at_once(THIRD), "high", "low"), read(THIRD, "high", "low")
    assert isinstance(whole, SignalShards) and isinstance(layered, LayeredSignals) and len(layered.parts) == 3
    assert layered.dtype == whole.dtype
    ours, theirs = every_row(layered, 0, 4), every_row(whole, 0, 4)
    exact = [name for name in whole.dtype.names[1:] if name != "high"]
    assert exact == ["view", "input_crc", "logits", "low_scale", "low"] and len(ours) == 4 * TRAIN
    assert all((ours[name] == theirs[name]).all() for name in exact)
    # The components were fitted on two views there and on four here, so only what they stand for is alike.
    parts = [one.features["high"].basis for one in layered.parts[:2]]
    assert all(one.equal(other) for one, other in zip(*parts, strict=True))
    features = [
        one.features["high"].decode({"high": torch.from_numpy(rows["high"].copy())})
        for one, rows in ((layered, ours), (whole, theirs))
    ]
    gap = (features[0] - features[1]).norm() / features[1].norm()
    assert 0 < gap < 0.1


def test_views_and_a_feature_at_once_run_the_teacher_once_on_each_view(scenery):
    cached(FIRST)
    recipe = load("scenes.yaml", THIRD)
    found = caches.pieces(recipe, "train")
    assert [piece[:4] for piece in found] == [
        (0, 0, 2, {LOGITS, "high"}),
        (1, 0, 2, {"low"}),
        (2, 2, 2, {LOGITS, "high", "low"}),
    ]
    assert not caches.is_cached(recipe, "train") and caches.is_cached(load("scenes.yaml", FIRST), "train")
    cached(THIRD)
    assert caches.is_cached(recipe, "train")
    layered, whole = read(THIRD, "high", "low"), read(at_once(THIRD), "high", "low")
    ours, theirs = every_row(layered, 0, 4), every_row(whole, 0, 4)
    assert all((ours[name] == theirs[name]).all() for name in ("view", "input_crc", "logits", "low"))
    # So it is under a URL, where no folder is listed.
    fsspec.filesystem("memory").put("shards/scenes", "/added/scenes", recursive=True)
    there = "data.shards=memory://added"
    assert caches.is_cached(load("scenes.yaml", [*THIRD, there]), "train")
    away = read([*THIRD, there], "high", "low")
    assert isinstance(away.folder, Remote) and len(away.parts) == 3
    assert every_row(away, 0, 4).tobytes() == ours.tobytes()
    # What a stage does not need it does not read: of three folders the one with `low` alone.
    assert [one.folder.name for one in read(THIRD, "high").parts] == ["teacher", "teacher.2"]
    assert [one.folder.name for one in read([*THIRD, "views.count=2"], "low").parts] == ["teacher", "teacher.1"]
    assert [one.folder.name for one in read([*THIRD, "views.count=2"]).parts] == ["teacher"]


def test_mixed_views_that_are_added_have_the_partners_that_they_would_have_had(tmp_path, monkeypatch):
    laboratory(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiny_model", raising=False)
    words = ["teacher.weights=null", "views.mixup=0.8", "views.cutmix=1", *ALONE]
    made = {}
    for name, counts in (("grown", (1, 3)), ("whole", (3,))):
        for count in counts:
            recipe = load("tiny.yaml", [*words, f"views.count={count}", f"name={name}"])
            journey.pack_recipe(recipe)
            cache_teacher.cache_split(recipe, "train", assemble.teacher(recipe), Accelerator(cpu=True))
        examples = assemble.examples(recipe, "train")
        ids, views = np.divmod(np.arange(3 * len(examples)), 3)
        made[name] = caches.signals(recipe, "train", examples).rows(ids, views)
    assert made["grown"]["view"]["mixing"].any() and made["grown"]["view"]["partner"][1::3].any()
    for name in ("view", "input_crc", "logits"):
        assert (made["grown"][name] == made["whole"][name]).all()


def test_a_corridor_reads_every_view_and_feature_of_all_folders(scenery):
    for words in (FIRST, SECOND, THIRD):
        cached(words)
    whole, made = at_once(THIRD), {}
    for words in (THIRD, whole):
        recipe = load("scenes.yaml", [*words, "train.epochs=4"], "distill")
        corridor = assemble.training_corridor(recipe, "distill", 0, 1)
        assert corridor.features == ("low", "high") or set(corridor.features) == {"low", "high"}
        made[words[-1]] = list(batches(corridor, 0, len(corridor), 0, False))
    pairs = list(zip(*made.values(), strict=True))
    assert len(pairs) == 12  # 3 batches in each of 4 epochs, which show every view once
    for ours, theirs in pairs:
        assert ours.keys == theirs.keys and ours.images.equal(theirs.images)
        assert ours.signals.logits.equal(theirs.signals.logits)
        assert ours.signals.features["low"].equal(theirs.signals.features["low"])


def test_a_basis_is_fitted_once_and_lost_shards_of_an_addition_are_written_again(scenery):
    for words in (FIRST, SECOND):
        cached(words)
    added = Path(f"{TEACHER}.1")
    whole = contents(added)
    assert len(whole) == 8 and whole["bases.safetensors"] == (TEACHER / "bases.safetensors").read_bytes()
    report = json.loads(whole["manifest.json"])["feature_report"]["high"]
    assert "kept_variance" not in report and report["rows"] == 5
    for name in ("signals-000001.tar", "signals-000002.idx"):
        (added / name).unlink()
    about = json.loads(whole["manifest.json"])
    manifest.write_manifest(added, {**about, "complete": False})
    with pytest.raises(ShardError, match="teacher.1: not finished; run the command that makes it once more"):
        read(SECOND)
    recipe = load("scenes.yaml", THIRD)  # who wants more now lets what was begun be finished as it was begun
    assert [piece[:3] for piece in caches.pieces(recipe, "train")] == [(0, 0, 2), (1, 2, 2), (2, 0, 4)]
    cached(THIRD)
    assert contents(added) == whole


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, place, there, here",
    [
        ("cache.features.low.store=fp16", "features.low.dither", "True", "False"),
        ("views.flip=0.25", "views.flip", "0.5", "0.25"),
        ("views.seed=1", "views.seed", "0", "1"),
        ("teacher.seed=1", "teacher.weights", "'random, seed 0'", "'random, seed 1'"),
        ("cache.batch_size=2", "execution.batch_size", "1", "2"),
    ],
)
def test_an_addition_of_another_recipe_is_refused_and_names_both_values(scenery, change, place, there, here):
    """The first folder is taken for one of the changed recipe's, so that it is the addition that differs."""
    words = [*THIRD, change]
    words += ["cache.features.low.dither=false"] if "store" in change else []
    for known in (FIRST, THIRD):
        cached(known)
    about = manifest.read_manifest(TEACHER)
    changed = load("scenes.yaml", words)
    teacher = assemble.teacher(changed, changed.cache.features)
    about["views"] = caches.views_identity(changed, "train", 0, 2)
    about["teacher"] = manifest.plain(caches.teacher_identity(changed, teacher.network))
    about["execution"]["batch_size"] = changed.cache.batch_size
    manifest.write_manifest(TEACHER, about)
    said = rf"teacher.1: was made with (codec.)?{place} = {there}, the recipe "
    with pytest.raises(MismatchError, match=f"{said}says {here}"):
        cached(words)
    if "batch_size" not in change:  # which says nothing about what is stored
        with pytest.raises(MismatchError, match=f"{said}has {here}"):
            read(words, "high", "low")


def lie(words: list[str], **truths: object) -> None:
    """Put in the place of `teacher.1` what another recipe has there, with a manifest that says it is of this one."""
    about = manifest.read_manifest(f"{TEACHER}.1")
    shutil.copytree("shards/scenes", "shards/other", ignore=shutil.ignore_patterns("teacher*"))
    for known in (FIRST, THIRD):
        cached([*known, "views.count=2", "name=other", *words])
    shutil.rmtree(f"{TEACHER}.1")
    shutil.copytree("shards/other/train/teacher.1", f"{TEACHER}.1")
    there = manifest.read_manifest(f"{TEACHER}.1")
    manifest.write_manifest(f"{TEACHER}.1", {**there, **{name: about[name] for name in truths}})


def test_two_folders_that_saw_other_pixels_are_named(scenery):
    for known in (FIRST, [*THIRD, "views.count=2"]):
        cached(known)
    signals = read([*THIRD, "views.count=2"], "low")
    every_row(signals, 0, 2)
    lie(["views.seed=1"], views=None)
    signals = read([*THIRD, "views.count=2"], "low")
    words = r"^shards/scenes/train/teacher\.1/signals-000000\.tar: saw other pixels in view [01] of '\d+' than shards/"
    with pytest.raises(MismatchError, match=words + r"scenes/train/teacher/signals-000000\.tar did; delete shards/"):
        every_row(signals, 0, 2)


def test_verify_checks_what_was_added(scenery):
    for known in (FIRST, SECOND, THIRD):
        cached(known)
    recipe = load("scenes.yaml", THIRD)
    found = verify(recipe, "train", 3)
    assert found["ok"] and found["examples"] == 3 and found["features"].keys() == {"high", "low"}
    assert found["error"]["count"] == 3 * 3 * 24  # three examples of each of three folders, by places of a map
    path = Path(f"{TEACHER}.2/signals-000001.tar")
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[:-1] + b"\1")
    with pytest.raises(ShardError, match=r"teacher\.2/signals-000001\.tar: is missing or damaged, its sha256 is not"):
        verify(recipe, "train", 3)
    path.write_bytes(whole)
    shutil.rmtree(f"{TEACHER}.2"), shutil.rmtree(f"{TEACHER}.1")
    cached([*THIRD, "views.count=2"])
    assert verify(load("scenes.yaml", [*THIRD, "views.count=2"]), "train", 3)["ok"]
    lie(["teacher.seed=1"], teacher=None)
    found = verify(load("scenes.yaml", [*THIRD, "views.count=2"]), "train", 3)
    off = {name: one["relative_error"] for name, one in found["features"].items()}
    assert not found["ok"] and off["low"] > 0.1 > off["high"]


def test_inspect_and_run_see_what_is_added_and_what_is_missing(scenery, capsys):
    for known in (FIRST, SECOND, THIRD):
        cache_teacher.cache_teacher(load("scenes.yaml", known))
    said = capsys.readouterr().out
    assert "teacher on train, views 2 to 3: " in said and "added on train: " in said
    found = CliRunner().invoke(app, ["inspect", "scenes.yaml", *THIRD])
    lines = [line for line in found.stdout.splitlines() if line.startswith("shards/")]
    assert [line.partition(":")[0] for line in lines] == [
        *(f"{TEACHER}{added}" for added in ("", ".1", ".2")),
        "shards/scenes/val/teacher",
    ]
    there = json.loads(CliRunner().invoke(app, ["inspect", "scenes.yaml", *THIRD, "--json"]).stdout)
    assert list(there) == ["train", "train.1", "train.2", "val"]


# ---------------------------------------------------------------------------------------------- the first shards


def test_a_stage_on_the_first_shards_needs_no_others(scenery):
    cached(FIRST, "val")
    whole = cached(FIRST)
    recipe = load("scenes.yaml", [*FIRST, "train.shards=2"], "distill")
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    shown = {key for batch in batches(corridor, 0, len(corridor), 0, False) for key in batch.keys}
    assert len(shown) == len(corridor.examples) == 8
    before = assemble.stage_identity(recipe, "distill", corridor)
    assert corridor.signals.manifest["teacher_report"]["rows"] == 16 < whole["teacher_report"]["rows"]
    packed = corridor.examples.manifest["shards"]
    assert before["examples"] == manifest.digest(packed[:2]) != manifest.digest(packed) == identity(FIRST)["examples"]
    assert before["stage"]["shards"] == 2 and "shards" not in identity(FIRST)["stage"]
    # As if the last shard were yet to be written.
    (TEACHER / "signals-000002.idx").unlink()
    begun = ("shards", "quarantined", "examples", "codec_error", "teacher_report", "overflow", "exact_losses")
    left = {name: one for name, one in whole.items() if name not in begun}
    manifest.write_manifest(TEACHER, {**left, "complete": False})
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    assert assemble.stage_identity(recipe, "distill", corridor) == before
    assert corridor.signals.manifest["teacher_report"]["rows"] == 16
    with pytest.raises(DataError, match="teacher: 2 of the first 3 shards are finished, which a stage is to learn "):
        assemble.training_corridor(load("scenes.yaml", [*FIRST, "train.shards=3"], "distill"), "distill", 0, 1)
    with pytest.raises(DataError, match=r"train: holds 3 shards, and a stage is to learn from the first 4 \(`sha"):
        assemble.training_corridor(load("scenes.yaml", [*FIRST, "train.shards=4"], "distill"), "distill", 0, 1)
    with pytest.raises(MismatchError, match="was made with views.flip = 0.5, the recipe has 0.25"):
        other = load("scenes.yaml", [*FIRST, "train.shards=2", "views.flip=0.25"], "distill")
        assemble.training_corridor(other, "distill", 0, 1)
    # The student alone learns from the same examples, and of all shards a part says what the whole does.
    alone = assemble.training_corridor(load("scenes.yaml", [*FIRST, "train.shards=2"], "pretrain"), "pretrain", 0, 1)
    assert len(alone.examples) == 8 and alone.plan.order == corridor.plan.order
    assert cached(FIRST) == whole
    every = load("scenes.yaml", [*FIRST, "train.shards=3"], "distill")
    corridor = assemble.training_corridor(every, "distill", 0, 1)
    assert corridor.signals.manifest == manifest.read_manifest(TEACHER)
    assert corridor.signals.fingerprint == identity(FIRST)["signals"]


LAZY = """

import time


def lazy(classes, width=8):
    parts = network(classes, width)
    parts.register_forward_hook(lambda *_: time.sleep(0.1))
    return parts
"""


@pytest.mark.slow
def test_training_on_what_is_finished_while_the_rest_is_yet_to_come(scenery):
    """The command is stopped in the first folder, then killed in what is added; what was trained meanwhile stays."""
    (scenery / "scene_model.py").write_text(MODEL + LAZY)
    words = [*FIRST, "cache.batch_size=4", "teacher.model=scene_model:lazy"]
    child = start(cache_teacher.main, ["scenes.yaml", *words], folder=scenery)
    wait_until((TEACHER / "signals-000000.idx").is_file, "shard 0")
    child.send(signal.SIGTERM)
    assert "cache train: stopped by SIGTERM after 1 of 3 shards; the same command goes on" in child.wait().output
    assert not manifest.read_manifest(TEACHER)["complete"] and caches.is_cached(load("scenes.yaml", words), "val")
    early = ["scenes.yaml", "--stage", "distill", *words, "train.epochs=1", "train.shards=1"]
    with pytest.raises(ShardError, match="teacher: not finished; run the command that makes it once more"):
        read(words, "high")
    done(run(train.main, early, folder=scenery))

    done(run(cache_teacher.main, ["scenes.yaml", *words], folder=scenery))
    files = state(TEACHER)
    more = [*words, "views.count=6"]
    child = start(cache_teacher.main, ["scenes.yaml", *more], folder=scenery)
    wait_until(Path(f"{TEACHER}.1/signals-000000.idx").is_file, "shard 0 of what is added")
    assert child.kill().status == -9 and not caches.is_cached(load("scenes.yaml", more), "train")
    kept = state(Path(f"{TEACHER}.1"))["signals-000000.tar"]
    for ended in ranks(cache_teacher.main, 2 * [["scenes.yaml", *more]], scenery):
        done(ended)
    assert state(TEACHER) == files and state(Path(f"{TEACHER}.1"))["signals-000000.tar"] == kept
    result = assemble.stage_result(load("scenes.yaml", early[3:], "distill"), "distill")
    assert result["identity"]["stage"]["shards"] == 1
    done(run(train.main, ["scenes.yaml", "--stage", "distill", *more, "train.epochs=1", "runs=more"], folder=scenery))
    assert json.loads(Path("more/scenes/distill/seed-0/result.json").read_text())["identity"]["views"]["count"] == 6
    # One process in one go writes the same.
    there = contents(TEACHER.parent, "teacher.1/*")
    shutil.rmtree(f"{TEACHER}.1")
    cached(more)
    assert contents(TEACHER.parent, "teacher.1/*") == there and len(there) == 8


def test_parts_are_joined_with_what_was_added_to_them(scenery):
    for known in (FIRST, SECOND):
        cached(known)
    one, examples = read(SECOND, "high"), assemble.examples(load("scenes.yaml", SECOND), "train")
    both = JoinedSignals([one, one], [examples, examples])
    ids, views = np.array([0, TRAIN, TRAIN + 3, 7]), np.array([0, 3, 1, 2])
    rows, alone = both.rows(ids, views), one.rows(ids % TRAIN, views)
    assert all((rows[name] == alone[name]).all() for name in rows.dtype.names) and both.views == 4
