"""`kd-dist run` from raw pictures to the report: with a user's own packages, twice, and killed on the way."""

import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image
from processes import Ended, contents, done, kd_dist, laboratory, run, sentence, start, wait_until
from scenes import scenes

from kd_dist import cache_teacher, journey, train
from kd_dist.disk import file_digest

pytestmark = pytest.mark.slow

MODELS = '''\
"""A user's own models, in a package whose name kd_dist has too. They take their time with a batch."""

import time

from torch import nn


class Slow(nn.Sequential):
    def forward(self, images):
        time.sleep(0.1 if len(images) > 1 else 0)
        return super().forward(images)


def network(classes, width=4):
    return Slow(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
'''

SOURCE = '''\
"""A user's own source, in a package whose name kd_dist has a module of. It reads from a slow disk."""

import functools
import time

from kd_dist.sources.image_folder import image_folder


def read(kept):
    time.sleep(0.05)
    return kept()


def pictures(root):
    listing = image_folder(root)
    return listing._replace(items=[one._replace(read=functools.partial(read, one.read)) for one in listing.items])
'''

# What a report must say of each model, and what of it cannot be the same twice.
ROW = {"role", "name", "metric", "value", "seed", "metrics", "parameters", "macs", "latency_ms", "memory_mb"}
RUNS = "runs/tiny/{}/seed-{}"
STUDENTS = [RUNS.format("pretrain", 0), RUNS.format("distill", 0)]


def make(folder: Path) -> Path:
    """A user's folder with `models/` and `data/` packages of their own."""
    laboratory(folder)
    (folder / "tiny_model.py").unlink()
    for name, module, text in (("models", "mine", MODELS), ("data", "own", SOURCE)):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
        (folder / name / f"{module}.py").write_text(text)
    recipe = (folder / "tiny.yaml").read_text()
    recipe = recipe.replace("tiny_model:network", "models.mine:network").replace("image_folder", "data.own:pictures")
    (folder / "tiny.yaml").write_text(recipe.replace("epochs: 2", "epochs: 3"))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Ended]:
    """An uninterrupted run with two seeds."""
    folder = make(tmp_path_factory.mktemp("whole") / "home")
    return folder, run(kd_dist, "run", "tiny.yaml", "--seeds", "2", folder=folder)


def reported(folder: Path) -> dict:
    return json.loads((folder / "runs" / "tiny" / "report.json").read_text())


def same(rows: list[dict]) -> list[dict]:
    """Rows of a report without the clock's part of them."""
    return [{name: value for name, value in row.items() if name != "latency_ms"} for row in rows]


def test_a_run_with_the_users_own_packages_ends_with_a_report(whole):
    folder, ended = whole
    said = done(ended)
    models = reported(folder)["models"]
    assert [(row["role"], row["stage"], row["seed"]) for row in models] == [
        ("teacher", "teacher", 0),
        ("student_alone", "pretrain", 0),
        ("student_kd", "distill", 0),
        ("student_alone", "pretrain", 1),
        ("student_kd", "distill", 1),
    ]
    # conv 3*w*9 + w, linear 4*w*classes + classes; the convolution makes 4 x 4 positions
    sizes = {"teacher": 8, "student_alone": 2, "student_kd": 2}
    for row in models:
        width = sizes[row["role"]]
        assert set(row) >= ROW
        assert row["parameters"] == 28 * width + 12 * width + 3
        assert row["macs"] == 27 * width * 16 + 12 * width
        assert row["name"] == "models.mine:network" and row["metric"] == "accuracy"
        assert 0 <= row["value"] <= 1 and row["latency_ms"] > 0
    page = (folder / "runs" / "tiny" / "report.md").read_text()
    assert "| student + KD | models.mine:network | distill | 2 |" in page
    assert "`distill` against `pretrain`: " in page and "`distill` against `pretrain`: " in said
    assert (folder / "runs" / "tiny" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_values_are_those_of_the_best_weights_on_the_test_split(whole, monkeypatch):
    folder, _ = whole
    monkeypatch.chdir(folder)
    for row in reported(folder)["models"]:
        weights = folder / RUNS.format(row["stage"], row["seed"]) / "best.safetensors"
        record = json.loads((weights.parent / "evaluation-test.json").read_text())
        assert record["identity"]["weights"] == file_digest(weights)
        assert record["metrics"]["accuracy"] == row["value"]
        assert row["value"] * 12 == pytest.approx(round(row["value"] * 12))  # of 12 pictures


def test_two_seeds_give_a_mean_and_an_interval(whole):
    folder, _ = whole
    content = reported(folder)
    assert [(row["role"], row["seeds"]) for row in content["summary"]] == [
        ("teacher", 1),
        ("student_alone", 2),
        ("student_kd", 2),
    ]
    for row in content["summary"]:
        values = [one["value"] for one in content["models"] if one["stage"] == row["stage"]]
        assert row["mean"] == pytest.approx(statistics.fmean(values))
        if row["seeds"] == 1:
            assert row["interval"] is None
        else:  # Student's t with one degree of freedom: 12.706
            assert row["interval"] == pytest.approx(12.7062 * statistics.stdev(values) / math.sqrt(2), rel=1e-4)
    [gain] = content["gains"]
    assert (gain["stage"], gain["against"], gain["seeds"]) == ("distill", "pretrain", 2)
    means = {row["stage"]: row["mean"] for row in content["summary"]}
    assert gain["mean"] == pytest.approx(means["distill"] - means["pretrain"])
    # The two seeds are two runs.
    one, other = (folder / RUNS.format("distill", seed) / "best.safetensors" for seed in (0, 1))
    assert one.read_bytes() != other.read_bytes()


def test_a_second_run_does_nothing(whole):
    folder, _ = whole
    reports = {"report.json", "report.md", "curves.png"}  # written again, from the same results
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in reports]
    files = [path for path in files if "__pycache__" not in path.parts]
    before, first = {path: path.stat().st_mtime_ns for path in files}, reported(folder)
    said = done(run(kd_dist, "run", "tiny.yaml", "--seeds", "2", folder=folder))
    assert said.count("done before") == 9  # three splits, five stages and the cache
    assert {path: path.stat().st_mtime_ns for path in files} == before and len(files) > 50
    assert reported(folder) == first


