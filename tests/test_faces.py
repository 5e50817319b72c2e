"""Faces in frames: boxes read, found and cut out, and every way in which they can be wrong."""

import io
import json
import pickle
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faces import noise
from PIL import Image

from kd_dist.errors import DataError, ModelError, RecipeError
from kd_dist.sources.faces import (
    Face,
    beside,
    crop,
    described,
    encoded,
    find_beside,
    find_detected,
    frame_id,
    made_face,
    read_boxes,
)

IMAGE = noise(1, size=(60, 80))  # 60 rows, 80 columns
FRAME = Path("frames/1/000.png")


@pytest.mark.parametrize(
    ("box", "margin", "rows", "columns"),
    [
        ((10, 20, 30, 40), 0.0, (20, 40), (10, 30)),
        ((10, 20, 30, 40), 0.125, (18, 43), (8, 33)),  # 2.5 pixels wider; halves are rounded up
        ((10.4, 20.6, 30.4, 40.6), 0.0, (21, 41), (10, 30)),
        ((-5, -5, 10, 10), 0.0, (0, 10), (0, 10)),
        ((70, 50, 100, 90), 0.5, (30, 60), (55, 80)),
        ((0, 0, 80, 60), 10.0, (0, 60), (0, 80)),
        ((5, 5, 6, 6), 0.0, (5, 6), (5, 6)),
    ],
)
def test_crops_are_the_box_and_its_margin_within_the_image(box, margin, rows, columns):
    face = made_face(box)
    assert np.array_equal(crop(IMAGE, face, margin), IMAGE[slice(*rows), slice(*columns)])
    about = described(made_face(box, [[20, 30], [box[0], box[1]], [21.123, 30]]), margin)
    assert about["box"] == list(box)
    left, top = columns[0], rows[0]
    assert about["landmarks"][0] == [20 - left, 30 - top] and about["landmarks"][2][0] == round(21.123 - left, 2)
    assert "landmarks" not in described(face, margin)


def test_a_landmark_stays_on_its_pixel():
    image = np.zeros((60, 80, 3), np.uint8)
    image[33, 41] = 255
    face = made_face((30, 20, 50, 47), [[41, 33]] * 3)
    [[x, y], *_] = described(face, 0.3)["landmarks"]
    assert crop(image, face, 0.3)[int(y), int(x)].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("box", "sentence"),
    [
        ((80, 0, 90, 9), r"the box \[80.0, 0.0, 90.0, 9.0\] lies outside the image of 80 x 60 pixels"),
        ((0, 60, 9, 70), "outside the image"),
        ((-9, 0, 0, 9), "outside the image"),
        ((0, -9, 9, 0), "outside the image"),
        ((5, 5, 5, 9), "has no area; give left, top, right, bottom"),
        ((5, 9, 9, 5), "has no area"),
        ((5.1, 5.1, 5.2, 5.2), "holds no pixel"),
    ],
)
def test_boxes_without_pixels(box, sentence):
    with pytest.raises(DataError, match=sentence):
        crop(IMAGE, made_face(box), 0.0)


def test_what_is_encoded_can_be_decoded():
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded(IMAGE[5:20, 7:30], None)))), IMAGE[5:20, 7:30])
    picture = Image.open(io.BytesIO(encoded(IMAGE, 95)))
    assert picture.format == "JPEG" and picture.size == (80, 60)
    assert len(encoded(IMAGE, 30)) < len(encoded(IMAGE, 95))


def test_frames_are_called_by_their_numbers():
    assert [frame_id(stem) for stem in ("000", "0071", "f1", "-1", "²")] == [0, 71, "f1", "-1", "²"]


# ------------------------------------------------------------------------------------------------ a file of boxes


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_boxes_of_a_file(tmp_path):
    points = [[1, 2], [3, 4], [5, 6.5]]
    path = lines(
        tmp_path / "boxes.jsonl",
        {"video": "a/b", "frame": 3, "box": [1, 2, 3.5, 4], "landmarks": points, "score": 0.9},
        "",
        {"video": "./a//b", "frame": "0003", "box": [0, 0, 9, 9]},
        {"video": "c.mp4", "frame": "x", "box": [0, 0, 9, 9], "landmarks": None},
    )
    whole = Face((0.0, 0.0, 9.0, 9.0))
    first = Face((1.0, 2.0, 3.5, 4.0), ((1.0, 2.0), (3.0, 4.0), (5.0, 6.5)))
    assert read_boxes(path) == {"a/b": {3: [first, whole]}, "c.mp4": {"x": [whole]}}


