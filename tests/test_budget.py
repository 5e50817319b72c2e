"""Before caching: the bytes that are told are those on the disk, a proposal fits its budget and can be pasted, hours
follow from what was measured."""

import itertools
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import pack_examples
from processes import kd_dist, run, sentence
from scenes import MODEL, RECIPE
from test_remote import served
from typer.testing import CliRunner

from kd_dist import assemble, budget, cache_teacher, forecast, manifest, places, proposals
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.errors import DataError, RecipeError
from kd_dist.forecast import Timing
from kd_dist.recipe import Recipe, parse_bytes

SPLITS = ("train", "val")
DIGITS = 80  # bytes of a shard's index that depend on how long the numbers are that it notes
BASES = 300  # bytes of the file of principal components that are not theirs

# ---------------------------------------------------------------------------------------------- sizes in words


@pytest.mark.parametrize(
    "text, size",
    [
        ("20GB", 20 * 10**9),
        ("1.5T", 1.5 * 10**12),
        ("800 MB", 800 * 10**6),
        (" 3kb ", 3000),
        ("7", 7),
        ("7B", 7),
        ("0.5K", 500),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size and isinstance(parse_bytes(text), int)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.0GB", "1e9", "2GiB", "1,000", "10 GB free", "1.GB", "nan"])
def test_what_is_no_size_is_one_sentence(text):
    with pytest.raises(RecipeError, match=f"^'{text}' is no size; write a number and a unit, such as 20GB$"):
        parse_bytes(text)


# ---------------------------------------------------------------------------------------------- bytes


def on_disk(recipe: Recipe, split: str) -> int:
    """Bytes of all that caching has left of a split but its manifest."""
    folder = places.signals_folder(recipe, split)
    found = [path.stat().st_size for path in folder.iterdir() if path.name != manifest.FILE_NAME]
    assert len(found) >= 2
    return sum(found)


def assert_as_told(told: int, recipe: Recipe, split: str) -> None:
    """Tars to the byte, indexes to some digits."""
    folder = places.signals_folder(recipe, split)
    shards, bases = len(list(folder.glob("*.tar"))), (folder / "bases.safetensors").is_file()
    assert told == pytest.approx(on_disk(recipe, split), abs=DIGITS * shards + BASES * bases)
    assert not shards or DIGITS * shards < 0.01 * told


def cached(recipe: Recipe) -> dict[str, dict]:
    """Cache a recipe in this process; returns the manifests by split."""
    cache_teacher.cache_teacher(recipe)
    return {split: manifest.read_manifest(places.signals_folder(recipe, split)) for split in SPLITS}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["views.count=1", "data.shard_size=4"],
        ["views.count=40", "cache.logits=uint8"],
        # Fields that need padding between them and behind them: 3 bytes of int8, then fp32.
        ["cache.features={low: {tap: low, pool: 8, pca: 3}, high: {tap: high, pca: 1, store: fp32, pool: 4}}"],
        ["cache.features={low: {tap: low, store: bf16}, high: {tap: high, store: fp32}}", "cache.logits=fp32"],
    ],
)
def test_the_plan_is_what_caching_then_takes(scenery, words):
    recipe = load("scenes.yaml", words)
    found = budget.plan(recipe, None)
    assert not places.signals_folder(recipe, "train").exists()
    made = cached(recipe)
    assert found["row_bytes"] == {split: one["row_bytes"] for split, one in made.items()}
    views = recipe.views.count
    assert found["rows"] == {"train": 10 * views, "val": 4} and found["split_bytes"].keys() == set(SPLITS)
    for split in SPLITS:
        assert_as_told(found["split_bytes"][split], recipe, split)
    assert found["total_bytes"] == found["still_bytes"]
    assert budget.plan(recipe, None)["still_bytes"] <= (DIGITS + BASES) * 6
    assert found["example_bytes"]["signals"] == found["split_bytes"]["train"] / 10
    assert found["total_bytes"] == sum(found["split_bytes"].values()) < found["free_bytes"]
    report = made["train"]["feature_report"]
    assert found["feature_row_bytes"] == {name: one["bytes"] for name, one in report.items()} and len(report) == 2
    assert found["logits_row_bytes"] + sum(found["feature_row_bytes"].values()) <= found["row_bytes"]["train"]
    assert "proposal" not in found


