"""Pascal VOC's layout: what is listed, and what is wrong with a folder that is another."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_dist.errors import DataError
from kd_dist.sources import list_items
from kd_dist.sources.voc import VOC_CLASSES
from kd_dist.tasks import TASKS

LISTS = {
    "train": b"2007_01\r\n2007_02\r\n\r\n",
    "val": b"2008_03 \n  \n\t2007_04",
    "trainval": b"2007_01\n2007_02\n2008_03\n",
}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A small VOC folder of four examples, and a picture and a mask that no list names."""
    root = tmp_path / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in ("2007_01", "2007_02", "2008_03", "2007_04", "2009_05"):
        mask = random.integers(0, 21, (6, 8), np.uint8)
        mask[0, 0] = 255
        image = Image.fromarray(mask)
        image.putpalette(random.integers(0, 256, 768, np.uint8).tobytes())
        image.save(root / "SegmentationClass" / f"{name}.png")
        Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
    for split, content in LISTS.items():
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_bytes(content)
    (root / "ImageSets/Main/aeroplane_train.txt").write_text("2007_01 -1\n")
    (root / "ImageSets/Segmentation/notes.md").write_text("2009_05\n")
    return root


def test_items_are_those_of_the_lists(tree):
    listing = list_items("voc", str(tree), {})
    items = list(listing.items)
    assert [(item.split, item.name, item.extension) for item in items] == [
        ("train", "2007_01", "jpg"),
        ("train", "2007_02", "jpg"),
        ("val", "2008_03", "jpg"),
        ("val", "2007_04", "jpg"),
    ]
    assert listing.classes == VOC_CLASSES and len(set(VOC_CLASSES)) == 21
    assert (VOC_CLASSES[0], VOC_CLASSES[15], VOC_CLASSES[20]) == ("background", "person", "tvmonitor")
    for item in pickle.loads(pickle.dumps(items)):  # readers go to other processes
        assert item.read() == (tree / "JPEGImages" / f"{item.name}.jpg").read_bytes()
        assert item.label() == (tree / "SegmentationClass" / f"{item.name}.png").read_bytes()


def test_items_are_what_the_task_packs(tree):
    task = TASKS["segmentation"](21)
    for item in list_items("voc", str(tree), {}).items:
        members = task.encode(item.read(), item.extension, item.label, {"name": item.name})
        example = task.decode(item.name, members)
        with Image.open(tree / "SegmentationClass" / f"{item.name}.png") as mask:
            assert np.array_equal(example.target, np.asarray(mask))
        assert example.image.shape == (6, 8, 3) and example.target[0, 0] == 255


def test_classes_of_ones_own(tree):
    assert list_items("voc", str(tree), {"class_names": ["road", "sky"]}).classes == ("road", "sky")


def test_a_split_may_have_any_name_and_be_empty(tree):
    (tree / "ImageSets/Segmentation/test.txt").write_bytes(b"2009_05\r\n")
    (tree / "ImageSets/Segmentation/val.txt").write_bytes(b"\r\n")
    assert [item.split for item in list_items("voc", str(tree), {}).items] == ["test", "train", "train"]


@pytest.mark.parametrize("missing", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation", "."])
def test_a_folder_that_is_not_there(tree, missing):
    (tree / missing).rename(tree.parent / "elsewhere")
    with pytest.raises(DataError) as raised:
        list_items("voc", str(tree), {})
    assert str(raised.value) == (
        f"data.root: {tree / missing}: no such folder; set data.root to the folder that holds JPEGImages, "
        f"SegmentationClass and ImageSets/Segmentation"
    )


def test_no_list_but_the_joined_one(tree):
    for split in ("train", "val"):
        (tree / "ImageSets/Segmentation" / f"{split}.txt").unlink()
    with pytest.raises(
        DataError, match=rf"^data\.root: {tree}/ImageSets/Segmentation: holds no list of a split; expected"
    ):
        list_items("voc", str(tree), {})


@pytest.mark.parametrize(
    ("split", "content", "first"),
    [("val", b"2008_03\r\n2007_02\r\n", "train"), ("train", b"2007_02\n2007_02\n", "train")],
)
def test_an_id_that_stands_twice(tree, split, content, first):
    lists = tree / "ImageSets/Segmentation"
    (lists / f"{split}.txt").write_bytes(content)
    with pytest.raises(
        DataError, match=f"^{lists}/{split}.txt: '2007_02' is already in {lists}/{first}.txt; an example "
    ):
        list_items("voc", str(tree), {})


def test_a_file_that_is_not_there_is_found_when_it_is_read(tree):
    (tree / "SegmentationClass/2007_01.png").unlink()
    (tree / "JPEGImages/2007_02.jpg").unlink()
    first, second, *_ = list_items("voc", str(tree), {}).items
    with pytest.raises(FileNotFoundError, match="2007_01.png"):
        first.label()
    with pytest.raises(FileNotFoundError, match="2007_02.jpg"):
        second.read()