def test_a_changed_recipe_does_not_pass_for_the_finished_one(whole):
    folder, _ = whole
    before = contents(folder, "runs/**/*", "shards/**/*")
    cases = [
        ("stages.distill.lr=0.02", "made with stage.lr = 0.01, the recipe says 0.02; restore the recipe"),
        ("views.flip=0.1", "views.flip = 0.5, the recipe "),
        ("data.shard_size=9", "made with shard_size = 8, the recipe says 9; restore the recipe"),
    ]
    for override, expected in cases:
        assert expected in sentence(run(kd_dist, "run", "tiny.yaml", override, folder=folder))
    assert contents(folder, "runs/**/*", "shards/**/*") == before


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_report(whole, tmp_path):
    """SIGKILL, as a power cut would, while it packs, trains the teacher, caches and distils. The student alone, which
    nothing interrupts, is the whole run's, for time."""
    folder = make(tmp_path / "home")
    shards = folder / "shards" / "tiny"
    moments = [
        (shards / "train" / "data-000001.idx", lambda: not manifest_says_complete(shards / "train")),
        (folder / RUNS.format("teacher", 0) / "checkpoint-00000003", lambda: not has_result(folder, "teacher")),
        (
            shards / "train" / "teacher" / "signals-000000.idx",
            lambda: not manifest_says_complete(shards / "train/teacher"),
        ),
        (folder / RUNS.format("distill", 0) / "checkpoint-00000006", lambda: not has_result(folder, "distill")),
    ]
    for path, in_the_middle in moments:
        if path == moments[-1][0]:
            take_over(whole, folder, RUNS.format("pretrain", 0))
        child = start(kd_dist, "run", "tiny.yaml", folder=folder)
        wait_until(path.exists, f"{path.name} of a run")
        ended = child.kill()
        assert ended.status == -9 and in_the_middle(), ended
    done(run(kd_dist, "run", "tiny.yaml", folder=folder))
    uninterrupted, _ = whole
    expected = [row for row in reported(uninterrupted)["models"] if row["seed"] == 0]
    assert same(reported(folder)["models"]) == same(expected) and len(expected) == 3
    assert contents(shards) == contents(uninterrupted / "shards" / "tiny")
    for stage in ("teacher", "distill"):
        place = RUNS.format(stage, 0)
        assert contents(folder / place, "*.safetensors") == contents(uninterrupted / place, "*.safetensors")
    assert not list(folder.rglob("*.tmp"))


def take_over(whole: tuple[Path, Ended], folder: Path, *places: str) -> None:
    """Copy folders of the whole run, which a run in `folder` then finds done."""
    for place in places:
        shutil.copytree(whole[0] / place, folder / place, dirs_exist_ok=True)


def manifest_says_complete(folder: Path) -> bool:
    return json.loads((folder / "manifest.json").read_text())["complete"]


