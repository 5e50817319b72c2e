"""Frames of faces, listed and packed: trees in the published layouts, through the real packer into shards and back."""

import json
import pickle
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from faces import HEIGHT, WIDTH, noise, number_in, numbered, write_frames, write_video
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from processes import done, kd_dist, run

from kd_dist.data import Shards, read_examples
from kd_dist.errors import DataError, KdError, ModelError, RecipeError
from kd_dist.pack import pack
from kd_dist.sources import list_items
from kd_dist.tasks import Classification
from kd_dist.views.blends import as_json, blend, draw_blend
from kd_dist.views.chance import uniform

FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}
PAIRS = {"train": [["071", "054"], ["003", "000"]], "val": [["720", "672"]], "test": [["953", "974"], ["012", "026"]]}
METHODS = ("Deepfakes", "Face2Face")
FRAMES = 3  # of a video
NO_FAKES = {"blends": 1, "blends_not_in": list(PAIRS)}
YOUTUBE = "original_sequences/youtube/c23"


def listed(root: Path, faces: str = "whole", **options) -> list:
    return list(list_items("face_frames", str(root), {"faces": faces, **options}).items)


def packed(folder: Path, root: Path, faces: str = "whole", **options) -> dict[str, list]:
    """The examples by split, packed and read back; what is quarantined is beside them, under `quarantined`."""
    fractions = options.pop("fractions", {"train": 1.0, "val": 0.0, "test": 0.0})
    manifests = pack(
        folder,
        source="face_frames",
        root=str(root),
        options={"faces": faces, **options},
        fractions=fractions,
        required=["train"],
        task=Classification(2),
        shard_size=16,
    )
    assert all(content["class_names"] == ["real", "fake"] for content in manifests.values())
    found = {"quarantined": [row for content in manifests.values() for row in content["quarantined"]]}
    for split in manifests:
        shards = Shards(folder / split)
        found[split] = read_examples(shards, np.arange(len(shards)), Classification(2).decode)
    return found


def by_name(examples: list) -> dict:
    """(video, frame) -> example, each once."""
    found = {(example.about["video"], example.about["frame"]): example for example in examples}
    assert len(found) == len(examples)
    return found


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory) -> Path:
    """FaceForensics++ in small: ten reals, two methods with ten fakes each, two videos that no list names."""
    root = tmp_path_factory.mktemp("raw") / "ff"
    pairs = [pair for some in PAIRS.values() for pair in some]
    for video in [name for pair in pairs for name in pair] + ["500"]:
        write_frames(root / YOUTUBE / "frames" / video, FRAMES, int(video))
    for number, method in enumerate(METHODS):
        for one, other in [*pairs, ["500", "501"]]:
            for target, source in ((one, other), (other, one)):
                folder = root / "manipulated_sequences" / method / "c23/frames" / f"{target}_{source}"
                write_frames(folder, FRAMES, 1 + number, int(target), int(source))
    for split, some in PAIRS.items():
        (root / f"{split}.json").write_text(json.dumps(some))
    return root


@pytest.fixture
def tree(shared_tree, tmp_path) -> Path:
    shutil.copytree(shared_tree, tmp_path / "ff")
    return tmp_path / "ff"


# ------------------------------------------------------------------------------------------------ FaceForensics++


def test_official_lists_decide(shared_tree, tmp_path):
    found = packed(tmp_path / "out", shared_tree)
    assert found.pop("quarantined") == []
    assert found.keys() == PAIRS.keys()
    for split, examples in found.items():
        reals = {name for pair in PAIRS[split] for name in pair}
        pairs = [f"{a}_{b}" for a, b in PAIRS[split]] + [f"{b}_{a}" for a, b in PAIRS[split]]
        wanted = {f"youtube/{name}" for name in reals} | {f"{method}/{pair}" for method in METHODS for pair in pairs}
        assert {video for video, _ in by_name(examples)} == wanted
        assert len(examples) == FRAMES * len(wanted)
        for (video, frame), example in by_name(examples).items():
            kind, name = video.split("/")
            fake = kind in METHODS
            assert example.target == fake
            seed = (1 + METHODS.index(kind), *map(int, name.split("_"))) if fake else (int(name),)
            assert np.array_equal(example.image, noise(*seed, frame))
            assert set(example.about) == {"name", "video", "frame"}
    notes = list_items("face_frames", str(shared_tree), {"faces": "whole"}).notes
    assert notes == (f"5 of 35 videos are in none of the lists in {shared_tree}, left out",)