GOOD = {"video": "a", "frame": 0, "box": [0, 0, 9, 9]}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ([1], "is no object with 'video', 'frame' and 'box'"),
        ({"video": "a", "frame": 0}, "is no object with"),
        ({**GOOD, "video": 7}, "'video' is 7, not a path"),
        ({**GOOD, "frame": -1}, "'frame' is -1, neither a number"),
        ({**GOOD, "frame": True}, "'frame' is True"),
        ({**GOOD, "frame": 1.5}, "'frame' is 1.5"),
        ({**GOOD, "box": [0, 0, 9]}, r"the box \[0, 0, 9\] is not \(left, top, right, bottom\)"),
        ({**GOOD, "box": "large"}, "the box large or its landmarks are no numbers"),
        ({**GOOD, "box": [0, 0, 9, float("nan")]}, "is not .left, top"),
        ({**GOOD, "box": [0, 0, 9, 10**400]}, "are no numbers"),
        ({**GOOD, "box": [9, 0, 9, 9]}, r"the box \[9.0, 0.0, 9.0, 9.0\] has no area"),
        ({**GOOD, "landmarks": [[1, 2]]}, "are not 3 or more points"),
        ({**GOOD, "landmarks": [[1, 2], [3], [4, 5]]}, "are no numbers"),
        ({**GOOD, "landmarks": [[1, 2], [3, 4], [5, float("inf")]]}, "are not 3 or more points"),
    ],
)
def test_lines_that_are_wrong(tmp_path, row, sentence):
    path = lines(tmp_path / "boxes.jsonl", GOOD, row)
    with pytest.raises(DataError, match=rf"^{path}:2: .*{sentence}.*; correct the line$"):
        read_boxes(path)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    for name, what in (("absent.jsonl", "no such file; give its path"), ("bytes.jsonl", "cannot be read as a text")):
        with pytest.raises(DataError, match=rf"^data\.options\.faces: {tmp_path}/{name}: {what}"):
            read_boxes(tmp_path / name)


# ------------------------------------------------------------------------------------------------ arrays beside


def test_where_arrays_lie():
    boxes, landmarks = beside(Path("frames/c23/frames/071/003.png"))
    assert (str(boxes), str(landmarks)) == ("frames/c23/retina/071/003.npy", "frames/c23/landmarks/071/003.npy")
    with pytest.raises(DataError, match=r"^data\.options\.faces: a/071\.mp4: 'beside' asks for frames in a folder"):
        beside(Path("a/071.mp4"))


def test_the_largest_face_and_the_landmarks_in_it(tmp_path):
    boxes, landmarks = tmp_path / "boxes.npy", tmp_path / "landmarks.npy"
    find = pickle.loads(pickle.dumps(partial(find_beside, boxes, landmarks)))  # readers go to other processes
    with pytest.raises(DataError, match=f"^no face is known: there is no {boxes}$"):
        find(IMAGE)
    small, large = [[0, 0], [10, 10], [3, 4]], [[20, 20], [50, 50], [30, 30]]
    np.save(boxes, np.array([small, large], np.float32))
    assert find(IMAGE) == Face((20.0, 20.0, 50.0, 50.0))
    near, far, out = ([[x - 1, x], [x + 1, x], [x, x]] for x in (33, 22, 8))
    np.save(landmarks, np.array([out, far, near]))
    assert find(IMAGE).landmarks == ((32.0, 33.0), (34.0, 33.0), (33.0, 33.0))
    np.save(landmarks, np.array([out]))
    assert find(IMAGE).landmarks is None
    np.save(boxes, np.zeros((0, 7, 2)))
    with pytest.raises(DataError, match="^no face was found in the frame$"):
        find(IMAGE)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no array of numbers"),
        (b"hello", "is no array of numbers"),
        (b"\x93NUMPY\x01\x00\x0c\x00{'descr': (\n", "is no array of numbers"),
        (b"PK\x03\x04 an archive", "is no array of numbers"),
        (np.array([{}], object), "is no array of numbers"),  # pickled
        (np.array([["a"]]), "is no array .faces, points, 2. of numbers"),
        (np.zeros((2, 2)), "is no array .faces, points, 2."),
        (np.zeros((1, 1, 2)), r"has shape \(1, 1, 2\)"),
        (np.zeros((1, 2, 3)), r"has shape \(1, 2, 3\)"),
        (np.full((1, 2, 2), np.nan), r"has shape \(1, 2, 2\), or numbers that are not finite"),
    ],
)
def test_arrays_that_are_wrong(tmp_path, content, sentence):
    path = tmp_path / "boxes.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError, match=f"^{path}: {sentence}.*; make it again$"):
        find_beside(path, tmp_path / "none.npy", IMAGE)