def has_result(folder: Path, stage: str) -> bool:
    return (folder / RUNS.format(stage, 0) / "result.json").exists()


def test_segmentation_from_raw_pictures_to_a_report_with_classes_and_examples(tmp_path):
    """The teacher is given, no stage trains it: it has its row all the same. `run` finds the steps done, for time."""
    folder = scenes(tmp_path)
    done(run(kd_dist, "pack", "scenes.yaml", folder=folder))
    done(run(cache_teacher.main, ["scenes.yaml"], folder=folder))
    for stage in ("pretrain", "distill"):
        done(run(train.main, ["scenes.yaml", "--stage", stage], folder=folder))
    said = done(run(kd_dist, "run", "scenes.yaml", folder=folder))
    assert said.count("done before") == 6  # two splits, two of the cache, two stages
    made = folder / "runs" / "scenes"
    report = json.loads((made / "report.json").read_text())
    assert [(row["role"], row["stage"]) for row in report["summary"]] == [
        ("teacher", "given"),
        ("student_alone", "pretrain"),
        ("student_kd", "distill"),
    ]
    for row in report["summary"]:
        assert row["metric"] == "miou" and [name for name, *_ in row["parts"]] == ["ground", "left", "right"]
        assert row["mean"] == pytest.approx(statistics.fmean(value for _, value, _ in row["parts"]))
    page = (made / "report.md").read_text()
    assert "| part | given | pretrain | distill |" in page and "| left | " in page and "(examples.png)" in page
    with Image.open(made / "examples.png") as picture:  # image, truth and three models; four pictures of 16 x 24
        assert picture.mode == "RGB" and picture.width >= 5 * 24 and picture.height >= 4 * 16


# ---------------------------------------------------------------------------------------------- stopped; two at once


