"""Several teachers: each cached beside the others, their mean learned from, no other mean than of the same pixels."""

import functools
import hashlib
import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pack_examples, picture
from processes import done, run
from safetensors.torch import load_file
from trainings import result
from typer.testing import CliRunner

from kd_dist import assemble, budget, cache_teacher, caches, forecast, journey, manifest, places, report, train, trial
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.data import Corridor
from kd_dist.errors import MismatchError, ModelError
from kd_dist.forecast import Timing
from kd_dist.losses import LOSSES
from kd_dist.recipe import Recipe
from kd_dist.shards import Shard, write_shard
from kd_dist.signals import pack_rows, to_npy
from kd_dist.sources import Item, Listing

TRAIN, VIEWS = 30, 2  # examples, about, and views of each
SPLITS = ("train", "val", "test")
RANDOM = "teacher.weights=null"  # a teacher that needs no training
WIDE = "teachers.wide={model: 'tiny_model:network', options: {width: 12}, seed: 5}"
THIRD = "teachers.third={model: 'tiny_model:network', seed: 6}"
COMMANDS = [("verify", "--json"), ("inspect", "--json"), ("verify", "--examples", "4"), ("cache-teacher",)]
BOTH = [RANDOM, WIDE, "stages.distill.teachers=[teacher, wide]"]


def taught(recipe: Recipe, name: str = "distill") -> Corridor:
    return assemble.training_corridor(recipe, name, 0, 1)


def logits(corridor: Corridor, steps: int | None = None) -> dict[str, np.ndarray]:
    """What the signals of a corridor say, by key, (C, ...) each, of the first epochs."""
    found: dict[str, list[np.ndarray]] = {}
    for cursor in range(steps or len(corridor)):
        batch = corridor[cursor]
        for key, said in zip(batch.keys, batch.signals.logits.numpy(), strict=True):
            found.setdefault(key, []).append(said)
    return {key: np.stack(said) for key, said in found.items()}


def farthest(recipe: Recipe, said: Sequence[int] = (0, 1, 2)) -> float:
    """The largest difference between cached and live mean over some batches; of logits, up to a constant."""
    corridor, live, worst = taught(recipe), assemble.online_teacher(recipe, "distill"), 0.0
    for cursor in said:
        batch = corridor[cursor]
        stored, exact = batch.signals.logits, live(batch.images).logits
        assert stored.dtype == exact.dtype == torch.float32 and stored.shape == exact.shape
        if recipe.task.name != "regression":
            stored, exact = (one - one.mean(1, keepdim=True) for one in (stored, exact))
        worst = max(worst, float((stored - exact).abs().max()))
    return worst


# ---------------------------------------------------------------------------------------------- one more in a cache