def test_frames_that_are_not_cropped_stay_as_they_are(tree, tmp_path):
    path = tree / YOUTUBE / "frames/071/000.png"
    Image.fromarray(noise(9)).save(path.with_name("001.jpg"), quality=70)
    path.with_name("001.png").unlink()
    found = packed(tmp_path / "out", tree, methods=[], **NO_FAKES)
    shards, seen = Shards(tmp_path / "out/train"), set()
    for shard in map(shards.shard, range(len(shards.paths))):
        for place, key in enumerate(shard.keys):
            members = shard.read(place)
            if key in ("youtube/071/000", "youtube/071/001"):
                [extension] = set(members) - {"json"}
                assert bytes(members[extension]) == path.with_name(f"{key[-3:]}.{extension}").read_bytes()
                seen.add((key, extension))
    assert seen == {("youtube/071/000", "png"), ("youtube/071/001", "jpg")}
    assert len(found["train"]) == 4 * FRAMES


def test_lists_of_a_folder_of_ones_own(tree, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.json").write_text('[["071", "054"], ["998", "999"]]')
    (lists / "test.json").write_text('[["500", "501"]]')
    listing = list_items("face_frames", str(tree), {"faces": "whole", "splits": str(lists)})
    splits = {item.about["video"]: item.split for item in listing.items}
    assert splits["youtube/071"] == splits["Deepfakes/054_071"] == "train"
    assert splits["youtube/500"] == splits["Face2Face/500_501"] == "test" and len(splits) == 11
    assert listing.notes == (
        f"3 of 6 videos that the lists in {lists} name are not there, such as 501",
        f"the lists in {lists} have no video for val.json",
        f"24 of 35 videos are in none of the lists in {lists}, left out",
    )
    (tree / "splits").mkdir()
    (lists / "test.json").rename(tree / "splits/test.json")  # rather than those in the root
    assert {item.split for item in listed(tree)} == {"test"}


def test_lists_that_divide_a_fake_from_its_source_are_refused(tree, tmp_path):
    (tree / "train.json").write_text('[["071", "003"]]')
    (tree / "val.json").write_text('[["054", "000"]]')
    (tree / "test.json").unlink()
    with pytest.raises(DataError, match="but both are of group '(000|054)', which stays in one; correct the"):
        packed(tmp_path / "out", tree)
    assert not (tmp_path / "out").exists()


def test_without_lists_fractions_decide_and_divide_no_pair(tree, tmp_path):
    for split in PAIRS:
        (tree / f"{split}.json").unlink()
    found = packed(tmp_path / "out", tree, fractions=FRACTIONS, frames=1)
    assert found.pop("quarantined") == [] and sum(map(len, found.values())) == 35
    splits = {example.about["video"]: split for split, examples in found.items() for example in examples}
    assert len(set(splits.values())) >= 2
    for pair in [pair for some in PAIRS.values() for pair in some]:
        names = {name for name in splits if set(name.split("/")[1].split("_")) <= set(pair)}
        assert len(names) == 6 and len({splits[name] for name in names}) == 1
    assert len({splits[f"{method}/{pair}"] for method in METHODS for pair in ("500_501", "501_500")}) == 1


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12), st.sets(st.integers(0, 12), min_size=1))
def test_no_identity_is_in_two_splits(tmp_path_factory, pairs, reals):
    """Whatever fakes there are of whatever is there, by names alone."""
    root = tmp_path_factory.mktemp("names")
    names = [f"{YOUTUBE}/videos/{number:03d}.mp4" for number in reals]
    names += [f"manipulated_sequences/NeuralTextures/c23/videos/{a:03d}_{b:03d}.mp4" for a, b in pairs]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    items = listed(root, frames=2, blends=1)
    shutil.rmtree(root)
    assert len(items) == 2 * (2 * len(reals) + len(pairs))
    groups = defaultdict(set)
    for item in items:
        for number in item.about["video"].removesuffix("+blend").split("/")[1].split("_"):
            groups[number].add(item.group)
    assert all(len(some) == 1 for some in groups.values())


