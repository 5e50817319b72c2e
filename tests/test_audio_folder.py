"""A folder of recordings and a CSV file: what is listed, and what is wrong with another file."""

import math
import pickle

import pytest
from recordings import encoded, tones

from kd_dist.errors import DataError, RecipeError
from kd_dist.sources import list_items

LABELS = "\ufefffile, tempo ,mood,by,part\r\na.wav,0.5,-1,ann,train\r\n b/c.d.FLAC ,1,,ann,val\r\n\r\nd.mp3, 2\r\n"


@pytest.fixture
def folder(tmp_path):
    """Three recordings, one deeper and with a dot in its name, and a file of labels with every freedom that CSV has."""
    (tmp_path / "b").mkdir()
    for name in ("a.wav", "b/c.d.FLAC", "d.mp3"):
        (tmp_path / name).write_bytes(encoded(tones(0.2, 8000), 8000, name.rpartition(".")[2].lower()))
    (tmp_path / "labels.csv").write_bytes(LABELS.encode())
    return tmp_path


def test_items_are_the_rows(folder):
    listing = list_items("audio_folder", str(folder), {"label_columns": ["mood", "tempo"], "group_column": "by"})
    assert listing.classes == ("mood", "tempo")
    items = list(listing.items)
    assert [(item.name, item.split, item.extension, item.group, item.span) for item in items] == [
        ("a.wav", None, "wav", "ann", None),
        ("b/c.d.FLAC", None, "flac", "ann", None),
        ("d.mp3", None, "mp3", None, None),
    ]
    assert items[0].label == (-1.0, 0.5)
    assert math.isnan(items[1].label[0]) and items[1].label[1] == 1.0  # left to the task
    assert math.isnan(items[2].label[0]) and items[2].label[1] == 2.0
    for item in pickle.loads(pickle.dumps(items)):  # readers go to other processes
        assert item.read() == (folder / item.name).read_bytes()


def test_splits_of_a_column(folder):
    path = folder / "labels.csv"
    path.write_text(path.read_text("utf-8-sig") + "d.wav,1,1,x,\n")
    (folder / "d.wav").touch()
    options = {"label_columns": ["tempo"], "split_column": "part"}
    with pytest.raises(DataError, match="labels.csv: 'd.mp3' has no 'part'; give it a split or remove its row"):
        list_items("audio_folder", str(folder), options)
    path.write_text("recording;x,part,tempo\na.wav,train,1\nd.mp3,test,2\n")
    items = list_items("audio_folder", str(folder), {**options, "file_column": "recording;x"}).items
    assert [(one.name, one.split, one.label) for one in items] == [("a.wav", "train", (1,)), ("d.mp3", "test", (2,))]


def test_a_csv_of_another_name(folder):
    (folder / "labels.csv").rename(folder / "b/truth.txt")
    options = {"label_columns": ["tempo"]}
    assert len(list_items("audio_folder", str(folder), {**options, "csv": "b/truth.txt"}).items) == 3
    with pytest.raises(DataError, match=f"^{folder}/labels.csv: no such file; set data.root, or data.options"):
        list_items("audio_folder", str(folder), options)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"file,mood\na.wav,1\n", "needs one column 'tempo', found file, mood; correct the header, or name another"),
        (b"file,tempo,tempo\na.wav,1,2\n", "needs one column 'tempo', found file, tempo, tempo"),
        (b"", "needs one column 'file', found none"),
        (b"file,tempo\n", "has no row; every row is one recording"),
        (b"file,tempo\na.wav,1\na.wav,2\n", "'a.wav' stands twice; every row is one recording"),
        (b"file,tempo\na.wav,1\n./a.wav,2\n", "'./a.wav' stands twice; every row is one recording"),
        (b"file,tempo\n,1\n", "a row has no 'file'; every row is one recording"),
        (b"file,tempo\ne.wav,1\n", "'e.wav' is no file in .*; correct or remove its row"),
        (b"file,tempo\nb,1\n", "'b' is no file in"),
        (b"file,tempo\na.wav,fast\n", "'fast' in column 'tempo' is no number; correct it, or empty it"),
        (b"file,tempo\na.wav,1,2\n", "row 2 has 3 fields, the header 2; correct it"),
        (b"file,tempo\n\xff.wav,1\n", r"is no CSV file in UTF-8 \(.*codec can't decode.*\); save it as one"),
        (b"file,tempo\n" + b"x" * 200_000, r"is no CSV file in UTF-8 \(field larger than field limit"),
    ],
)
def test_a_csv_that_cannot_be_used(folder, content, sentence):
    (folder / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"^{folder}/labels.csv: {sentence}"):
        list_items("audio_folder", str(folder), {"label_columns": ["tempo"]})


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({}, RecipeError, "option 'label_columns' is missing"),
        ({"label_columns": "tempo"}, RecipeError, "option 'label_columns' must be a list, each a text, not 'tempo'"),
        ({"label_columns": []}, DataError, "data.options.label_columns: is empty; name the columns"),
        ({"label_columns": ["tempo"], "split_column": "set"}, DataError, "needs one column 'set', found file, tempo"),
    ],
)
def test_options_that_make_no_sense(folder, options, error, sentence):
    with pytest.raises(error, match=sentence):
        list_items("audio_folder", str(folder), options)
