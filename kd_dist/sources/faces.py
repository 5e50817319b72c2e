"""Faces in frames: where they are, by a file, by arrays beside the frames or by a detector; and cut out."""

import io
import json
import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kd_dist import choose
from kd_dist.errors import DataError, ModelError, cause
from kd_dist.views.blends import FARTHEST

FRAMES, BOXES, LANDMARKS = "frames", "retina", "landmarks"  # folders beside each other
LEAST_LANDMARKS = 3
LONGEST_NUMBER = 18  # digits
ONE_AT_A_TIME = threading.Lock()  # a detector need not be made for threads

Point = tuple[float, float]
FrameId = int | str  # a frame's number, or the name of its file where that is no number


class Face(NamedTuple):
    """Where a face is, in pixels of its frame."""

    box: tuple[float, float, float, float]  # left, top, right, bottom
    landmarks: tuple[Point, ...] | None = None  # (x, y)


def made_face(box: Any, landmarks: Any = None) -> Face:
    """A face from numbers in any kind of sequence. Raises DataError unless they are those of a box and of points."""
    try:
        corners = np.asarray(box, np.float64)
        points = None if landmarks is None else np.asarray(landmarks, np.float64)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"the box {_shown(box)} or its landmarks are no numbers") from None
    if corners.shape != (4,) or not (np.abs(corners) <= FARTHEST).all():  # NaN is not either
        raise DataError(f"the box {_shown(box)} is not (left, top, right, bottom)")
    if points is None:
        return Face(tuple(corners.tolist()))
    of_points = points.ndim == 2 and points.shape[1] == 2 and len(points) >= LEAST_LANDMARKS
    if not of_points or not (np.abs(points) <= FARTHEST).all():
        raise DataError(f"the landmarks {_shown(landmarks)} are not {LEAST_LANDMARKS} or more points (x, y)")
    return Face(tuple(corners.tolist()), tuple(map(tuple, points.tolist())))


def refuse_empty(face: Face) -> None:
    """Raise a DataError for a box without area."""
    left, top, right, bottom = face.box
    if not (right > left and bottom > top):
        raise DataError(f"the box {_shown(face.box)} has no area; give left, top, right, bottom")


def largest(faces: Iterable[Face]) -> Face:
    """The face of the largest box, the first of several. Raises DataError when there is none."""
    found = list(faces)
    if not found:
        raise DataError("no face was found in the frame")
    return max(found, key=_area)


def crop(image: np.ndarray, face: Face, margin: float) -> np.ndarray:
    """The pixels of a face, (h, w, 3) of (H, W, 3) uint8: its box, wider by `margin` of its width at the left and at
    the right, likewise in height, rounded to whole pixels and cut off where the image ends.

    Raises DataError for a box without area or outside the image.
    """
    refuse_empty(face)
    rows, columns = image.shape[:2]
    left, top, right, bottom = face.box
    if right <= 0 or bottom <= 0 or left >= columns or top >= rows:
        raise DataError(f"the box {_shown(face.box)} lies outside the image of {columns} x {rows} pixels")
    left, top, right, bottom = _widened(face, margin)
    cut = image[top : min(bottom, rows), left : min(right, columns)]
    if not cut.size:
        raise DataError(f"the box {_shown(face.box)} holds no pixel")
    return cut


def described(face: Face, margin: float) -> dict[str, Any]:
    """What is packed beside a cropped face: `box` as it was found, and `landmarks`, if any, in pixels of the crop."""
    left, top, _, _ = _widened(face, margin)
    about: dict[str, Any] = {"box": list(face.box)}
    if face.landmarks is not None:
        about["landmarks"] = [[round(x - left, 2), round(y - top, 2)] for x, y in face.landmarks]
    return about


def encoded(image: np.ndarray, quality: int | None) -> bytes:
    """(H, W, 3) uint8 as a PNG, or as a JPEG of that quality."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image))
    if quality is None:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def frame_id(stem: str) -> FrameId:
    """What a frame is called whose file has that name: its number, `0071` as 71, or the name."""
    return int(stem) if stem.isascii() and stem.isdecimal() and len(stem) <= LONGEST_NUMBER else stem


def read_boxes(path: Path) -> dict[str, dict[FrameId, list[Face]]]:
    """The faces that the lines of a file name, by video and frame: `{"video": path from data.root, "frame": number or
    name of a file without its ending, "box": [left, top, right, bottom], "landmarks": [[x, y], ...]}`, the last
    optional. Raises DataError with the line that is otherwise.
    """
    found: dict[str, dict[FrameId, list[Face]]] = defaultdict(lambda: defaultdict(list))
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(
            f"data.options.faces: {path}: no such file; give its path from the folder that the command is run from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.options.faces: {path}: cannot be read as a text in UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                video, frame, face = _one_face(line)
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}; correct the line") from error
            found[video][frame].append(face)
    return {video: dict(frames) for video, frames in found.items()}


def _one_face(line: str) -> tuple[str, FrameId, Face]:
    """(video, frame, face) of a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})") from error
    if not isinstance(row, dict) or not {"video", "frame", "box"} <= row.keys():
        raise DataError("is no object with 'video', 'frame' and 'box'")
    video, frame = row["video"], row["frame"]
    if not isinstance(video, str):
        raise DataError(f"'video' is {video!r}, not a path")
    if isinstance(frame, bool) or not (isinstance(frame, str) or (isinstance(frame, int) and frame >= 0)):
        raise DataError(f"'frame' is {frame!r}, neither a number from 0 on nor the name of a file")
    face = made_face(row["box"], row.get("landmarks"))
    refuse_empty(face)
    return Path(video).as_posix(), frame_id(str(frame)), face