def files(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file below a folder."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_second_teacher_leaves_what_is_there_as_it_is(packed, capsys):
    first = load("tiny.yaml", [RANDOM])
    cache_teacher.cache_teacher(first)
    before, identity = files(Path("shards")), assemble.stage_identity(first, "distill", taught(first))
    assert len(before) > 20
    recipe = load("tiny.yaml", BOTH)
    capsys.readouterr()
    cache_teacher.cache_teacher(recipe)
    said, after = capsys.readouterr().out, files(Path("shards"))
    assert said.count("done before") == 3 and "cache wide\n" in said
    assert {path: after[path] for path in before} == before
    more = [Path(path) for path in after.keys() - before.keys()]
    assert {str(path.parent) for path in more} == {f"shards/tiny/{split}/wide" for split in SPLITS}
    about = [manifest.read_manifest(f"shards/tiny/train/{name}") for name in ("teacher", "wide")]
    assert about[0]["views"] == about[1]["views"] and about[1]["teacher"]["options"] == {"width": 12}
    # To a stage that listens to the first alone nothing has changed; one that listens to both is another run.
    alone = load("tiny.yaml", [RANDOM, WIDE])
    assert assemble.stage_identity(alone, "distill", taught(alone)) == identity
    assert "teachers" not in identity["stage"]
    named = load("tiny.yaml", [*BOTH, "stages.distill.teachers=[teacher]"])
    assert assemble.stage_identity(named, "distill", taught(named)) == identity
    joint = assemble.stage_identity(recipe, "distill", taught(recipe))
    assert joint["signals"] != identity["signals"] and joint["stage"]["teachers"] == ["teacher", "wide"]
    turned = load("tiny.yaml", [*BOTH, "stages.distill.teachers=[wide, teacher]"])
    assert assemble.stage_identity(turned, "distill", taught(turned)) == joint


def test_a_teacher_that_no_stage_listens_to_is_pointed_out(packed, capsys):
    cache_teacher.cache_teacher(load("tiny.yaml", [RANDOM, WIDE]))
    assert "warning: no stage listens to the teacher 'wide', which is not cached\n" in capsys.readouterr().out
    assert not Path("shards/tiny/train/wide").exists()


def test_the_plan_counts_further_teachers(packed):
    one, two = (budget.plan(load("tiny.yaml", words), None) for words in ([RANDOM], BOTH))
    for part in ("rows", "row_bytes", "split_bytes"):
        beside = {f"{split}/wide": value for split, value in one[part].items()}
        # The index of each shard holds the teacher's name.
        assert two[part] == pytest.approx({**one[part], **beside}, abs=12)
    assert two["total_bytes"] == pytest.approx(2 * one["total_bytes"], abs=24)
    assert two["total_bytes"] == sum(two["split_bytes"].values())


@pytest.mark.parametrize("heard", ["teacher", "wide", "teacher, wide"])
def test_the_hours_of_a_stage_are_those_of_the_teachers_that_it_listens_to(packed, heard):
    recipe = load("tiny.yaml", [*BOTH, f"stages.distill.teachers=[{heard}]"])
    time = budget.plan(recipe, None, Timing(seconds=0.02))["time"]
    names = heard.split(", ")
    assert list(time["teachers"]) == [one.teacher.name for one in places.cached_teachers(recipe)]
    assert time["cache_seconds"] == sum(time["teachers"].values())
    stage = time["stages"]["distill"]
    cached = sum(time["teachers"][name] for name in names)
    assert stage["break_even_epoch"] == math.ceil(cached / stage["online_seconds"])
    assert ("  wide: " in "\n".join(forecast.sentences(time))) == ("wide" in names)


# ---------------------------------------------------------------------------------------------- the mean


# Largest error of a logit that a codec may make on those of a tiny network, which are below 4.
ERRORS = {"fp32": 1e-6, "fp16": 4 * 2**-11, "uint8": 0.5001 * 4 / 255}


@pytest.mark.parametrize("codec", ERRORS)
def test_the_mean_is_that_of_the_live_teachers(packed, codec):
    three = [*BOTH, THIRD, "stages.distill.teachers=[third, wide, teacher]"]
    recipe = load("tiny.yaml", [*three, f"cache.logits={codec}"])
    cache_teacher.cache_teacher(recipe)
    assert farthest(recipe) < 2 * ERRORS[codec]
    # A mean of its own: none of the three, and one of one.
    alone = [load("tiny.yaml", [*BOTH, THIRD, f"stages.distill.teachers=[{name}]"]) for name in ("wide", "third")]
    if codec == "fp16":
        joint = logits(taught(recipe))
        for one in alone:
            own = logits(taught(one))
            assert own.keys() == joint.keys() and len(own) >= TRAIN - 5
            assert max(np.abs(own[key] - joint[key]).max() for key in own) > 0.01
        assert farthest(alone[0]) < 2 * ERRORS[codec]


@pytest.mark.parametrize("classes", [3, 2])
def test_the_mean_of_a_teacher_with_itself_is_that_teacher(experiment, classes):
    words = [RANDOM, f"task.classes={classes}", "cache.logits=fp32"]
    if classes == 2:
        shutil.rmtree(experiment / "pictures/blue")
    pack_examples(load("tiny.yaml", words))
    twin = "{model: 'tiny_model:network', options: {width: 8}}"
    three = [f"teachers={{a: {twin}, b: {twin}}}", "stages.distill.teachers=[teacher, a, b]"]
    recipe = load("tiny.yaml", [*words, *three])
    cache_teacher.cache_teacher(recipe)
    joint, alone = logits(taught(recipe)), logits(taught(load("tiny.yaml", words)))
    assert joint.keys() == alone.keys() and len(alone) > 15
    assert all((joint[key] == alone[key]).all() for key in alone) and any(said.std() > 0 for said in alone.values())


def test_maps_have_a_mean_and_features_are_the_first_teachers(scenery, capsys):
    second = "teachers.second={model: 'scene_model:network', options: {width: 6}, seed: 3}"
    words = ["cache.logits=fp32", second, "stages.distill.teachers=[second, teacher]"]
    recipe, first = load("scenes.yaml", words), load("scenes.yaml", words[:2])
    cache_teacher.cache_teacher(recipe)
    assert manifest.read_manifest("shards/scenes/train/second")["codec"]["features"] == {}
    assert farthest(recipe) < 1e-5
    joint, alone = taught(recipe)[0].signals, taught(first)[0].signals
    assert joint.logits.shape == (4, 3, 4, 6) and not torch.equal(joint.logits, alone.logits)
    assert joint.features.keys() == alone.features.keys() and len(joint.features) == 3  # low, its scale, high
    assert all(torch.equal(joint.features[name], value) for name, value in alone.features.items())
    live = assemble.online_teacher(recipe, "distill")(taught(first)[0].images)
    torch.testing.assert_close(live.features, assemble.teacher(first, live.features)(taught(first)[0].images).features)


def test_maps_of_other_grids_have_no_mean(scenery):
    with open("scene_model.py", "a") as file:
        file.write("\n\ndef coarse(classes):\n    return nn.Sequential(network(classes), nn.AvgPool2d(2))\n")
    rough = "teachers.rough={model: 'scene_model:coarse'}"
    recipe = load("scenes.yaml", [rough, "stages.distill.teachers=[teacher, rough]"])
    with pytest.raises(ModelError) as caught:
        trial.check_models(recipe)
    assert str(caught.value) == (
        "stages.distill.teachers: give logits of other shapes, 'teacher' (3, 4, 6), 'rough' (3, 2, 3), which have no "
        "mean; take teachers that answer on one grid, or name one of them"
    )
    cache_teacher.cache_teacher(recipe)
    with pytest.raises(MismatchError) as caught:
        taught(recipe)
    assert str(caught.value) == (
        "shards/scenes/train/rough: has grid.0 = 2, shards/scenes/train/teacher has 4, so they have no mean; leave one "
        "of the two out of the stage's `teachers`"
    )
    live = assemble.online_teacher(recipe, "distill")
    with pytest.raises(ModelError, match=r"the shapes \(2, 3, 4, 6\), \(2, 3, 2, 3\), which have no mean"):
        live(torch.zeros(1, 3, 16, 24, dtype=torch.uint8))


# ---------------------------------------------------------------------------------------------- real numbers


NUMBERS = """\
name: numbers
task: {name: regression, outputs: [warm, bright]}
data: {source: "test_ensemble:coloured", splits: {train: 0.7, val: 0.3}, shard_size: 8, workers: 0}
views: {count: 2, size: 8, flip: 0.5}
teacher: {model: "tiny_model:network", options: {width: 8}, seed: 1}
teachers: {other: {model: "tiny_model:network", seed: 2}}
student: {model: "tiny_model:network"}
stages:
  distill: {losses: {ail: {}}, teachers: [teacher, other], epochs: 1, batch_size: 8, lr: 1e-3}
evaluate: {split: val}
"""


def coloured() -> Listing:
    """Pictures with two numbers each. A source of the user's own."""
    read = [functools.partial(_png, number) for number in range(12)]
    items = [Item(f"{n:02d}", "val" if n % 4 == 3 else "train", "png", (n / 12, -n / 20), read[n]) for n in range(12)]
    return Listing(("warm", "bright"), items)


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number % 3, number).save(buffer, format="png")
    return buffer.getvalue()