# ------------------------------------------------------------------------------------------------ plain folders


def test_plain_folders_with_every_kind_of_video(tmp_path):
    root = tmp_path / "data"
    write_frames(root / "real/anna", 5, 1)
    write_video(root / "real/ben.mp4", map(numbered, range(20)), g="8", bf="2")
    write_frames(root / "real", 2, 2, extension="pgm")
    write_frames(root / "fake/anna_ben", 2, 3)
    found = packed(tmp_path / "out", root, frames=4)
    assert found["quarantined"] == []
    examples = by_name(found["train"])
    assert examples.keys() == {
        *(("real/anna", frame) for frame in (0, 1, 3, 4)),
        *(("real/ben", frame) for frame in (2, 7, 12, 17)),
        *((f"real/00{frame}", frame) for frame in (0, 1)),
        *(("fake/anna_ben", frame) for frame in (0, 1)),
    }
    for (video, frame), example in examples.items():
        assert example.target == video.startswith("fake")
        if video == "real/anna":
            assert np.array_equal(example.image, noise(1, frame))
        if video == "real/ben":
            assert number_in(example.image) == frame
    groups = {item.about["video"]: item.group for item in listed(root)}
    assert groups["real/anna"] == groups["real/ben"] == groups["fake/anna_ben"] == "anna"
    assert groups["real/000"] == "000"


def test_plain_folders_of_splits(tmp_path):
    for seed, name in enumerate(("train/real/a", "train/fake/b", "val/real/a", "val/fake/c")):
        write_frames(tmp_path / "data" / name, 2, seed)
    found = packed(tmp_path / "out", tmp_path / "data")
    assert {split: sorted(by_name(found[split])) for split in ("train", "val")} == {
        "train": [("fake/b", 0), ("fake/b", 1), ("real/a", 0), ("real/a", 1)],
        "val": [("fake/c", 0), ("fake/c", 1), ("real/a", 0), ("real/a", 1)],
    }


# ------------------------------------------------------------------------------------------------ videos


def test_frames_of_videos_that_are_damaged_or_short(tmp_path):
    root = tmp_path / "data"
    good = write_video(root / "real/good.mkv", map(numbered, range(40)), g="100", bf="3")
    write_video(root / "real/short.mp4", map(numbered, range(3)))
    (root / "fake").mkdir()
    (root / "fake/bad.mkv").write_bytes(good.read_bytes()[:300])
    (root / "fake/text.mp4").write_text("hello")
    write_frames(root / "fake/frames", 2, 1)
    found = packed(tmp_path / "out", root, frames=8)
    assert [number_in(found.image) for _, found in sorted(by_name(found["train"]).items())[2:]] == [
        *(2, 7, 12, 17, 22, 27, 32, 37),
        *(0, 1, 2),
    ]
    reasons = Counter((row["name"].rpartition("/")[0], row["reason"]) for row in found["quarantined"])
    assert sum(reasons.values()) == 5 + 8 + 8
    told = defaultdict(set)
    for name, reason in reasons:
        told[name].add(reason)
    assert told["real/short"] == {
        f"the video has 3 frames, fewer than 8; this one would repeat frame {number}" for number in range(3)
    }
    for name in ("fake/bad", "fake/text"):
        assert len(told[name]) == 1 and all("damaged" in reason or "no frame" in reason for reason in told[name])