def beside(path: Path) -> tuple[Path, Path]:
    """Where the boxes and the landmarks of the frame `.../frames/1/2.png` lie: `.../retina/1/2.npy`, which is an array,
    and `.../landmarks/1/2.npy`. Raises DataError for a file that is in no such folder.
    """
    parts = path.parts
    if FRAMES not in parts[:-1]:
        raise DataError(
            f"data.options.faces: {path}: 'beside' asks for frames in a folder '{FRAMES}' with '{BOXES}' and "
            f"'{LANDMARKS}' beside it; extract its frames, take it out, or name the faces otherwise"
        )
    place = max(place for place, part in enumerate(parts[:-1]) if part == FRAMES)
    boxes, landmarks = (Path(*parts[:place], name, *parts[place + 1 :]) for name in (BOXES, LANDMARKS))
    return boxes.with_suffix(".npy"), landmarks.with_suffix(".npy")


def find_beside(boxes: Path, landmarks: Path, image: np.ndarray) -> Face:
    """The largest face of a frame by `boxes`, an array (faces, 2 or more, 2) whose first points are the corners of each
    box, with those landmarks, an array (faces, points, 2), if the file is there, whose middle lies in the box and
    nearest to its own. Raises DataError when there is no face, and for arrays of another kind.
    """
    if not boxes.is_file():
        raise DataError(f"no face is known: there is no {boxes}")
    face = largest(made_face(corners[:2].ravel()) for corners in _points(boxes, 2))
    if not landmarks.is_file():
        return face
    left, top, right, bottom = face.box
    inside = []
    for points in _points(landmarks, LEAST_LANDMARKS):
        x, y = points.mean(axis=0)
        if left <= x <= right and top <= y <= bottom:
            inside.append((math.hypot(2 * x - left - right, 2 * y - top - bottom), len(inside), points))
    return made_face(face.box, min(inside)[2]) if inside else face


def _points(path: Path, least: int) -> np.ndarray:
    """(faces, `least` or more, 2) finite numbers of an npy file; DataError otherwise."""
    try:
        with path.open("rb") as file:
            points = np.lib.format.read_array(file, allow_pickle=False)
    # Of a header that is no text of Python's, or that names more than there can be.
    except (ValueError, TypeError, TokenError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: is no array of numbers ({error}); make it again") from error
    if points.dtype.kind not in "iuf" or points.ndim != 3:
        raise DataError(f"{path}: is no array (faces, points, 2) of numbers; make it again")
    if points.shape[1] < least or points.shape[2] != 2 or not np.isfinite(points).all():
        raise DataError(f"{path}: has shape {points.shape}, or numbers that are not finite; make it again")
    return points.astype(np.float64)


def find_detected(name: str, path: Path, image: np.ndarray) -> Face:
    """The largest face that the user's detector `package.module:detector` finds in an image (H, W, 3) uint8 RGB of
    `path`.

    Raises DataError when it finds none, and ModelError when it fails, or what it returns is no list of faces.
    """
    detector = choose.imported(name)
    try:
        with ONE_AT_A_TIME:
            found = detector(np.array(image))  # a copy of its own, which it may write to
    except Exception as error:  # whatever a user's own function raises
        raise ModelError(f"data.options.faces: {name} failed on {path} ({cause(error)}); mend it") from error
    if not isinstance(found, (list, tuple, np.ndarray)):
        raise ModelError(f"data.options.faces: {name} returned {type(found).__name__}, not a list of faces; mend it")
    return largest([_detected(name, one) for one in found])


def _detected(name: str, one: Any) -> Face:
    try:
        if not isinstance(one, Mapping):
            return made_face(one)
        if "box" not in one:
            raise DataError(f"it has {sorted(map(str, one))}, and no 'box'")
        return made_face(one["box"], one.get("landmarks"))
    except DataError as error:
        raise ModelError(
            f"data.options.faces: {name} returned a face that is none: {error}; return (left, top, right, bottom), or "
            f"a mapping with 'box' and, if there are, 'landmarks'"
        ) from error


def _area(face: Face) -> float:
    left, top, right, bottom = face.box
    return max(0.0, right - left) * max(0.0, bottom - top)


def _widened(face: Face, margin: float) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in whole pixels, the first two not below 0."""
    left, top, right, bottom = face.box
    wider, taller = margin * (right - left), margin * (bottom - top)
    edges = (max(0.0, left - wider), max(0.0, top - taller), right + wider, bottom + taller)
    return tuple(math.floor(edge + 0.5) for edge in edges)


def _shown(value: Any) -> str:
    """A value as a sentence shows it."""
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