def test_outputs_have_a_mean_that_errs_no_more_than_the_mean_of_the_largest_errors(experiment):
    Path("numbers.yaml").write_text(NUMBERS)
    recipe = load("numbers.yaml")
    pack_examples(recipe)
    cache_teacher.cache_teacher(recipe)
    corridor = taught(recipe)
    assert farthest(recipe, range(len(corridor))) < 1e-6
    said = [manifest.read_manifest(f"shards/numbers/train/{name}")["teacher_report"] for name in ("teacher", "other")]
    eta = assemble.stage_losses(recipe, "distill", corridor)["ail"]["eta"]
    assert eta == pytest.approx(np.mean([one["largest_error"] for one in said])) and said[0] != said[1]
    errors = []
    for cursor in range(len(corridor)):
        batch = corridor[cursor]
        errors.append(LOSSES["mse"].function(batch.signals.logits, batch.targets))
    assert 0 < torch.cat(errors).max() <= eta


# ---------------------------------------------------------------------------------------------- what does not agree


def test_an_example_that_one_teacher_could_not_store_is_left_out(packed):
    """Each teacher breaks on other pictures."""
    Path("picky_model.py").write_text(
        "import torch\nfrom tiny_model import network\nfrom torch import nn\n\n\n"
        "class Picky(nn.Sequential):\n"
        "    def forward(self, images):\n"
        "        means = images.mean(dim=(2, 3))\n"
        "        broken = means.argmax(1) == self.channel\n"
        "        return super().forward(images) * torch.where(broken, torch.nan, 1.0)[:, None]\n\n\n"
        "def picky(classes, channel):\n"
        "    made = Picky(*network(classes))\n    made.channel = channel\n    return made\n"
    )
    model = "'picky_model:picky'"
    keys = ("teacher", "teachers.b")
    words = [f"{key}={{model: {model}, options: {{channel: {channel}}}}}" for channel, key in enumerate(keys)]
    recipe = load("tiny.yaml", [*words, "stages.distill.teachers=[teacher, b]"])
    cache_teacher.cache_teacher(recipe)
    about = [manifest.read_manifest(f"shards/tiny/train/{name}") for name in ("teacher", "b")]
    lost = [{row["key"] for row in one["quarantined"]} for one in about]
    assert all(lost) and not lost[0] & lost[1]
    corridor, kept = taught(recipe), set()
    first = [corridor[cursor] for cursor in range(corridor.plan.steps_per_epoch)]
    for batch in first:
        kept |= {key for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True) if valid}
        assert batch.signals.logits.isfinite().all()
    count = len(corridor.examples)
    assert len(kept) == count - len(lost[0] | lost[1]) > 0 and not kept & (lost[0] | lost[1])
    assert sum(batch.total for batch in first) == len(kept)