def test_a_plan_without_features_is_of_logits_alone(scenery):
    recipe = load("scenes.yaml", ["cache.features={}", "student.taps={}", "stages.distill.losses={kd_pixel: {}}"])
    found, made = budget.plan(recipe, None), cached(recipe)
    assert found["feature_row_bytes"] == {} and found["row_bytes"]["train"] == found["logits_row_bytes"]
    assert found["row_bytes"] == {split: one["row_bytes"] for split, one in made.items()}
    fitting = budget.plan(recipe, 10**6)
    assert (fitting["proposal"], fitting["cache"]["logits"], fitting["proposal_bytes"]) == (
        {},
        "fp16",
        found["total_bytes"],
    )
    section = "\n".join(budget.sentences(fitting))
    assert yaml.safe_load(section[section.index("cache:") :]) == {"cache": fitting["cache"]}


# ---------------------------------------------------------------------------------------------- proposals


def faithful(found: dict) -> float:
    return sum(one["report"]["gradient_cosine"] for one in found["proposal"].values())


def test_a_smaller_budget_never_gives_more(scenery):
    recipe = load("scenes.yaml", ["views.count=20"])
    rooms = [10**9, 500_000, 300_000, 250_000, 200_000, 150_000]
    found = [budget.plan(recipe, room) for room in rooms]
    assert [one["proposal_bytes"] <= room for one, room in zip(found, rooms, strict=True)] == [True] * 6
    assert [faithful(one) for one in found] == sorted(map(faithful, found), reverse=True)
    sizes = [one["proposal_bytes"] for one in found]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    # `low` gives up most bytes for the least: pooled, while `high` keeps its grid.
    assert faithful(found[2]) > 1.999 and found[2]["proposal"]["high"]["recipe"]["pool"] == 1
    # With all the room there is, every feature keeps what the best rung keeps.
    assert faithful(found[0]) == pytest.approx(2, abs=1e-4) and faithful(found[-1]) < faithful(found[0])


def test_the_choices_hold_the_best_for_every_budget():
    random = np.random.default_rng(0)
    rungs = {
        name: [
            {"name": name, "report": {"bytes": int(size), "gradient_cosine": float(cosine)}}
            for size, cosine in zip(random.integers(1, 50, 5), random.random(5), strict=True)
        ]
        for name in "abc"
    }

    def total(choice: tuple, part: str) -> float:
        return sum(rung["report"][part] for rung in choice)

    offered = [tuple(choice.values()) for choice in proposals.combinations(rungs)]
    assert 3 <= len(offered) < 125
    everything = list(itertools.product(*rungs.values()))
    for room in range(int(min(total(one, "bytes") for one in everything)), 151):
        best = max(total(one, "gradient_cosine") for one in everything if total(one, "bytes") <= room)
        first = next(one for one in offered if total(one, "bytes") <= room)
        assert total(first, "gradient_cosine") == pytest.approx(best)


def test_rungs_that_a_smaller_one_beats_are_passed_over():
    def rung(size: int, cosine: float) -> dict:
        return {"recipe": {}, "report": {"bytes": size, "gradient_cosine": cosine}}

    rungs = [rung(80, 0.98), rung(40, 0.99), rung(40, 0.7), rung(20, 0.5), rung(10, 0.6), rung(10, 0.6)]
    assert proposals.worth(rungs) == [rung(40, 0.99), rung(10, 0.6)]
    assert proposals.worth([rung(10, 0.1)]) == [rung(10, 0.1)]


