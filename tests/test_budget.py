"""Before caching: the bytes that are told are those on the disk, a proposal fits its budget and can be pasted."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from processes import kd_dist, run, sentence
from scenes import MODEL, RECIPE
from typer.testing import CliRunner

from kd_dist import assemble, budget, cache_teacher, manifest, places
from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.errors import RecipeError
from kd_dist.recipe import Recipe, parse_bytes

SPLITS = ("train", "val")
NEAR = 0.05  # of the bytes on the disk

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
    """Bytes of a split's tars and indexes."""
    folder = places.signals_folder(recipe, split)
    found = [path.stat().st_size for path in folder.iterdir() if path.suffix in (".tar", ".idx")]
    assert found
    return sum(found)


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
        assert found["split_bytes"][split] == pytest.approx(on_disk(recipe, split), rel=NEAR)
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
    with pytest.raises(
        RecipeError, match="^cache.features names no feature; a budget chooses how features are stored$"
    ):
        budget.plan(recipe, 10**6)


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

    offered = [tuple(choice.values()) for choice in budget.combinations(rungs)]
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
    assert budget.worth(rungs) == [rung(40, 0.99), rung(10, 0.6)]
    assert budget.worth([rung(10, 0.1)]) == [rung(10, 0.1)]


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
    assert total <= room and found["proposal_bytes"] == pytest.approx(total, rel=NEAR)
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
    rungs = budget.measure_ladder(work, recipe.cache.features, teacher, teacher.network.mean.device)
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
    rungs = budget.measure_ladder(work, recipe.cache.features, teacher, teacher.network.mean.device)
    assert {rung["recipe"]["pca"] for rung in rungs["top"]} <= {None, 12}


def test_a_budget_that_nothing_fits_is_one_sentence(scenery):
    recipe = load("scenes.yaml")
    words = r"^the smallest signals that are tried take [0-9,]+ bytes for the training views, the budget leaves "
    with pytest.raises(RecipeError, match=words + "8,940; name fewer features, .*, or give [0-9,]+ bytes more$"):
        budget.plan(recipe, 20_000)
    with pytest.raises(RecipeError, match=words + "0; name"):
        budget.plan(recipe, 5)


# ---------------------------------------------------------------------------------------------- the commands


def without_none(found: dict) -> list[tuple[str, dict]]:
    """The proposal without the options that it leaves at null, which are not written."""
    return [
        (name, {"recipe": {option: value for option, value in one["recipe"].items() if value is not None}})
        for name, one in found["proposal"].items()
    ]


def test_the_plan_command_says_it_in_words_and_in_json(scenery):
    ended = CliRunner().invoke(app, ["plan", "scenes.yaml", "--budget", "100KB", "--json"])
    assert ended.exit_code == 0
    found = json.loads(ended.stdout)
    expected = budget.plan(load("scenes.yaml"), 100_000)
    assert {**found, "free_bytes": 0} == {**expected, "free_bytes": 0} and found["free_bytes"] > 10**6
    words = CliRunner().invoke(app, ["plan", "scenes.yaml", "--budget", "100KB"])
    assert words.exit_code == 0
    assert words.stdout.startswith("train: 20 views, 0.05 MB\nval: 4 views, 0.01 MB\nbytes of a training view: logits")
    assert "high 288, low 208\nin all 0.07 MB, free on the disk " in words.stdout
    assert f"within the budget, {found['proposal_bytes'] / 1e6:.2f} MB in all:\n" in words.stdout
    lines = words.stdout.splitlines()
    section = yaml.safe_load("\n".join(lines[lines.index("cache:") :]))
    kept = {"logits": "fp16", "batch_size": 8, "threads": 1}
    assert section["cache"] == {**kept, "features": {name: one["recipe"] for name, one in without_none(found)}}
    short = CliRunner().invoke(app, ["plan", "scenes.yaml", "views.count=4"])
    assert short.exit_code == 0 and short.stdout.startswith("train: 40 views, ") and "budget" not in short.stdout


@pytest.mark.slow
def test_the_plan_command_fails_in_one_sentence(scenery):
    ended = run(kd_dist, "plan", "scenes.yaml", "--budget", "lots", folder=scenery)
    assert sentence(ended) == "'lots' is no size; write a number and a unit, such as 20GB"
    ended = run(kd_dist, "plan", "scenes.yaml", "--budget", "1KB", folder=scenery)
    assert sentence(ended).startswith("the smallest signals that are tried take ")