def rewritten(recipe: Recipe, split: str, field: str) -> None:
    """The second teacher's rows of a split, every CRC and digest right, as if of other pixels or of another view."""
    cache = caches.signals(recipe.with_teacher("wide"), split, assemble.examples(recipe, split))
    about = manifest.read_manifest(cache.folder)
    for number, path in enumerate(cache.paths):
        old, examples = cache.shard(number), []
        for place, key in enumerate(old.keys):
            rows = cache.rows(np.array([int(cache.starts[number]) + place] * VIEWS), np.arange(VIEWS)).copy()
            if field == "view":
                rows["view"]["flip"] ^= 1
            else:
                rows["input_crc"] ^= 1
            fields = {name: rows[name] for name in rows.dtype.names[3:]}
            packed = pack_rows(cache.dtype, rows["view"], rows["input_crc"], fields)
            examples.append((key, {"wide.npy": to_npy(packed)}))
        write_shard(path, examples, old.notes)
        about["shards"][number] = manifest.shard_entry(Shard(path))
    manifest.write_manifest(cache.folder, about)


@pytest.mark.parametrize(
    "field, seen", [("view", "other views"), ("input_crc", "pixels of CRC [0-9a-f]{8} and [0-9a-f]{8}")]
)
def test_teachers_that_have_not_seen_the_same_have_no_mean(packed, field, seen):
    recipe = load("tiny.yaml", BOTH)
    cache_teacher.cache_teacher(recipe)
    assert len(taught(recipe)[0].keys) == 8
    rewritten(recipe, "train", field)
    with pytest.raises(MismatchError) as caught:
        taught(recipe)[0]
    assert re.fullmatch(
        f"shards/tiny/train/wide and shards/tiny/train/teacher have {seen} of example '[a-z/0-9]+', so they have no "
        "mean; delete the one that `kd-dist verify` finds wrong and run `kd-dist cache-teacher`",
        str(caught.value),
    )