def test_all_frames_of_videos(tmp_path):
    root = tmp_path / "data"
    write_video(root / "real/a.mp4", map(numbered, range(11)), bf="2")
    write_frames(root / "fake/b", 9, 1)
    (root / "fake/c.mp4").write_text("hello")
    items = listed(root, frames=None)
    assert Counter(item.about["video"] for item in items) == {"real/a": 11, "fake/b": 9, "fake/c": 1}
    found = packed(tmp_path / "out", root, frames=None)
    examples = by_name(found["train"])
    assert all(number_in(examples["real/a", frame].image) == frame for frame in range(11))
    [row] = found["quarantined"]
    assert row["name"] == "fake/c/0" and "it is damaged, or no video" in row["reason"]


def test_listing_decodes_nothing_and_readers_go_to_other_processes(tmp_path):
    root = tmp_path / "data"
    for name in ("real/a.mp4", "real/b/0.png", "fake/c.mp4", "fake/d.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert len(listed(root, blends=1)) == 8 + 1 + 8 + 1 + 9
    write_video(root / "real/a.mp4", map(numbered, range(9)))
    item = pickle.loads(pickle.dumps(listed(root, blends=1)[3]))
    raw = item.read()
    assert raw.about["frame"] == 1 and raw.payload[1:4] == b"PNG"


def test_video_files_without_their_library(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_video(root / "real/a.mp4", [numbered(0)])
    write_frames(root / "fake/b", 1, 1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(KdError, match=rf"^{root}/real/a\.mp4: a video file is read through PyAV, which is not"):
        listed(root)
    (root / "real/a.mp4").unlink()
    write_frames(root / "real/a", 1, 2)
    assert len(listed(root)) == 2


# ------------------------------------------------------------------------------------------------ faces


def test_arrays_beside_the_frames(tree, tmp_path):
    """The preprocessing of self-blended images leaves boxes in `retina`, landmarks in `landmarks`."""
    small, large = [[1, 1], [9, 9]], [[10, 8], [50, 40], [20, 20]]
    points = np.stack([[20.0 + number / 4, 12.0 + number / 4] for number in range(81)])
    for folder in sorted((tree / YOUTUBE / "frames").iterdir()):
        for kind, content in (("retina", np.array([large])), ("landmarks", points[None])):
            (tree / YOUTUBE / kind / folder.name).mkdir(parents=True)
            np.save(tree / YOUTUBE / kind / folder.name / "000.npy", content)
    retina = tree / YOUTUBE / "retina/071"
    np.save(retina / "001.npy", np.array([[*small, [0, 0]], large]))
    np.save(retina / "002.npy", np.zeros((0, 3, 2)))
    found = packed(tmp_path / "out", tree, "beside", margin=0.1, methods=[], **NO_FAKES)
    examples = by_name([one for split in PAIRS for one in found[split]])
    assert len(examples) == 10 + 1
    image = examples["youtube/071", 0].image
    assert np.array_equal(image, noise(71, 0)[5:43, 6:54])  # 4 columns and 3.2 rows on each side
    about = examples["youtube/071", 0].about
    assert about["box"] == [10, 8, 50, 40]
    assert about["landmarks"] == [[x - 6, y - 5] for x, y in points.tolist()]
    assert "landmarks" not in examples["youtube/071", 1].about
    assert np.array_equal(examples["youtube/071", 1].image, noise(71, 1)[5:43, 6:54])
    reasons = {row["name"]: row["reason"] for row in found["quarantined"]}
    assert len(reasons) == 9 * 2 + 1 and reasons["youtube/071/002"] == "no face was found in the frame"
    absent = tree / YOUTUBE / "retina/054/001.npy"
    assert reasons["youtube/054/001"] == f"no face is known: there is no {absent}"


def test_arrays_beside_videos_are_refused(tree):
    write_video(tree / YOUTUBE / "videos/700.mp4", [numbered(0)])
    (tree / "train.json").write_text('[["071", "700"]]')
    with pytest.raises(DataError, match=r"^data\.options\.faces: .*/videos/700\.mp4: 'beside' asks for frames in a"):
        listed(tree, "beside")


def boxes_file(path: Path, *rows: tuple) -> str:
    """A file of rows (video, frame, box, landmarks or None)."""
    names = ("video", "frame", "box", "landmarks")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return str(path)


def test_a_file_of_boxes(tmp_path):
    root = tmp_path / "data"
    write_frames(root / "real/anna", 9, 1)
    write_video(root / "real/ben.mp4", map(numbered, range(30)), g="100", bf="2")
    write_frames(root / "fake", 2, 3)
    points = [[10, 10], [20, 10], [15, 20.5]]
    left, right, whole = [0, 0, 20, 24], [30, 10, 60, 40], [0, 0, WIDTH, HEIGHT]
    rows = [("real/anna", frame, left, points) for frame in (1, 2, 3, 4)]
    rows += [("real/anna", "002", right, points)]  # a second face
    rows += [("real/ben.mp4", frame, whole, None) for frame in (29, 3, 11)]
    rows += [("fake/001.png", "001", right, None), ("fake/gone.png", 0, left, None), ("real/gone", 0, left, None)]
    faces = boxes_file(tmp_path / "boxes.jsonl", *rows)
    listing = list_items("face_frames", str(root), {"faces": faces, "frames": 2})
    assert listing.notes == (
        f"2 of 5 videos that {faces} names are not among those taken, such as fake/gone.png",
        f"1 of 4 videos have no face in {faces}, left out, such as fake/000.png",
    )
    found = packed(tmp_path / "out", root, faces, frames=3, margin=0.0)
    assert found["quarantined"] == []
    examples = {(one.key, one.about["frame"]): one for one in found["train"]}
    assert examples.keys() == {
        ("real/anna/001", 1),  # of those with a face, evenly
        ("real/anna/003", 3),
        ("real/anna/004", 4),
        ("real/ben/3", 3),
        ("real/ben/11", 11),
        ("real/ben/29", 29),
        ("fake/001", 1),
    }
    one = examples["real/anna/003", 3]
    assert np.array_equal(one.image, noise(1, 3)[0:24, 0:20])
    assert one.about["landmarks"] == points and one.about["box"] == left
    assert number_in(examples["real/ben/11", 11].image) == 11
    assert np.array_equal(examples["fake/001", 1].image, noise(3, 1)[10:40, 30:60])
    few = [item.name for item in listed(root, faces, frames=2) if item.about["video"] == "real/ben"]
    assert few == ["real/ben/3", "real/ben/29"]
    everything = packed(tmp_path / "all", root, faces, frames=None)
    names = {one.key for one in everything["train"]}
    assert {"real/anna/002/0", "real/anna/002/1"} <= names and len(names) == 9
    static = {item.name: item.about for item in listed(root, faces, margin=0.5)}
    assert static["real/anna/002/1"] == {
        "video": "real/anna",
        "frame": 2,
        "box": right,
        "landmarks": [[x - 15, y] for x, y in points],
    }


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (("real/b", 0, [0, 0, 9, 9], None), r"boxes\.jsonl names a face in none of the 2 videos; 'video' is the path"),
        (("real/a", 7, [0, 0, 9, 9], None), r"boxes\.jsonl names frame 7 of .*/real/a, which has none such; mend it"),
        (("fake/c.mp4", "x", [0, 0, 9, 9], None), r"names frame 'x' of .*/fake/c\.mp4, which has none such"),
        (("real/a", 0, [9, 0, 0, 9], None), r"boxes\.jsonl:1: the box .* has no area"),
    ],
)
def test_files_of_boxes_that_are_wrong(tmp_path, row, sentence):
    write_frames(tmp_path / "real/a", 1, 1)
    write_video(tmp_path / "fake/c.mp4", [numbered(0)])
    with pytest.raises(DataError, match=sentence):
        listed(tmp_path, boxes_file(tmp_path / "boxes.jsonl", row))


def test_boxes_outside_the_image_and_frames_that_are_not_there(tmp_path):
    write_frames(tmp_path / "data/real/a", 2, 1)
    write_video(tmp_path / "data/fake/c.mp4", [numbered(0)])
    small, far = [0, 0, 9, 9], [90, 0, 99, 9]
    rows = [("real/a", 0, far, None), ("real/a", 1, small, None), ("fake/c.mp4", 5, small, None)]
    found = packed(tmp_path / "out", tmp_path / "data", boxes_file(tmp_path / "boxes.jsonl", *rows))
    assert {row["name"]: row["reason"] for row in found["quarantined"]} == {
        "real/a/000": "the box [90.0, 0.0, 99.0, 9.0] lies outside the image of 64 x 48 pixels",
        "fake/c/5": "the video has 1 frames, counted from 0, and so none of number 5",
    }


DETECTOR = """\
def bright(image):
    assert image.shape == (48, 64, 3) and image.dtype == "uint8"
    top = int(image[0, 0, 0]) % 20
    return [(0, 0, 2, 2), {"box": (5, top, 25, top + 20), "landmarks": [(6, top), (7, top), (8, top)]}] if top else []


def wrong(image):
    return 7
"""


@pytest.fixture
def detectors(tmp_path, monkeypatch):
    (tmp_path / "own_detector.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_detector", raising=False)


def test_a_detector(detectors, tmp_path):
    root = tmp_path / "data"
    shown = {("real/a", number): image for number, image in enumerate(write_frames(root / "real/a", 40, 1))}
    write_frames(root / "fake/b", 1, 2)
    found = packed(tmp_path / "out", root, "own_detector:bright", margin=0.0, frames=40)
    examples = by_name(found["train"])
    faceless = {f"real/a/{number:03d}" for (_, number), image in shown.items() if image[0, 0, 0] % 20 == 0}
    assert faceless and {row["name"] for row in found["quarantined"]} >= faceless
    assert {row["reason"] for row in found["quarantined"]} == {"no face was found in the frame"}
    assert len(examples) == 41 - len(found["quarantined"])
    for place, image in shown.items():
        top = int(image[0, 0, 0]) % 20
        if top:
            assert np.array_equal(examples[place].image, image[top : top + 20, 5:25])
            assert examples[place].about["landmarks"] == [[1, 0], [2, 0], [3, 0]]
            assert examples[place].about["box"] == [5, top, 25, top + 20]


def test_a_detector_that_is_wrong_stops_the_work(detectors, tmp_path):
    write_frames(tmp_path / "data/real/a", 1, 1)
    with pytest.raises(ModelError, match="^data.options.faces: own_detector:wrong returned int, not a list of faces"):
        packed(tmp_path / "out", tmp_path / "data", "own_detector:wrong", blends=1)


def test_crops_as_jpeg(tmp_path):
    write_frames(tmp_path / "data/real/a", 2, 1)
    faces = boxes_file(tmp_path / "boxes.jsonl", ("real/a", 1, [0, 0, 40, 40], None))
    sizes = {}
    for quality in (None, 50, 95):
        item, blended = listed(tmp_path / "data", faces, quality=quality, blends=1)
        assert item.extension == blended.extension == ("png" if quality is None else "jpg")
        payload = item.read().payload
        assert payload[:4] == (b"\x89PNG" if quality is None else b"\xff\xd8\xff\xe0")
        sizes[quality] = len(payload)
    assert sizes[50] < sizes[95] < sizes[None]


# ------------------------------------------------------------------------------------------------ blends


def test_blends_of_real_items(tree, tmp_path):
    (tree / YOUTUBE / "retina/071").mkdir(parents=True)
    (tree / YOUTUBE / "landmarks/071").mkdir(parents=True)
    np.save(tree / YOUTUBE / "retina/071/000.npy", np.array([[[10, 8], [50, 40]]]))
    np.save(tree / YOUTUBE / "landmarks/071/000.npy", np.array([[[20, 20], [30, 20], [25, 35]]]))
    (tree / "train.json").write_text('[["071", "054"]]')
    for split in ("val", "test"):
        (tree / f"{split}.json").unlink()
    given = {"margin": 0.0, "methods": [], "blends": 2, "blends_not_in": []}
    found = packed(tmp_path / "out", tree, "beside", **given)
    examples = {one.key: one for one in found["train"]}
    real = examples["youtube/071/000"]
    names = ["youtube/071+blend", "youtube/071+blend1"]
    keys = [f"{name.replace('+', '%2B')}/000" for name in names]
    assert examples.keys() == {"youtube/071/000", *keys}
    for number in range(2):
        fake = examples[keys[number]]
        assert (real.target, fake.target) == (0, 1)
        assert (fake.about["video"], fake.about["frame"]) == (names[number], 0)
        assert fake.about["landmarks"] == real.about["landmarks"] == [[10, 12], [20, 12], [15, 27]]

        def chance(name, number=number):
            return uniform(0, "youtube/071/000", number, name)

        parameters = draw_blend(chance, real.image.shape[:2], real.about["landmarks"])
        assert fake.about["blend"] == json.loads(json.dumps(as_json(parameters)))
        assert np.array_equal(fake.image, blend(real.image, parameters))
        assert not np.array_equal(fake.image, real.image)
    first, second = (examples[key].about["blend"] for key in keys)
    assert first != second
    other = packed(tmp_path / "seed", tree, "beside", **given, seed=1)["train"]
    assert first not in [one.about.get("blend") for one in other]


def test_blends_are_left_out_where_views_blend_and_stay_with_their_video(tmp_path):
    for person in range(40):
        write_frames(tmp_path / f"data/s{person}", 2, person, extension="pgm")
    found = packed(tmp_path / "out", tmp_path / "data", real=".", blends=1, fractions=FRACTIONS, frames=None)
    assert found.pop("quarantined") == []
    persons = {split: {one.about["video"].removesuffix("+blend") for one in some} for split, some in found.items()}
    assert sum(map(len, persons.values())) == 40 and all(persons.values())
    assert {one.target for one in found["train"]} == {0}
    for split in ("val", "test"):
        assert Counter(one.target for one in found[split]) == {0: 2 * len(persons[split]), 1: 2 * len(persons[split])}
    given = {"real": ".", "blends": 1, "blends_not_in": [], "fractions": FRACTIONS}
    everywhere = packed(tmp_path / "all", tmp_path / "data", **given)
    count = 2 * len(persons["train"])
    assert Counter(one.target for one in everywhere["train"]) == {0: count, 1: count}


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "data.options of face_frames: option 'faces' is missing"),
        ({"faces": "hole"}, "data.options.faces: 'hole' is neither whole, beside, a file .*; did you mean 'whole'"),
        ({"faces": "no_module:find"}, "data.options.faces: 'no_module:find': no module 'no_module' can be imported"),
        ({"faces": "whole", "frames": 0}, "data.options.frames: must be 1 or more, or null, not 0"),
        ({"faces": "whole", "margin": -0.1}, "data.options.margin: must be from 0 to 10, not -0.1"),
        ({"faces": "whole", "quality": 101}, "data.options.quality: must be from 1 to 100, or null, not 101"),
        ({"faces": "whole", "blends": -1}, "data.options.blends: must be 0 or more, not -1"),
        ({"faces": "whole", "methods": ["x"]}, "data.options.methods: is for FaceForensics.*'s folders, and .* has no"),
        ({"faces": "whole", "splits": "x"}, "data.options.splits: is for FaceForensics"),
        ({"faces": "whole", "origins": []}, "data.options.origins: is for FaceForensics"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, sentence):
    write_frames(tmp_path / "real/a", 1, 1)
    with pytest.raises(RecipeError, match=f"^{sentence}"):
        list_items("face_frames", str(tmp_path), options)


