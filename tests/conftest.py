"""What several tests start from: a folder of tiny pictures, a user's own tiny network, a tiny recipe of both."""

import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from scenes import scenes

from kd_dist import assemble, places
from kd_dist.config import load
from kd_dist.pack import pack
from kd_dist.recipe import Recipe

torch.set_num_threads(1)
# The same cases in every run, and no verdict by the clock: the machine may be busy.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# The files whose slow tests take minutes, the longest first.
LONGEST = ["launch", "journey", "formats", "engine", "recipes", "faults", "cli", "export"]

CLASSES = ("blue", "green", "red")
PICTURES_OF_A_CLASS = 16

MODEL = '''\
"""A user's own model, some hundred parameters small."""

from torch import nn


def network(classes, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, classes),
    )
'''

RECIPE = """\
task: {classes: 3}
data:
  source: image_folder
  root: pictures
  splits: {train: 0.6, val: 0.2, test: 0.2}
  shard_size: 8
  workers: 0
views: {count: 2, size: 8, crop_scale: [0.5, 1], flip: 0.5, brightness: 0.2}
teacher: {model: "tiny_model:network", options: {width: 8}, weights: stage:teacher}
cache: {batch_size: 8}
student: {model: "tiny_model:network", options: {width: 2}}
stages:
  teacher: {model: teacher, losses: {cross_entropy: {}}, epochs: 2, batch_size: 8, lr: 1e-2}
  pretrain: {losses: {cross_entropy: {}}, epochs: 2, batch_size: 8, lr: 1e-2}
  distill: {losses: {cross_entropy: {weight: 0.5}, kd: {weight: 0.5}}, epochs: 2, batch_size: 8, lr: 1e-2}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first: one that begins last keeps one worker busy while the other has nothing to do."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def picture(label: int, seed: int) -> Image.Image:
    """A 12x10 picture: noise, brighter in the channel of its class."""
    pixels = np.random.default_rng([label, seed]).integers(0, 120, (12, 10, 3), np.uint8)
    pixels[..., 2 - label] += 100
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """An image folder of 3 classes of 16 pictures; not to be changed."""
    root = tmp_path_factory.mktemp("raw") / "pictures"
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(PICTURES_OF_A_CLASS):
            picture(label, number).save(root / name / f"{number:02d}.png")
    return root


@pytest.fixture
def same_names(monkeypatch) -> Callable[[Path], Path]:
    """Temporary names without chance in them: under which name a file is begun."""
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    return lambda path: path.with_name(f"{path.name}.{'0' * 8}.tmp")


@pytest.fixture
def experiment(tmp_path, pictures, monkeypatch) -> Path:
    """A user's folder, which is also the working directory: `tiny.yaml`, `pictures/`, `tiny_model.py`."""
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "tiny_model.py").write_text(MODEL)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def packed(experiment) -> Recipe:
    """The tiny recipe in the folder of `experiment`, with its examples packed under `shards/tiny/`."""
    recipe = load("tiny.yaml")
    pack_examples(recipe)
    return recipe


def pack_examples(recipe: Recipe) -> dict[str, dict]:
    """Pack the examples of a recipe as the pack command does; returns the manifests by split."""
    d = recipe.data
    return pack(
        places.shards_folder(recipe),
        source=d.source,
        root=d.root,
        options=d.options,
        fractions=d.splits,
        required=places.splits(recipe),
        task=assemble.task(recipe),
        shard_size=d.shard_size,
    )


@pytest.fixture
def scenery(tmp_path, monkeypatch) -> Path:
    """A user's folder with a tiny segmentation experiment, packed, which is also the working directory."""
    scenes(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "scene_model", raising=False)
    pack_examples(load("scenes.yaml"))
    return tmp_path


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """A folder in which the examples of `tiny.yaml` are packed and whose teacher is cached. Not to be changed."""
    from processes import done, laboratory, run
    from trainings import pack

    from kd_dist import cache_teacher, train

    folder = laboratory(tmp_path_factory.mktemp("lab"))
    done(run(pack, folder=folder))
    done(run(train.main, ["tiny.yaml", "--stage", "teacher"], folder=folder))
    done(run(cache_teacher.main, ["tiny.yaml"], folder=folder))
    return folder


@pytest.fixture
def home(lab, monkeypatch) -> None:
    """The test itself works in the laboratory, too, with the `tiny_model` of that folder."""
    monkeypatch.chdir(lab)
    monkeypatch.syspath_prepend(lab)
    monkeypatch.delitem(sys.modules, "tiny_model", raising=False)
