"""Layouts of videos of faces: what is a video, which belong together, and lists of splits."""

import json
import shutil
from pathlib import Path

import pytest
from faces import noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kd_dist.errors import DataError
from kd_dist.pack import choose_split
from kd_dist.sources.face_layouts import (
    Video,
    forensics,
    frames_of,
    groups,
    has_splits,
    is_forensics,
    natural,
    plain,
    read_splits,
)

PICTURE = Image.fromarray(noise(0, size=(4, 4)))


def touched(root: Path, *names: str) -> Path:
    """Files that are there; what is in them nobody looks at."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(videos: list[Video], root: Path) -> list[tuple]:
    return [(video.name, str(video.path.relative_to(root)), video.fake, video.split) for video in videos]


@pytest.fixture
def tree(tmp_path) -> Path:
    return touched(
        tmp_path,
        "original_sequences/youtube/c23/frames/071/0.png",
        "original_sequences/youtube/c23/videos/071.mp4",  # its frames are there
        "original_sequences/youtube/c23/videos/054.mp4",
        "original_sequences/youtube/c23/frames/054/notes.txt",  # no frame
        "original_sequences/youtube/c23/frames/.hidden/0.png",
        "original_sequences/youtube/c40/frames/071/0.png",
        "original_sequences/actors/c23/videos/01__kitchen_pan.mp4",
        "original_sequences/actors/raw/videos/02__kitchen_pan.mp4",
        "manipulated_sequences/Deepfakes/c23/frames/071_054/0.jpg",
        "manipulated_sequences/Deepfakes/c23/masks/videos/071_054.mp4",
        "manipulated_sequences/Face2Face/c23/videos/054_071.avi",
        "manipulated_sequences/Face2Face/raw/videos/071_054.avi",
        "manipulated_sequences/NeuralTextures/raw/videos/071_054.mp4",
        "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__kitchen_pan__YVGY8LOK.mp4",
        "manipulated_sequences/DeepFakeDetection/c23/README",
    )


def test_faceforensics_folders(tree):
    assert is_forensics(tree)
    videos = forensics(tree, "c23", None, None)
    assert found(videos, tree) == [
        ("actors/01__kitchen_pan", "original_sequences/actors/c23/videos/01__kitchen_pan.mp4", False, None),
        ("youtube/054", "original_sequences/youtube/c23/videos/054.mp4", False, None),
        ("youtube/071", "original_sequences/youtube/c23/frames/071", False, None),
        (
            "DeepFakeDetection/01_02__kitchen_pan__YVGY8LOK",
            "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__kitchen_pan__YVGY8LOK.mp4",
            True,
            None,
        ),
        ("Deepfakes/071_054", "manipulated_sequences/Deepfakes/c23/frames/071_054", True, None),
        ("Face2Face/054_071", "manipulated_sequences/Face2Face/c23/videos/054_071.avi", True, None),
    ]
    assert [video.ids for video in videos] == [
        ("01",),
        ("054",),
        ("071",),
        ("01", "02"),
        ("071", "054"),
        ("054", "071"),
    ]
    assert groups(videos) == ["01", "054", "054", "01", "054", "054"]
    chosen = forensics(tree, "c23", ["Face2Face"], ["youtube"])
    assert [video.name for video in chosen] == ["youtube/054", "youtube/071", "Face2Face/054_071"]
    assert [video.name for video in forensics(tree, "raw", [], None)] == ["actors/02__kitchen_pan"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("c32", None, None), r"compression: no folder of .*/original_sequences holds a 'c32'; did you mean 'c23'\?"),
        (("c23", ["Deepfake"], None), r"methods: .*/Deepfake/c23: no such folder; did you mean 'Deepfakes'\?"),
        (("c23", ["NeuralTextures"], None), "methods: .*/NeuralTextures/c23: no such folder; known: DeepFakeD"),
        (("c23", None, ["you"]), "origins: .*/original_sequences/you/c23: no such folder"),
    ],
)
def test_faceforensics_folders_that_are_not_there(tree, arguments, sentence):
    with pytest.raises(DataError, match=rf"^data\.options\.{sentence}"):
        forensics(tree, *arguments)


def test_plain_folders(tmp_path):
    root = touched(
        tmp_path,
        "real/anna/10.png",
        "real/anna/9.png",
        "real/anna/note.txt",
        "real/ben.mp4",
        "real/clips/carl.mkv",
        "real/clips/anna.mkv",
        "real/anna.mp4",  # its frames are there
        "real/one.jpg",
        "real/empty/note.txt",
        "fake/anna_ben/1.png",
        "fake/x/carl_zoe/1.png",
        "fake/ann_be/1.png",
        "fake/ben.png",
    )
    videos = plain(root, "real", "fake")
    assert found(videos, root) == [
        ("real/anna", "real/anna", False, None),
        ("real/ben", "real/ben.mp4", False, None),
        ("real/clips/anna", "real/clips/anna.mkv", False, None),
        ("real/clips/carl", "real/clips/carl.mkv", False, None),
        ("real/one", "real/one.jpg", False, None),
        ("fake/ann_be", "fake/ann_be", True, None),
        ("fake/anna_ben", "fake/anna_ben", True, None),
        ("fake/ben", "fake/ben.png", True, None),
        ("fake/x/carl_zoe", "fake/x/carl_zoe", True, None),
    ]
    assert not is_forensics(root)
    together = dict(zip((video.name for video in videos), groups(videos), strict=True))
    connected = ["real/anna", "real/ben", "real/clips/anna", "fake/anna_ben", "fake/ben"]
    assert {together[name] for name in connected} == {"anna"}
    assert together["real/clips/carl"] == together["fake/x/carl_zoe"] == "clips/carl"
    assert (together["real/one"], together["fake/ann_be"]) == ("one", "ann_be")
    assert [path.name for path in frames_of(videos[0])] == ["9.png", "10.png"]
    assert frames_of(videos[4]) == [root / "real/one.jpg"]


def test_plain_folders_of_splits(tmp_path):
    names = ("train/real/a/1.png", "train/fake/b/1.png", "test/real/a/1.png", "val/fake/a_b/1.png", "other/c.png")
    root = touched(tmp_path, *names)
    videos = plain(root, "real", "fake")
    assert found(videos, root) == [
        ("real/a", "train/real/a", False, "train"),
        ("fake/b", "train/fake/b", True, "train"),
        ("fake/a_b", "val/fake/a_b", True, "val"),
        ("real/a", "test/real/a", False, "test"),
    ]
    assert groups(videos) == ["train/a", "train/b", "val/a_b", "test/a"]  # its user has divided them


@pytest.mark.parametrize("stray", ["real", "fake", "validation/real", "dev/fake"])
def test_videos_beside_those_of_splits_are_refused(tmp_path, stray):
    root = touched(tmp_path, "train/real/a/1.png", f"{stray}/c/1.png")
    with pytest.raises(DataError, match=rf"^{root}/{stray}: stands beside the splits train, val, test, whose folders"):
        plain(root, "real", "fake")


def test_fakes_of_other_names_stay_with_what_they_name(tmp_path):
    names = ("real/anna", "fake/deepfakes/anna", "fake/fsgan/anna", "fake/x/ben", "real/ben")
    names = [f"{name}/1.png" for name in names]
    videos = plain(touched(tmp_path / "p", *names), "real", "fake")
    grouped = dict(zip([one.name for one in videos], groups(videos), strict=True))
    assert len({grouped[name] for name in ("real/anna", "fake/deepfakes/anna", "fake/fsgan/anna")}) == 1
    assert grouped["fake/x/ben"] == grouped["real/ben"] != grouped["real/anna"]
    frames = ["youtube/c23/frames/100", "youtube/c23/frames/101", "youtube/c23/frames/7"]
    names = [f"original_sequences/{one}/1.png" for one in frames]
    names += [f"manipulated_sequences/Deepfakes/c23/frames/{one}/1.png" for one in ("100_101_v2", "8-9")]
    videos = forensics(touched(tmp_path / "f", *names), "c23", None, None)
    grouped = dict(zip([one.name for one in videos], groups(videos), strict=True))
    assert grouped["Deepfakes/100_101_v2"] == grouped["youtube/100"] == grouped["youtube/101"]
    assert len(set(grouped.values())) == 3


def test_every_folder_is_real(tmp_path):
    root = touched(tmp_path, "s1/1.pgm", "s10/1.pgm", "s2/1.pgm", "README")
    assert found(plain(root, ".", "fake"), root) == [(name, name, False, None) for name in ("s1", "s2", "s10")]
    touched(root, "fake/s1/1.pgm")
    with pytest.raises(DataError, match=rf"^data\.options\.real: {root} holds {root}/fake as well; give each a folder"):
        plain(root, ".", "fake")


def test_plain_folders_without_real_videos(tmp_path):
    (tmp_path / "real").mkdir()
    for _ in range(2):
        with pytest.raises(DataError, match=rf"^data\.root: {tmp_path}/real: no such folder, or no image or video in"):
            plain(tmp_path, "real", "fake")
        shutil.rmtree(tmp_path / "real", ignore_errors=True)


def test_two_videos_of_one_name(tmp_path):
    root = touched(tmp_path, "real/a.png", "real/a.mp4")
    with pytest.raises(DataError, match=rf"^{root}/real/a.* and .* would both be the video 'a'; rename one of them$"):
        plain(root, "real", "fake")


def test_frames_are_in_the_order_of_their_numbers():
    names = ["10", "9", "f10b", "f9c", "f9", "", "frame"]
    assert sorted(names, key=natural) == ["", "9", "10", "f9", "f9c", "f10b", "frame"]


# ------------------------------------------------------------------------------------------------ lists of splits


def test_lists_of_splits(tmp_path):
    assert not has_splits(tmp_path)
    (tmp_path / "train.json").write_text('[["071", "054"], ["003", "000"]]')
    (tmp_path / "test.json").write_text('[["004", "005"]]')
    (tmp_path / "other.json").write_text("{")
    assert has_splits(tmp_path)
    train = dict.fromkeys(("071", "054", "003", "000"), "train")
    assert read_splits(tmp_path) == train | dict.fromkeys(("004", "005"), "test")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[", r"val\.json: is no JSON \(.*\); give a list of pairs of videos"),
        ('{"a": 1}', 'val.json: is no list of pairs of videos, such as .*; correct it'),
        ("[[71, 54]]", "val.json: is no list of pairs"),
        ('["071"]', "val.json: is no list of pairs"),
        ('[["054", "071"]]', "val.json: video '071' is in train.json as well; take it out of one"),
    ],
)
def test_lists_that_are_wrong(tmp_path, content, sentence):
    (tmp_path / "train.json").write_text(json.dumps([["071", "070"]]))
    (tmp_path / "val.json").write_text(content)
    with pytest.raises(DataError, match=f"^{tmp_path}/{sentence}"):
        read_splits(tmp_path)


# ------------------------------------------------------------------------------------------------ groups

NUMBERS = st.integers(0, 30).map("{:03d}".format)
FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=40))
def test_fakes_and_what_they_were_made_from_are_never_divided(pairs):
    """Whatever connects two videos, over however many fakes, they share a group; what nothing connects does not."""
    ids = [(f"{number:03d}",) for number in range(31)] + [tuple(dict.fromkeys(pair)) for pair in pairs]
    videos = [Video(f"{place}", Path("x"), len(one) > 1, None, one) for place, one in enumerate(ids)]
    named = groups(videos)
    splits = {one: choose_split(group, FRACTIONS) for one, group in zip(ids, named, strict=True)}
    for first, *others in pairs:
        assert len({splits[(name,)] for name in (first, *others)}) == 1
    reached = {name: {name} for (name,) in ids[:31]}
    for first, second in pairs:
        joined = reached[first] | reached[second]
        reached |= dict.fromkeys(joined, joined)
    of = {one: group for one, group in zip(ids, named, strict=True)}
    for (name,) in ids[:31]:
        assert of[(name,)] == min(reached[name])
    assert groups(videos[::-1]) == named[::-1]