@pytest.mark.parametrize("room", [90_000, 50_000, 45_000])
def test_a_proposal_can_be_pasted_and_takes_what_it_says(scenery, room):
    found = budget.plan(load("scenes.yaml"), room)
    text = "\n".join(budget.sentences(found))
    pasted = text[text.index("cache:") :]
    [section] = yaml.safe_load(pasted).values()
    given = yaml.safe_load(RECIPE)
    given["cache"]["features"] = section["features"]
    Path("pasted.yaml").write_text(yaml.safe_dump({"name": "scenes", **given}))
    recipe = load("pasted.yaml")
    assert recipe.cache.features.keys() == {"low", "high"}
    for name, one in found["proposal"].items():
        assert {option: getattr(recipe.cache.features[name], option) for option in one["recipe"]} == one["recipe"]
    made = cached(recipe)
    total = sum(on_disk(recipe, split) for split in SPLITS)
    assert total <= room and found["proposal_bytes"] == pytest.approx(total, rel=0.02)
    for name, one in made["train"]["feature_report"].items():
        told = found["proposal"][name]["report"]
        assert (told["bytes"], told["fp16_bytes"]) == (one["bytes"], one["fp16_bytes"])
        assert told["gradient_cosine"] == pytest.approx(one["gradient_cosine"], abs=1e-3)


def test_a_tap_with_a_selector_can_be_pasted(scenery):
    Path("pair_model.py").write_text(
        "from scene_model import network as one\nfrom torch import nn\n\n\nclass Two(nn.Module):\n"
        "    def __init__(self, part):\n        super().__init__()\n        self.part = part\n\n"
        "    def forward(self, x):\n        return x, self.part(x)\n\n\nclass Last(nn.Module):\n"
        "    def forward(self, pair):\n        return pair[1]\n\n\ndef network(classes, width=4):\n"
        "    parts = one(classes, width)\n    parts.high = nn.Sequential(Two(parts.high), Last())\n    return parts\n"
    )
    words = ["teacher.model=pair_model:network", "cache.features.high.tap='high.0[1]'", "cache.features.high.pca=null"]
    text = "\n".join(budget.sentences(budget.plan(load("scenes.yaml", words), 10**6)))
    section = yaml.safe_load(text[text.index("cache:") :])
    assert section["cache"]["features"]["high"]["tap"] == "high.0[1]"


def test_what_may_not_be_pooled_is_not_proposed_pooled(scenery):
    words = ["cache.features={s: {tap: 'saliency(low)'}, m: {tap: low}}", "student.taps={m: low}"]
    recipe = load("scenes.yaml", words)
    teacher = assemble.teacher(recipe, recipe.cache.features)
    work = cache_teacher.extraction(recipe, "train", teacher)
    rungs = proposals.measure_ladder(work, recipe.cache.features, teacher, teacher.network.mean.device)
    pools = {name: {rung["recipe"]["pool"] for rung in tried} for name, tried in rungs.items()}
    assert pools == {"s": {1}, "m": {1, 2}}


def test_a_vector_with_more_channels_than_the_sample_has_rows_is_planned(scenery):
    """96 channels, 20 views: their 24 strongest components cannot be found."""
    Path("scene_model.py").write_text(
        MODEL.replace('parts.add_module("low"', 'parts.add_module("top", Top())\n    parts.add_module("low"')
        + '''

class Top(nn.Module):
    """A vector beside the map that passes through."""

    def __init__(self):
        super().__init__()
        self.vector = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 96))

    def forward(self, images):
        self.vector(images)
        return images
'''
    )
    words = ["cache.features={top: {tap: top.vector}}", "student.taps={top: top.vector}"]
    recipe = load("scenes.yaml", words)
    found = budget.plan(recipe, 10**9)
    assert found["feature_row_bytes"] == {"top": 96 + 2} and found["proposal"].keys() == {"top"}
    teacher = assemble.teacher(recipe, recipe.cache.features)
    work = cache_teacher.extraction(recipe, "train", teacher)
    rungs = proposals.measure_ladder(work, recipe.cache.features, teacher, teacher.network.mean.device)
    assert {rung["recipe"]["pca"] for rung in rungs["top"]} <= {None, 12}


def test_a_budget_that_nothing_fits_is_one_sentence(scenery):
    recipe = load("scenes.yaml")
    words = r"^the smallest signals that are tried take [0-9,]+ bytes, the budget is "
    with pytest.raises(RecipeError, match=words + "20,000; name fewer features, .*, or give [0-9,]+ bytes more$"):
        budget.plan(recipe, 20_000)
    with pytest.raises(RecipeError, match=words + "5; name"):
        budget.plan(recipe, 5)