def test_trees_that_cannot_be(tree, tmp_path):
    with pytest.raises(DataError, match=r"^data\.root: .*/absent: no such folder; set data\.root to the folder that"):
        listed(tmp_path / "absent")
    with pytest.raises(DataError, match="has no manipulated video; add some, or set data.options.blends to 1 or more"):
        listed(tree, methods=[])
    with pytest.raises(DataError, match="no real video is left to be packed; see to its folders"):
        listed(tree, origins=[])
    with pytest.raises(DataError, match=r"^data\.options\.splits: .*/lists: holds none of train\.json, val\.json and"):
        listed(tree, splits=str(tmp_path / "lists"))
    shutil.copy(tree / YOUTUBE / "frames/071/001.png", tree / YOUTUBE / "frames/071/01.png")
    with pytest.raises(DataError, match=r"071/0?01\.png and .*/071/0?01\.png would both be frame 1 of a video; remove"):
        listed(tree)


# ------------------------------------------------------------------------------------------------ the command

RECIPE = """\
task: {classes: 2}
data: {source: face_frames, root: ff, options: {faces: "own_detector:middle", frames: 4, blends: 1}, shard_size: 16}
views: {count: 1, size: 16}
teacher: {model: timm/resnet10t, weights: stage:teacher}
student: {model: timm/resnet10t}
stages:
  teacher: {model: teacher, losses: {cross_entropy: {}}, epochs: 1, batch_size: 4, lr: 1e-2}
"""