# ------------------------------------------------------------------------------------------------ detectors

DETECTORS = """\
import time

import numpy as np

inside, most, seen = 0, 0, []
FOUND = {
    "tuples": [(0, 0, 5, 5), (10, 10, 40, 30)],
    "mappings": [{"box": np.array([10, 10, 40, 30], np.float32), "landmarks": np.ones((5, 2))}, {"box": (0, 0, 5, 5)}],
    "array": np.array([[0, 0, 5, 5], [10, 10, 40, 30]]),
    "backwards": [(9, 9, -90, -90), (10, 10, 40, 30)],
    "nothing": [],
    "none": None,
    "text": "a face",
    "one": (10, 10, 40, 30),
    "no_box": [{"bbox": (10, 10, 40, 30)}],
    "five": [(10, 10, 40, 30, 0.9)],
    "points": [{"box": (10, 10, 40, 30), "landmarks": [1, 2, 3]}],
}


def find(image):
    return FOUND[NAME]


def writes(image):
    image[:] = 0
    seen.append((image.shape, image.dtype))
    return [(0, 0, 5, 5)]


def fails(image):
    raise RuntimeError("no memory")


def slow(image):
    global inside, most
    inside += 1
    most = max(most, inside)
    time.sleep(0.02)
    inside -= 1
    return [(0, 0, 5, 5)]
"""


@pytest.fixture
def detectors(tmp_path, monkeypatch):
    (tmp_path / "own_detectors.py").write_text(DETECTORS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_detectors", raising=False)
    import own_detectors

    return own_detectors


@pytest.mark.parametrize("name", ["tuples", "mappings", "array", "backwards"])
def test_the_largest_face_that_a_detector_finds(detectors, name):
    detectors.NAME = name
    face = find_detected("own_detectors:find", FRAME, IMAGE)
    assert face.box == (10.0, 10.0, 40.0, 30.0)
    assert face.landmarks == (((1.0, 1.0),) * 5 if name == "mappings" else None)


def test_a_detector_that_finds_nothing(detectors):
    detectors.NAME = "nothing"
    with pytest.raises(DataError, match="^no face was found in the frame$"):
        find_detected("own_detectors:find", FRAME, IMAGE)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("none", "own_detectors:find returned NoneType, not a list of faces; mend it"),
        ("text", "own_detectors:find returned str, not a list of faces"),
        ("one", "returned a face that is none: the box 10 is not .left, top, right, bottom.; return"),
        ("no_box", r"a face that is none: it has \['bbox'\], and no 'box'; return .* or a mapping with 'box' and"),
        ("five", r"a face that is none: the box \[10, 10, 40, 30, 0.9\] is not"),
        ("points", "a face that is none: the landmarks .* are not 3 or more points"),
    ],
)
def test_a_detector_that_returns_something_else(detectors, name, sentence):
    """It is no frame's fault: packing stops."""
    detectors.NAME = name
    with pytest.raises(ModelError, match=f"^data.options.faces: .*{sentence}"):
        find_detected("own_detectors:find", FRAME, IMAGE)


def test_a_detector_has_its_own_copy(detectors):
    image = noise(1, size=(60, 80))
    image.setflags(write=False)
    find_detected("own_detectors:writes", FRAME, image)
    assert np.array_equal(image, IMAGE) and detectors.seen == [((60, 80, 3), np.uint8)]


def test_a_detector_is_called_by_one_thread_at_a_time(detectors):
    threads = [threading.Thread(target=find_detected, args=("own_detectors:slow", FRAME, IMAGE)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert detectors.most == 1


def test_a_detector_that_fails_says_on_what(detectors):
    said = r"^data.options.faces: own_detectors:fails failed on frames/1/000.png \(no memory\); mend it"
    with pytest.raises(ModelError, match=said):
        find_detected("own_detectors:fails", FRAME, IMAGE)


def test_a_detector_that_is_not_there(detectors):
    with pytest.raises(RecipeError, match="module 'own_detectors' has no 'fnid'; did you mean 'find'"):
        find_detected("own_detectors:fnid", FRAME, IMAGE)