def started_by(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


@pytest.mark.parametrize(
    ("name", "what", "begun", "before", "after"),
    [
        ("SIGTERM", "teacher (seed-0)", RUNS.format("teacher", 0) + "/checkpoint-00000003", [], ["shards", *STUDENTS]),
        (
            "SIGUSR1",
            "cache teacher",
            "shards/tiny/val/teacher/signals-000000.idx",
            [RUNS.format("teacher", 0)],
            STUDENTS,
        ),
    ],
)
def test_a_run_that_is_stopped_says_so_and_begins_nothing_else(whole, tmp_path, name, what, begun, before, after):
    """What comes before and after the step is the whole run's, for time: it is refused unless the step ends with the
    same bytes."""
    folder = make(tmp_path / "home")
    take_over(whole, folder, *before)
    child = start(kd_dist, "run", "tiny.yaml", folder=folder)
    wait_until((folder / begun).exists, f"{begun} of a run")
    others = started_by(child.process.pid)
    assert len(others) >= 2  # the launcher and what it launched
    os.kill(child.process.pid, signal.Signals[name])
    ended = child.wait()
    assert ended.status == 0 and "Traceback" not in ended.output, ended
    assert ended.stderr.splitlines()[-1] == f"{what}: stopped by {name}; the same command goes on"
    assert all_gone(others)
    assert not (folder / RUNS.format("pretrain", 0)).exists()
    assert not (folder / begun).parent.joinpath("result.json").exists()
    take_over(whole, folder, *after)
    said = done(run(kd_dist, "run", "tiny.yaml", folder=folder))
    cached = len(re.findall("cache (train|val|test): done before", said))  # before the signal came
    assert said.count("done before") - cached == 3 + len(before) + len(after)  # splits, and the steps taken over
    expected = [row for row in reported(whole[0])["models"] if row["seed"] == 0]
    assert same(reported(folder)["models"]) == same(expected)
    for place, pattern in (("shards/tiny", "*/teacher/signals-*"), (RUNS.format("teacher", 0), "best.safetensors")):
        made = contents(folder / place, pattern)
        assert made and made == contents(whole[0] / place, pattern)


def test_a_run_is_stopped_between_launches_too(tmp_path):
    folder = make(tmp_path / "home")
    child = start(kd_dist, "run", "tiny.yaml", folder=folder)
    wait_until((folder / "shards/tiny/train/data-000000.idx").exists, "a first shard")
    os.kill(child.process.pid, signal.SIGTERM)
    ended = child.wait()
    said = ended.stderr.splitlines()[-1]
    who = r"pack (train|val|test): stopped by SIGTERM after \d of \d shards|kd-dist: stopped by SIGTERM"
    assert ended.status == 0 and re.fullmatch(f"({who}); the same command goes on", said)
    assert not (folder / "runs").exists()


def test_a_signal_that_comes_as_the_launcher_ends_is_not_lost(tmp_path, monkeypatch):
    """What stands for the launcher has nothing left to do when it sends it."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -USR1 $PPID\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert journey.launch(["script.py"], []) == "SIGUSR1"


def test_a_finished_cache_needs_no_lock(tmp_path):
    """It may be read-only: here no lock can be opened, even by root. Its teacher's weights are no file."""
    folder, words = make(tmp_path / "home"), ["cache-teacher", "tiny.yaml", "teacher.weights=null"]
    done(run(kd_dist, "pack", "tiny.yaml", folder=folder))
    done(run(cache_teacher.main, words[1:], folder=folder))
    lock = folder / "shards/tiny/.lock"
    lock.unlink()
    lock.mkdir()
    assert done(run(kd_dist, *words, folder=folder)).count("done before") == 3  # splits


def test_two_at_once_in_one_folder_are_refused_and_nothing_outlives_a_kill(tmp_path):
    """A stage, then the cache: a second command names the first, which is then killed; a third one goes on."""
    folder = make(tmp_path / "home")
    done(run(kd_dist, "pack", "tiny.yaml", folder=folder))
    for words, place, begun in (
        (["train", "tiny.yaml", "--stage", "teacher"], RUNS.format("teacher", 0), "checkpoint-00000003"),
        (["cache-teacher", "tiny.yaml"], "shards/tiny", "train/teacher/signals-000000.idx"),
    ):
        first = start(kd_dist, *words, folder=folder)
        wait_until((folder / place / begun).exists, f"{begun} of a command")
        others = started_by(first.process.pid)
        assert len(others) >= 2  # the launcher and what it launched
        for one in others:
            one.suspend()  # that the first is not done before the second has begun
        assert sentence(run(kd_dist, *words, folder=folder)) == (
            f"{place}: process {first.process.pid} on {socket.gethostname()} is writing here; wait for it, or choose "
            "another folder"
        )
        assert not all_gone(others)
        first.process.kill()  # that one alone
        assert first.wait().status == -signal.SIGKILL
        wait_until(lambda others=others: all_gone(others), "that no process is left of a killed command")
        done(run(kd_dist, *words, folder=folder))
    assert manifest_says_complete(folder / "shards/tiny/train/teacher") and has_result(folder, "teacher")


def test_two_that_pack_at_once_are_refused(whole, tmp_path):
    """The first is kept at its first picture until the second has been refused."""
    folder = make(tmp_path / "home")
    own = folder / "data" / "own.py"
    held = 'while "HELD" in os.environ and Path("held").exists():\n        time.sleep(0.05)'
    text = own.read_text().replace("time.sleep(0.05)", held)
    own.write_text(text.replace("import time\n", "import os\nimport time\nfrom pathlib import Path\n"))
    (folder / "held").touch()
    first = start(kd_dist, "pack", "tiny.yaml", folder=folder, HELD="1")
    begun = folder / "shards" / "tiny" / "test"
    wait_until(lambda: bool(list(begun.glob("data-000000.tar.*.tmp"))), "the first shard")
    before = contents(folder / "shards")
    second = run(kd_dist, "pack", "tiny.yaml", folder=folder)
    after = contents(folder / "shards")
    (folder / "held").unlink()
    assert sentence(second) == (
        f"shards/tiny: process {first.process.pid} on {socket.gethostname()} is writing here; wait for it, or choose "
        "another folder"
    )
    assert after == before
    done(first.wait())
    made, expected = (contents(one / "shards", "tiny/*/data-*", "tiny/*/manifest.json") for one in (folder, whole[0]))
    assert made == expected and len(made) == 2 * (3 + 2 + 2) + 3
    done(run(kd_dist, "pack", "tiny.yaml", folder=folder))  # what is done needs no lock


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("result.json", ["train", "tiny.yaml", "--stage", "distill"]),
        ("evaluation-test.json", ["evaluate", "tiny.yaml"]),
    ],
)
def test_a_damaged_result_is_one_sentence(whole, tmp_path, name, words):
    folder = tmp_path / "home"
    shutil.copytree(whole[0], folder)
    path = folder / RUNS.format("distill", 0) / name
    text = path.read_text()
    for damaged in (text[: len(text) // 2], "[]", "{}"):
        path.write_text(damaged)
        said = sentence(run(kd_dist, *words, folder=folder))
        assert said.startswith(f"{RUNS.format('distill', 0)}/{name}: is damaged (")
        assert said.endswith("); delete it and run the same command again")
    path.unlink()
    done(run(kd_dist, *words, folder=folder))
    assert json.loads(path.read_text()).keys() == json.loads(text).keys()