# ---------------------------------------------------------------------------------------------- the whole way


@pytest.mark.slow
def test_two_seeds_of_a_teacher_teach_together_and_have_their_rows(lab, tmp_path, monkeypatch):
    """What the README shows. With `teacher: online` the student ends with the same weights."""
    folder = tmp_path / "home"
    shutil.copytree(lab, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    done(run(train.main, ["tiny.yaml", "--stage", "teacher", "teacher.seed=1"], folder=folder))
    text = Path("tiny.yaml").read_text()
    Path("tiny.yaml").write_text(f"{text}\nteachers: {{second: {{run: runs/tiny/teacher/seed-1}}}}\n")
    best = "teacher.weights=runs/tiny/teacher/seed-0/best.safetensors"
    words = ["stages.distill.teachers=[first, second]", "teacher.name=first", "cache.logits=fp32"]
    done(run(cache_teacher.main, ["tiny.yaml", *words], folder=folder))
    for more in (["runs=live", best, "train.teacher=online"], []):
        done(run(train.main, ["tiny.yaml", "--stage", "distill", *words, *more], folder=folder))
    cached, live = (Path(runs) / "tiny/distill/seed-0" for runs in ("runs", "live"))
    assert result(cached)["identity"]["online_teacher"] is None
    assert [one["name"] for one in result(live)["identity"]["online_teacher"]] == ["first", "second"]
    ends = [load_file(one / "best.safetensors") for one in (cached, live)]
    assert len(ends[0]) == 4
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=1e-4)

    recipe = load("tiny.yaml", words)
    held = assemble.evaluation_corridor(recipe, "val", 0, 1, cached=True, teachers=["first", "second"])
    right = (held[0].signals.logits.argmax(1) == held[0].targets).float().mean()
    assert len(held) == 1
    for record in result(cached)["history"]:
        assert record["teacher_accuracy"] == pytest.approx(float(right))
    rows = {row["stage"]: row for row in report.summarise(journey.evaluate_recipe(recipe))}
    assert list(rows) == ["teacher", "second", "first + second", "distill"]
    assert rows["first + second"]["parameters"] == 2 * rows["teacher"]["parameters"]
    assert rows["distill"]["retention"] == pytest.approx(rows["distill"]["mean"] / rows["first + second"]["mean"])

    invoked = [CliRunner().invoke(app, [*command, "tiny.yaml", *words]) for command in COMMANDS]
    assert [one.exit_code for one in invoked] == [0, 0, 0, 0]
    verified, inspected, sentences, cached_before = (one.stdout for one in invoked)
    parts = [(name, split) for name in ("first", "second") for split in SPLITS]
    assert [(one["teacher"], one["split"]) for one in json.loads(verified)] == parts
    assert list(json.loads(inspected)) == [*SPLITS, *(f"{split}/second" for split in SPLITS)]
    assert [line.split(":")[0] for line in sentences.splitlines()] == [f"{name}, {split}" for name, split in parts]
    assert invoked[-1].stderr == "cache first, second: done before\n" and not cached_before
