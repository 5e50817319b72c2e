"""Folders that Hugging Face's `datasets` writes, read without a word to the network."""

import io
import pickle
import socket
from pathlib import Path

import datasets
import pytest
from conftest import CLASSES, PICTURES_OF_A_CLASS, pack_examples
from PIL import Image

from kd_dist import assemble
from kd_dist.config import load
from kd_dist.errors import DataError, RecipeError
from kd_dist.sources import list_items


@pytest.fixture
def offline(tmp_path, monkeypatch) -> None:
    """What datasets caches goes into the test's folder, and every connection fails."""

    def refused(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cached"))
    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def rows(pictures) -> datasets.Dataset:
    """The pictures of three classes, files embedded, the classes named."""
    files = [path for name in CLASSES for path in sorted((pictures / name).iterdir())]
    labels = [CLASSES.index(path.parent.name) for path in files]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES)), "note": datasets.Value("string")}
    )
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    columns = {"image": images, "label": labels, "note": ["x"] * len(files)}
    return datasets.Dataset.from_dict(columns, features)


def parquet(rows: datasets.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(path))


def images_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for name in CLASSES for path in sorted((folder / name).iterdir())]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_rows_are_items(offline, tmp_path, pictures, rows, kind):
    root = tmp_path / "data"
    if kind == "saved":
        rows.save_to_disk(str(root))
    else:
        for number in range(3):
            parquet(rows.shard(3, number, contiguous=True), root / "data" / f"train-{number:05d}-of-00003.parquet")
    listing = list_items("huggingface", str(root), {})
    items = list(listing.items)
    assert listing.classes == CLASSES and listing.libraries == ("datasets",)
    assert [item.label for item in items] == [label for label in range(3) for _ in range(PICTURES_OF_A_CLASS)]
    assert {item.split for item in items} == {None} and items[17].name == "00000017"  # the recipe divides it
    raw = [item.read() for item in items]
    assert [one.payload for one in raw] == images_of(pictures) and len(raw) == 48
    assert (raw[17].extension, raw[17].about) == ("png", {"file": "01.png"})
    assert pickle.loads(pickle.dumps(items[17])).read() == raw[17]


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_it_is_packed_like_any_source(offline, experiment, rows, kind):
    parts = {"train": range(0, 48, 2), "validation": range(1, 48, 4), "test": range(3, 48, 4)}
    held = datasets.DatasetDict({name: rows.select(numbers) for name, numbers in parts.items()})
    if kind == "saved":
        held.save_to_disk("hub")
    else:
        for name, part in held.items():
            parquet(part, Path("hub") / f"{name}-00000-of-00001.parquet")
    recipe = load("tiny.yaml", ["data.source=huggingface", "data.root=hub"])
    made = pack_examples(recipe)
    assert {split: one["examples"] for split, one in made.items()} == {"train": 24, "val": 12, "test": 12}
    assert made["val"]["class_names"] == list(CLASSES) and "datasets" in made["val"]["versions"]
    shards, decode = assemble.examples(recipe, "val"), assemble.task(recipe).decode
    found = {}
    for place in range(len(shards)):
        number, inner = (int(one[0]) for one in shards.locate([place]))
        key, members = shards.read(number, inner)
        found[int(key)] = (decode(key, members).target, members["png"])
    wanted = images_of(Path("pictures"))
    assert found == {n: (row // 16, wanted[row]) for n, row in enumerate(parts["validation"])}


def test_splits_by_name(offline, tmp_path, rows):
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(str(tmp_path / "hub"))
    items = list_items("huggingface", str(tmp_path / "hub"), {"splits": {"val": "test"}}).items
    assert [(item.split, item.name) for item in items] == [("val", f"{n:08d}") for n in range(5)]
    with pytest.raises(DataError, match="has no split 'valid', only train, test; name one of these"):
        list_items("huggingface", str(tmp_path / "hub"), {"splits": {"val": "valid"}})


def test_a_lost_file_and_a_split_that_stands_twice_are_told(offline, tmp_path, rows):
    for number in (0, 2):
        parquet(rows, tmp_path / "hub" / "data" / f"train-{number:05d}-of-00003.parquet")
    with pytest.raises(DataError, match="/hub: lacks train-00001-of-00003.parquet; download it again$"):
        list_items("huggingface", str(tmp_path / "hub"), {})
    rows.save_to_disk(str(tmp_path / "one"))
    with pytest.raises(DataError, match="^data.options.splits: 'train' would be train and val; give each its own$"):
        list_items("huggingface", str(tmp_path / "one"), {"splits": {"train": "train", "val": "train"}})
    with pytest.raises(DataError, match=r"has no split \['train'\], only train; name one of these$"):
        list_items("huggingface", str(tmp_path / "one"), {"splits": {"train": ["train"]}})
    wide = datasets.Dataset.from_dict({"image": [b"x"], "label": [10**11]})
    wide.save_to_disk(str(tmp_path / "wide"))
    with pytest.raises(DataError, match="^data.options.label: the column holds 100,000,000,000, which is no"):
        list_items("huggingface", str(tmp_path / "wide"), {})


def test_a_path_alone_is_no_image(offline, tmp_path, pictures):
    """Of a Parquet file whose images were not embedded nothing outside of it is read."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    held = {"image": [str(pictures / "red/00.png")], "label": [2]}
    parquet(datasets.Dataset.from_dict(held, features), tmp_path / "hub" / "train.parquet")
    [item] = list_items("huggingface", str(tmp_path / "hub"), {}).items
    with pytest.raises(DataError, match="the row holds no image, or only a path to one; embed the images and save it"):
        item.read()


def test_bytes_and_numbers_will_do(offline, tmp_path, rows, pictures):
    """A column of bytes as it is; classes without names are numbers; other formats keep their own endings."""
    held = io.BytesIO()
    Image.new("RGB", (4, 4)).save(held, "JPEG")
    column = [held.getvalue(), images_of(pictures)[0], None, b"no image"]
    datasets.Dataset.from_dict({"bytes": column, "kind": [4, 0, 1, -1]}).save_to_disk(str(tmp_path / "own"))
    listing = list_items("huggingface", str(tmp_path / "own"), {"image": "bytes", "label": "kind"})
    items = list(listing.items)
    assert listing.classes == ("0", "1", "2", "3", "4")
    assert [(one.read().extension, one.read().about) for one in items[:2]] == [("jpg", {}), ("png", {})]
    for item, words in ((items[2], "the row holds no image, or only a path"), (items[3], "is of no known format")):
        with pytest.raises(DataError, match=words):
            item.read()


def test_what_it_cannot_use(offline, tmp_path, rows):
    rows.save_to_disk(str(tmp_path / "saved"))
    parquet(rows, tmp_path / "own" / "part one.parquet")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "train.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    (tmp_path / "empty").mkdir()
    refused = {
        "absent": ({}, "data.root: .*/absent: no such folder"),
        "empty": ({}, "holds neither what save_to_disk writes nor Parquet files, here or in data/"),
        "own": ({}, "part one.parquet: is not named as on the hub, .*; rename it"),
        "torn": ({}, "data.root: .*/torn: cannot be loaded .*; save or download it again"),
        "broken": ({}, "data.root: .*/broken: cannot be loaded .*; save or download it again"),
        "saved": ({"image": "picture"}, "has no column 'picture', only image, label, note; name one of these"),
        "saved/.": ({"label": "note"}, "column 'note' of .* holds no class indices"),
    }
    for name, (options, words) in refused.items():
        with pytest.raises(DataError, match=words):
            list_items("huggingface", str(tmp_path / name), options)
    assert len(refused) == 7


def test_it_is_for_classification(experiment):
    with pytest.raises(RecipeError, match="'huggingface' gives images with one class each, for classification only"):
        load("tiny.yaml", ["data.source=huggingface", "task.name=segmentation", "evaluate.metric=miou"])