# ---------------------------------------------------------------------------------------------- logits


MANY = '''\
"""A user's own source of so many classes, eight pictures a split."""

import functools
import io

from conftest import picture
from kd_dist.sources import Item, Listing


def read(number):
    buffer = io.BytesIO()
    picture(number % 3, number).save(buffer, format="PNG")
    return buffer.getvalue()


def source(classes):
    items = [Item(f"{split}-{number}", split, "png", number, functools.partial(read, number))
             for split in ("train", "val", "test") for number in range(8)]
    return Listing(tuple(f"c{number}" for number in range(classes)), items)
'''


def of_many_classes(*words: str) -> Recipe:
    Path("many.py").write_text(MANY)
    data = "data={source: 'many:source', options: {classes: 2000}, workers: 0}"
    return load("tiny.yaml", [data, "task.classes=2000", "teacher.weights=null", "views.count=40", *words])


def test_too_little_room_for_the_logits_of_many_classes_proposes_smaller_ones(experiment):
    recipe = of_many_classes("stages.distill.losses={kd: {temperature: 1}}")
    whole = budget.plan(recipe, 10**9)
    assert whole["cache"]["logits"] == "fp16" and whole["row_bytes"]["train"] == 32 + 4000
    made = {}
    for name in ("uint8", "top50", "top20", "top5"):
        other = budget.plan(of_many_classes(f"cache.logits={name}", "stages.distill.losses={kd: {}}"), None)
        made[name] = other["total_bytes"]
    assert sorted(made.values(), reverse=True) == list(made.values())
    # An untrained teacher's logits are nearly equal: of no small top-K is the gradient right, at any temperature.
    fitting = budget.plan(recipe, made["uint8"] + 100)
    assert fitting["cache"]["logits"] == "uint8" and fitting["proposal_bytes"] <= made["uint8"] + 100
    with pytest.raises(RecipeError, match="^the smallest signals that are tried take [0-9,]+ bytes, the budget is "):
        budget.plan(recipe, made["top20"] + 100)
    # One that is still to be trained may be as sure as it likes.
    waiting = of_many_classes("stages.distill.losses={kd: {temperature: 1}}", "teacher.weights=stage:teacher")
    fitting = budget.plan(waiting, made["top20"] + 100)
    assert fitting["cache"]["logits"] == "top20" and "has random weights" in fitting["estimated"][1]
    # What needs every logit is offered no top-K.
    every = of_many_classes("stages.distill.losses={logit_mse: {}}", "teacher.weights=stage:teacher")
    assert budget.plan(every, made["uint8"] + 100)["cache"]["logits"] == "uint8"
    with pytest.raises(RecipeError, match="^the smallest signals"):
        budget.plan(every, made["top20"] + 100)


def test_a_disk_that_is_too_small_is_one_sentence_with_a_way_out(experiment):
    words = ["teacher.weights=stage:teacher", "stages.distill.losses={kd: {temperature: 1}}"]
    free = budget.plan(of_many_classes(*words), None)["free_bytes"]
    views = int(1.2 * free / 8 / 4032)
    said = (
        r"^shards/tiny: [0-9,]+ bytes are still to be written and the disk has [0-9,]+; make room for [0-9,]+ more, "
        r"choose another data.shards, draw fewer views, store logits as `cache: {logits: uint8}`, which takes [0-9,]+ "
        r"bytes in all$"
    )
    with pytest.raises(RecipeError, match=said):
        budget.plan(of_many_classes(*words, f"views.count={views}"), None)
    with pytest.raises(RecipeError, match="make room for [0-9,]+ more, choose another data.shards, draw fewer views$"):
        budget.plan(of_many_classes(*words, f"views.count={1000 * views}"), None)
    assert not Path("shards").exists()


# ---------------------------------------------------------------------------------------------- before anything is