@pytest.mark.slow
def test_the_command_packs_a_tree_of_videos(tmp_path):
    """FaceForensics++ as it is published: videos and lists, nothing prepared."""
    for split, some in PAIRS.items():
        (tmp_path / "ff/splits").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ff/splits/{split}.json").write_text(json.dumps(some))
        for one, other in some:
            for video in (one, other):
                write_video(tmp_path / "ff" / YOUTUBE / f"videos/{video}.mp4", map(numbered, range(10)), bf="2")
            for pair in (f"{one}_{other}", f"{other}_{one}"):
                folder = tmp_path / "ff/manipulated_sequences/Deepfakes/c23/videos"
                write_video(folder / f"{pair}.mp4", map(numbered, range(20, 30)), bf="2")
    (tmp_path / "own_detector.py").write_text("def middle(image):\n    return [(8, 8, 56, 40)]\n")
    (tmp_path / "faces.yaml").write_text(RECIPE)
    done(run(kd_dist, "pack", "faces.yaml", folder=tmp_path))
    for split, some in PAIRS.items():
        shards = Shards(tmp_path / "shards/faces" / split)
        assert {"av", "pillow"} <= shards.manifest["versions"].keys()
        examples = by_name(read_examples(shards, np.arange(len(shards)), Classification(2).decode))
        kinds = Counter(video.split("/")[0] + ("+blend" if "blend" in video else "") for video, _ in examples)
        count = 4 * 2 * len(some)
        blends = {} if split == "train" else {"youtube+blend": count}
        assert kinds == {"youtube": count, "Deepfakes": count, **blends}
        for (video, frame), example in examples.items():
            assert example.image.shape == (40, 60, 3) and frame in (1, 3, 6, 8)
            if not video.endswith("+blend"):
                whole = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
                whole[4:44, 2:62] = example.image
                stripes = number_in(whole)
                assert stripes == (frame if video.startswith("youtube") else 20 + frame)
