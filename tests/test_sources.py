"""What each source lists, and what it says when the data is not as it should be."""

import io
import pickle
import shutil

import numpy as np
import pytest
from conftest import CLASSES, PICTURES_OF_A_CLASS
from PIL import Image

from kd_dist.errors import DataError, RecipeError
from kd_dist.sources import SOURCES, list_items, source_function


def names(listing) -> list[tuple[str | None, str, int]]:
    return [(item.split, item.name, item.label) for item in listing.items]


def test_every_source_of_the_table_can_be_had():
    assert len(SOURCES) >= 5
    for name in SOURCES:
        assert callable(source_function(name))


def test_digits_are_the_bundled_images():
    from sklearn.datasets import load_digits

    listing = list_items("digits", None, {})
    items = list(listing.items)
    assert listing.classes == tuple("0123456789")
    assert (len(items), len({item.name for item in items})) == (1797, 1797)
    assert [item.label for item in items] == load_digits().target.tolist()
    for number in (0, 1796):
        image = np.asarray(Image.open(io.BytesIO(items[number].read())))
        assert image.dtype == np.uint8
        assert np.array_equal(image, np.rint(load_digits().images[number] * 255 / 16))
    assert pickle.loads(pickle.dumps(items[5])).read() == items[5].read()  # readers go to other processes


def test_class_folders(pictures):
    listing = list_items("image_folder", str(pictures), {})
    items = list(listing.items)
    assert listing.classes == CLASSES
    assert len(items) == len(CLASSES) * PICTURES_OF_A_CLASS
    assert names(listing._replace(items=items))[16] == (None, "green/00.png", 1)
    assert items[16].extension == "png"
    assert items[16].read() == (pictures / "green/00.png").read_bytes()


def test_split_folders_nested_folders_and_what_is_passed_over(tmp_path, pictures):
    picture = pictures / "red/00.png"
    for name in (
        "train/b/two.JPG",
        "train/b/deep/er/one.png",
        "train/b/notes.txt",
        "train/b/folder.png/x.bmp",
        "train/a/3.jpeg",
        "train/.hidden/4.png",
        "val/b/5.webp",
        ".git/train/c/6.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    listing = list_items("image_folder", str(tmp_path), {})
    assert listing.classes == ("a", "b")
    items = list(listing.items)
    assert names(listing._replace(items=items)) == [
        ("train", "a/3.jpeg", 0),
        ("train", "b/deep/er/one.png", 1),
        ("train", "b/folder.png/x.bmp", 1),
        ("train", "b/two.JPG", 1),
        ("val", "b/5.webp", 1),  # a split may lack a class; indices stay those of train
    ]
    assert [item.extension for item in items] == ["jpeg", "png", "bmp", "jpg", "webp"]


def test_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    for name in ("absent", "file"):
        with pytest.raises(DataError, match=rf"^data\.root: .*/{name}: no such folder; set data\.root to the folder"):
            list_items("image_folder", str(tmp_path / name), {})


def test_a_folder_without_classes(tmp_path):
    (tmp_path / "1.png").touch()
    with pytest.raises(DataError, match=rf"^data\.root: {tmp_path}: holds no class folder; expected .*/<class>/"):
        list_items("image_folder", str(tmp_path), {})
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=rf"^data\.root: {tmp_path}/train: holds no class folder"):
        list_items("image_folder", str(tmp_path), {})


def test_a_class_that_training_does_not_have(tmp_path):
    for name in ("train/cat", "train/dog", "test/cat", "test/emu"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"/test/emu: class 'emu' is not among the classes of .*/train; remove it"):
        list_items("image_folder", str(tmp_path), {})


@pytest.mark.parametrize(
    ("name", "root", "options", "sentence"),
    [
        ("digit", None, {}, r"unknown source 'digit'; did you mean 'digits'\?"),
        ("mnist", None, {}, "unknown source 'mnist'; known: audio_folder, deam, digits, face_frames, .*, voc"),
        ("image_folder", None, {}, "option 'root' is missing"),
        ("image_folder", "x", {"rot": "y"}, r"unknown option 'rot'; did you mean 'root'\?"),
        ("digits", "somewhere", {}, "unknown option 'root'"),
        ("tiny_modle:listing", None, {}, "'tiny_modle:listing': no module 'tiny_modle' can be imported; run from"),
        ("tiny_model:netwrk", None, {}, r"module 'tiny_model' has no 'netwrk'; did you mean 'network'\?"),
    ],
)
def test_a_source_that_cannot_be_called(experiment, name, root, options, sentence):
    with pytest.raises(RecipeError, match=sentence):
        list_items(name, root, options)


def test_a_users_own_source(experiment):
    (experiment / "own_source.py").write_text(
        "from kd_dist.sources import Item, Listing\n"
        "def listing(root, count: int = 1):\n"
        "    return Listing(('a', 'b'), [Item(f'{root}/{n}', 'train', 'png', n % 2, bytes) for n in range(count)])\n"
    )
    listing = list_items("own_source:listing", "here", {"count": 3})
    assert names(listing) == [("train", "here/0", 0), ("train", "here/1", 1), ("train", "here/2", 0)]
    with pytest.raises(RecipeError, match="option 'count' must be a whole number, not 'many'"):
        list_items("own_source:listing", "here", {"count": "many"})