def test_a_plan_before_packing_and_before_training_is_that_of_afterwards(experiment):
    """Examples are counted from the listing, the teacher's weights are random: the bytes are those that come to be."""
    before = sorted(path for path in experiment.rglob("*") if "__pycache__" not in path.parts)
    words = ["views.mixup=0.5", "views.hue=0.1"]
    early = budget.plan(load("tiny.yaml", words), None)
    assert sorted(path for path in experiment.rglob("*") if "__pycache__" not in path.parts) == before
    packed, untrained = early["estimated"]
    assert packed.startswith("not packed yet: examples are counted from what data.source image_folder lists")
    assert untrained.startswith("stage:teacher is not there yet: the teacher has random weights")
    recipe = load("tiny.yaml", [*words, "teacher.weights=null"])
    made = pack_examples(recipe)
    tars = sum(path.stat().st_size for path in Path("shards").rglob("data-*") if path.suffix in (".tar", ".idx"))
    late = budget.plan(recipe, None)
    assert late["estimated"] == [] and late["rows"] == early["rows"] == {"train": 62, "val": 5, "test": 12}
    assert sum(one["examples"] for one in made.values()) == 48 and late["split_bytes"] == early["split_bytes"]
    # A tar of eight small pictures is rounded up to whole records, which weighs on this little.
    assert early["still_bytes"] - late["still_bytes"] == pytest.approx(tars, rel=0.3)
    cache_teacher.cache_teacher(recipe)
    for split in ("train", "val", "test"):
        assert_as_told(early["split_bytes"][split], recipe, split)
    with pytest.raises(
        DataError, match="^data.source image_folder: no example for split 'val'; it has \\['train'\\]$"
    ):
        budget.plan(load("tiny.yaml", ["name=other", "data.splits={train: 0.999998, val: 1e-6, test: 1e-6}"]), None)


# ---------------------------------------------------------------------------------------------- hours


HASTE = Timing(seconds=0.01)


def test_hours_are_measured_for_every_kind_of_stage_and_nothing_stays(experiment):
    stages = [
        "stages.distill.sam=0.05",
        "stages.distill.accumulate=2",
        "stages.pretrain.precision=bf16",
        "views.cutmix=1.0",
    ]
    live = "{losses: {kd: {}}, teacher: online, init: stage:pretrain, epochs: 3, batch_size: 8, lr: 1e-2}"
    Path("tiny.yaml").write_text(f"{Path('tiny.yaml').read_text()}  live: {live}\n")
    before = sorted(path for path in experiment.rglob("*") if "__pycache__" not in path.parts)
    recipe = load("tiny.yaml", stages)
    threads = torch.get_num_threads()
    found = budget.plan(recipe, None, HASTE)
    assert sorted(path for path in experiment.rglob("*") if "__pycache__" not in path.parts) == before
    assert torch.get_num_threads() == threads
    time = found["time"]
    assert time["stages"].keys() == {"pretrain", "distill", "live"} and time["measured"]["cache"]["rows"] > 0
    rate = time["measured"]["cache"]["rows"] / time["measured"]["cache"]["seconds"]
    assert time["cache_seconds"] == pytest.approx(sum(found["rows"].values()) / rate) == 3600 * time["cache_hours"]
    for name, one in time["stages"].items():
        its = time["measured"]["stages"][name]
        assert its["rows"] == 8 and its["steps"] >= 1 and its["step_seconds"] > its["wait_seconds"] > 0
        assert its["read_seconds"] > 0 and one["loaders"] >= 1
        assert one["examples_per_second"] == pytest.approx(8 / its["step_seconds"])
        assert one["bytes_per_second"] == pytest.approx(one["example_bytes"] * one["examples_per_second"])
        row = found["row_bytes"]["train"] if name == "distill" else 0
        assert one["example_bytes"] == 2 * found["example_bytes"]["packed"] + row  # every view has a partner
    alone, *listening = time["stages"].values()
    assert alone["break_even_epoch"] is None and alone["online_seconds"] is None
    for one in listening:
        assert one["break_even_epoch"] == -(-time["cache_seconds"] // one["online_seconds"])
    total = sum(one["online_seconds"] * one["epochs"] for one in listening)
    assert time["online_seconds"] == pytest.approx(total)
    text = "\n".join(budget.sentences(found))
    assert text.count("caching has paid for itself after ") == 2 and "\nall stages that listen: " in text


def test_features_of_a_packed_recipe_are_in_its_hours(scenery):
    found = budget.plan(load("scenes.yaml"), None, HASTE)
    time = found["time"]
    rate = time["measured"]["cache"]["rows"] / time["measured"]["cache"]["seconds"]
    # All 20 training views once more, to fit and to measure what codecs keep.
    assert time["cache_seconds"] == pytest.approx((20 + 4 + 20) / rate)
    assert time["stages"]["distill"]["example_bytes"] > found["row_bytes"]["train"] >= 500


def test_processes_divide_the_work_and_seeds_multiply_it(experiment):
    recipe = load("tiny.yaml", ["views.count=10", "stages.distill.max_steps=3", "views.mixup=0.5", "views.mixed=0.25"])
    one = {"rows": 8, "steps": 3, "step_seconds": 0.02, "validation_seconds": 0.001, "teacher_seconds": 0.01}
    one |= {"wait_seconds": 0.004, "read_seconds": 0.005}
    measured = {"device": "cpu", "cache": {"rows": 100, "seconds": 2.0}, "stages": {"pretrain": one, "distill": one}}
    measured["start"] = {"listed_seconds": 0.001, "opened_seconds": 0.01, "index_seconds": 0.0001}
    shards = {"train": [8, 8, 5], "val": [9], "test": [8, 2]}
    found = {
        "rows": {"train": 210, "val": 9, "test": 10},
        "row_bytes": {"train": 100},
        "example_bytes": {"packed": 1000},
        "example_requests": 1.25,
        "split_bytes": {"train": 2**24 + 3},
        "training_files": {
            "shards": 3,
            "signal_folders": 2,
            "row_reads": 1.0,
            "index_bytes": {"packed": 500, "signals": 900},
            "manifest_bytes": {"packed": 30, "signals": 60},
        },
    }
    single = forecast.outlook(recipe, measured, shards, found, Timing(), {})
    assert single["cache_seconds"] == pytest.approx(229 * 0.02)
    alone, taught = single["stages"].values()
    assert alone["examples_per_second"] == 400 and alone["example_bytes"] == 1250 and taught["example_bytes"] == 1350
    assert taught["bytes_per_second"] == 540_000
    assert alone["loaders"] == taught["loaders"] == 3  # 40 ms of reading beside 16 of a step
    assert alone["epoch_seconds"] == pytest.approx(21 / 400 + 9 * 0.001) and alone["epochs"] == 2
    assert taught["epochs"] == pytest.approx(24 / 21) and taught["online_seconds"] == pytest.approx(0.21)
    # Of 21 examples that are read from one folder, or three; 3 shards of 2.8 MB in each of two of them.
    for stage, folders, size in ((alone, 1, 500), (taught, 3, 1400)):
        assert stage["start_requests"] == 7 * folders and stage["index_bytes"] == size
        assert stage["start_bytes"] == size + 30 * folders
        assert stage["start_seconds"] == pytest.approx(0.003 * folders)
        assert stage["index_seconds"] == pytest.approx(0.0321 * folders)
    assert alone["epoch_requests"] == 1.25 * 21 and alone["requests_per_second"] == 500
    assert taught["epoch_requests"] == 2.25 * 21 and taught["requests_per_second"] == 900
    assert (alone["whole_bytes"], alone["whole_requests"]) == (21_000, 3)
    assert (taught["whole_bytes"], taught["whole_requests"]) == (21_000 + 2**24 + 3, 3 + 6)
    assert taught["break_even_epoch"] == 22 and single["online_seconds"] == pytest.approx(0.24)
    both = forecast.outlook(recipe, measured, shards, found, Timing(processes=2, seeds=3), {})
    # The first process has two of the three shards of training, the only one of val, and the larger of test.
    assert both["cache_seconds"] == pytest.approx((130 + 9 + 8) * 0.02)
    assert both["stages"]["distill"]["examples_per_second"] == 800
    assert both["stages"]["distill"]["online_seconds"] == pytest.approx(0.105)
    assert both["online_seconds"] == pytest.approx(0.36) and both["stages"]["distill"]["break_even_epoch"] == 28
    words = forecast.sentences(both)
    assert words[1] == "caching takes 2.9 s on each of 2 processes"
    keeps = "so 3 (data.workers) keep up with the rest of the step on each; here it waited 20% of its time"
    assert words.count(f"  to read an example takes a process 5.00 ms, {keeps}") == 2
    assert sum("for itself after 28 epochs, more than the 1.143 of one run: with " in one for one in words) == 1
    assert words[-1] == "all stages that listen with 3 seeds: 0.36 s of teacher in the loop, 2.9 s from a cache"
    assert [forecast.duration(one) for one in (0.0123, 42, 600, 7200)] == ["0.012 s", "42 s", "10.0 min", "2.0 h"]
    assert forecast.duration(0.0009) == "less than a millisecond" and forecast.paid_by(3, 30) == "after epoch 3, of 30"


# ---------------------------------------------------------------------------------------------- files and requests

UNTAUGHT = "teacher.weights=null"


def indexes(folder: Path) -> int:
    """Bytes of all indexes in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.idx"))


def of_shards(folder: Path) -> int:
    """Bytes that the shards take of a folder's manifest."""
    about = manifest.read_manifest(folder)
    text = (folder / manifest.FILE_NAME).read_text()
    without = json.dumps({**about, "shards": []}, indent=1, sort_keys=True) + "\n"
    assert json.loads(text) == about and len(about["shards"]) >= 4
    return len(text) - len(without)


def test_files_indexes_and_manifests_are_those_that_come_to_be(experiment):
    """Told before packing, and of a split that is thought of by a smaller one."""
    recipe = load("tiny.yaml", [UNTAUGHT])
    part = load("tiny.yaml", [UNTAUGHT, "name=part", "data.splits={train: 0.4, val: 0.4, test: 0.2}"])
    early = budget.plan(recipe, None)
    assert not Path("shards").exists()
    pack_examples(part)
    pack_examples(recipe)
    cached(recipe)
    packed, signals = places.shards_folder(recipe) / "train", places.signals_folder(recipe, "train")
    files = sum(path.is_file() for folder in (packed, signals) for path in folder.iterdir())
    fewer = manifest.read_manifest(places.shards_folder(part) / "train")["examples"]
    thought = budget.plan(part, None, examples=31)
    for told in (early["training_files"], thought["training_files"]):
        assert (told["shards"], told["signal_folders"], told["row_reads"], told["files"]) == (4, 1, 1, files)
        assert told["index_bytes"]["packed"] == pytest.approx(indexes(packed), rel=0.01)
        assert told["index_bytes"]["signals"] == pytest.approx(indexes(signals), abs=4 * DIGITS)
        listed = {"packed": of_shards(packed), "signals": of_shards(signals)}
        assert told["manifest_bytes"] == pytest.approx(listed, abs=2)
    assert fewer < 24 and thought["rows"] == {**early["rows"], "train": 62, "val": thought["rows"]["val"]}
    assert thought["split_bytes"]["train"] == pytest.approx(early["split_bytes"]["train"], abs=4 * DIGITS)
    assert thought["estimated"] == [f"31 training examples are thought of, each like the {fewer} that there are"]


def test_what_is_thought_of_needs_no_room(experiment):
    recipe = load("tiny.yaml", [UNTAUGHT, "data.shard_size=16384"])
    found = budget.plan(recipe, None, HASTE, examples=10**9)
    told = found["time"]["stages"]["distill"]
    assert found["still_bytes"] > found["free_bytes"] and told["epoch_requests"] == 2 * 10**9
    assert found["training_files"]["shards"] == 61_036 and told["start_seconds"] > 0 < told["index_seconds"]
    assert any(line.endswith(", which is too little") for line in budget.sentences(found))


def test_what_is_cached_already_is_a_part_of_what_is_thought_of(experiment):
    recipe = load("tiny.yaml", [UNTAUGHT])
    pack_examples(recipe)
    early = budget.plan(recipe, None, examples=10_000)
    cached(recipe)
    late = budget.plan(recipe, None, examples=10_000)
    there = sum(late["split_bytes"].values()) - late["split_bytes"]["train"] + on_disk(recipe, "train")
    assert budget.plan(recipe, None)["still_bytes"] == 0
    assert early["still_bytes"] - late["still_bytes"] == pytest.approx(there, rel=0.1)


def test_the_requests_to_a_store_are_those_that_come(experiment):
    words = [UNTAUGHT, "views.mixup=0.5"]
    recipe = load("tiny.yaml", words)
    pack_examples(recipe)
    cached(recipe)
    told = budget.plan(recipe, None, HASTE)["time"]["stages"]["distill"]
    with closing(served(Path("shards"))) as serving:
        store = next(serving)
        there = assemble.training_corridor(load("tiny.yaml", [*words, f"data.shards={store.url}"]), "distill", 0, 1)
        assert len(store.asked) == told["start_requests"] == 2 * (1 + 2 * 4)
        store.asked.clear()
        for cursor in range(len(there) // 2):  # of two epochs
            there[cursor]
        assert len(store.asked) == told["epoch_requests"] == 3 * 31


# ---------------------------------------------------------------------------------------------- the commands


def without_none(found: dict) -> list[tuple[str, dict]]:
    """The proposal without the options that it leaves at null, which are not written."""
    return [
        (name, {"recipe": {option: value for option, value in one["recipe"].items() if value is not None}})
        for name, one in found["proposal"].items()
    ]


def test_the_plan_command_says_it_in_words_and_in_json(scenery):
    ended = CliRunner().invoke(app, ["plan", "scenes.yaml", "--budget", "100KB", "--json", "--bytes-only"])
    assert ended.exit_code == 0
    found = json.loads(ended.stdout)
    expected = budget.plan(load("scenes.yaml"), 100_000)
    assert {**found, "free_bytes": 0} == {**expected, "free_bytes": 0} and found["free_bytes"] > 10**6
    words = CliRunner().invoke(app, ["plan", "scenes.yaml", "--budget", "100KB", "--bytes-only"])
    assert words.exit_code == 0
    assert words.stdout.startswith("train: 20 views, 54.1 KB\nval: 4 views, 11.1 KB\nbytes of a training view: logits")
    assert "high 288, low 208\nbytes of a training example: " in words.stdout
    still = forecast.volume(found["still_bytes"])
    said = f"\nsignals in all 65.2 KB; still to be written, packed examples too, {still}, free on the disk "
    assert said in words.stdout and "too little" not in words.stdout
    assert f"within the budget, {forecast.volume(found['proposal_bytes'])} in all:\n" in words.stdout
    lines = words.stdout.splitlines()
    section = yaml.safe_load("\n".join(lines[lines.index("cache:") :]))
    kept = {"logits": "fp16", "batch_size": 8, "threads": 1}
    assert section["cache"] == {**kept, "features": {name: one["recipe"] for name, one in without_none(found)}}
    short = CliRunner().invoke(app, ["plan", "scenes.yaml", "views.count=4", "--bytes-only"])
    assert short.exit_code == 0 and short.stdout.startswith("train: 40 views, ") and "budget" not in short.stdout


@pytest.mark.slow
def test_the_plan_command_fails_in_one_sentence(scenery):
    ended = run(kd_dist, "plan", "scenes.yaml", "--budget", "lots", folder=scenery)
    assert sentence(ended) == "'lots' is no size; write a number and a unit, such as 20GB"
    ended = run(kd_dist, "plan", "scenes.yaml", "--budget", "1KB", folder=scenery)
    assert sentence(ended).startswith("the smallest signals that are tried take ")
    ended = run(kd_dist, "plan", "scenes.yaml", "views.count=1000000000", folder=scenery)
    assert "bytes are still to be written and the disk has" in sentence(ended)
