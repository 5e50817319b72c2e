"""Frames of videos of faces, real ones and manipulated ones: chosen, cropped and packed, with their videos' names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_dist.choose import hint, imported
from kd_dist.errors import DataError, RecipeError
from kd_dist.inputs.images import decode_image
from kd_dist.sources import Item, Listing, Raw
from kd_dist.sources.face_layouts import (
    ORIGINAL,
    SPLITS,
    Video,
    forensics,
    frames_of,
    groups,
    has_splits,
    is_forensics,
    is_image_file,
    is_video_file,
    plain,
    read_splits,
)
from kd_dist.sources.faces import (
    Face,
    FrameId,
    beside,
    crop,
    described,
    encoded,
    find_beside,
    find_detected,
    frame_id,
    read_boxes,
)
from kd_dist.sources.videos import count_frames, picked, read_frame, refuse_without_library
from kd_dist.views.blended import FAKE, REAL
from kd_dist.views.blends import as_json, blend, draw_blend
from kd_dist.views.chance import uniform

CLASSES = ("real", "fake")
WHOLE, BESIDE, BOX_FILE = "whole", "beside", ".jsonl"

Load = Callable[[], tuple[np.ndarray, dict[str, Any]]]  # the pixels of a frame, and what is known with them
Find = Callable[[np.ndarray], Face]  # the face in these pixels


class Packing(NamedTuple):
    """What becomes of a frame that was chosen."""

    find: Callable[[Path], Find] | None  # who finds the face in a frame of this file; None: nobody has to
    margin: float  # share of a box's width and height that is added on each side
    quality: int | None  # of a JPEG; None: PNG


class Frame(NamedTuple):
    """One frame that was chosen, and the face in it if that is known before the frame is read."""

    name: str  # within its video
    path: Path  # an image, or a video file
    load: Load
    number: FrameId | None  # None: known when it is read
    face: Face | None = None


def face_frames(
    root: str,
    faces: str,
    compression: str = "c23",
    methods: list[str] | None = None,
    origins: list[str] | None = None,
    splits: str | None = None,
    real: str = "real",
    fake: str = "fake",
    frames: int | None = 8,
    margin: float = 0.125,
    quality: int | None = None,
    blends: int = 0,
    blends_not_in: tuple[str, ...] = ("train",),
    fakes_not_in: tuple[str, ...] = (),
    seed: int = 0,
) -> Listing:
    """List `frames` frames of every video under `root`, evenly chosen, all of them where it is None. Label 1 is fake.

    `root` has FaceForensics++'s folders, of which `compression`, `methods` and `origins` (None: all that are there) are
    taken and the lists `train.json`, `val.json`, `test.json` in the folder `splits` decide about splits (None: those in
    `root/splits` or `root`, else the recipe's fractions); or folders `real` and `fake`, see `face_layouts.plain`.

    `faces` says what is packed of a frame: "whole"; the face by the arrays "beside" it, see `faces.find_beside`; those
    that a file with the ending `.jsonl` names, see `faces.read_boxes`, in which case frames are chosen of those named;
    or that which `package.module:detector` finds, called with (H, W, 3) uint8 RGB, which returns a list of faces, each
    (left, top, right, bottom) or a mapping with `box` and perhaps `landmarks`. Of several that are known when the frame
    is read, the largest; of several in the file, each is an item. `margin` is added on each side of a box. What is
    cropped, decoded from a video or blended becomes a PNG, or a JPEG of that `quality`.

    `blends` of every real item are self-blended images, label 1, drawn with `seed`; there are none in the splits
    `blends_not_in`, in training because views blend by themselves. Manipulated videos are left out of the splits
    `fakes_not_in`: a detector may be judged by methods that it has never seen. Raises RecipeError and DataError for
    what cannot be.
    """
    _refuse_numbers(frames, margin, quality, blends)
    top = Path(root)
    if not top.is_dir():
        raise DataError(f"data.root: {root}: no such folder; set data.root to the folder that holds the videos")
    packing = Packing(_finder(faces), margin, quality)
    boxes = read_boxes(Path(faces)) if faces.endswith(BOX_FILE) else None
    if is_forensics(top):
        videos, notes = _listed(forensics(top, compression, methods, origins), _splits_folder(top, splits))
    else:
        _refuse_forensics_options(top, methods=methods, origins=origins, splits=splits)
        videos, notes = plain(top, real, fake), []
    if boxes is not None:
        videos, more = _with_boxes(top, videos, boxes, faces)
        notes += more
    _refuse_one_class(top, videos, blends)
    items = []
    for video, group in zip(videos, groups(videos), strict=True):
        known = None if boxes is None else boxes[_relative(video, top)]
        for frame in _frames(video, frames, known):
            item = _item(video, group, frame, packing)
            items.append(item._replace(not_in=fakes_not_in) if video.fake else item)
            if not video.fake:
                items += [_blended(item, video, frame, packing, seed, blends_not_in, n) for n in range(blends)]
    decoders = ("av",) if any(is_video_file(video.path) for video in videos) else ()
    return Listing(CLASSES, items, tuple(notes), decoders)


def read_example(
    load: Load, find: Find | None, margin: float, quality: int | None, chance: tuple[int, str, int] | None
) -> Raw:
    """One frame, whole or the face in it, encoded; or the blend of it that `chance`, seed, name and number, draws."""
    image, about = load()
    if find is not None:
        face = find(image)
        image, about = crop(image, face, margin), {**about, **described(face, margin)}
    if chance is not None:
        parameters = draw_blend(partial(uniform, *chance), image.shape[:2], about.get("landmarks"))
        image, about = blend(image, parameters), {**about, "blend": as_json(parameters)}
    return Raw(encoded(image, quality), about)


def load_image(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The pixels of an image file."""
    return decode_image(path.read_bytes()), {}


def load_frame(path: Path, number: int, of: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    """The pixels of a frame of a video file, and its number; see `read_frame`."""
    number, image = read_frame(path, number, of)
    return image, {"frame": number}


def given(face: Face, image: np.ndarray) -> Face:
    return face


def _item(video: Video, group: str, frame: Frame, packing: Packing) -> Item:
    """The example of a frame."""
    name = "/".join(part for part in (video.name, frame.name) if part)
    about: dict[str, Any] = {"video": video.name}
    about |= {} if frame.number is None else {"frame": frame.number}
    about |= {} if frame.face is None else described(frame.face, packing.margin)
    # Of some quality are all or none: blends could be told by what it does to a picture.
    if is_image_file(frame.path) and frame.face is None and packing.find is None and packing.quality is None:
        read, extension = frame.path.read_bytes, frame.path.suffix[1:].lower()  # as it is
    else:
        read, extension = _reader(frame, packing, None), _extension(packing)
    return Item(name, video.split, extension, FAKE if video.fake else REAL, read, group, about=about)


def _blended(
    item: Item, video: Video, frame: Frame, packing: Packing, seed: int, not_in: tuple[str, ...], number: int
) -> Item:
    """The example of a blend of the frame that `item` is of."""
    other = f"{video.name}+blend{number or ''}"  # a video of its own: each is to be found out by itself
    return item._replace(
        name="/".join(part for part in (other, frame.name) if part),
        extension=_extension(packing),
        label=FAKE,
        read=_reader(frame, packing, (seed, item.name, number)),
        about={**item.about, "video": other},
        not_in=not_in,
    )


def _reader(frame: Frame, packing: Packing, chance: tuple[int, str, int] | None) -> Callable[[], Raw]:
    if frame.face is not None:
        find = partial(given, frame.face)
    else:
        find = None if packing.find is None else packing.find(frame.path)
    return partial(read_example, frame.load, find, packing.margin, packing.quality, chance)


def _extension(packing: Packing) -> str:
    return "png" if packing.quality is None else "jpg"


def _frames(video: Video, count: int | None, known: Mapping[FrameId, list[Face]] | None) -> Iterator[Frame]:
    """The chosen frames of a video, evenly over all, or over those with `known` faces: one for each of these."""
    if is_video_file(video.path):
        refuse_without_library(video.path)
        if known is None:
            yield from _frames_of_file(video.path, count)
            return
        loads = {number: partial(load_frame, video.path, number, None) for number in known}
        files = {number: (str(number), video.path) for number in sorted(known)}
    else:
        files = _by_number(frames_of(video), alone=is_image_file(video.path))
        loads = {number: partial(load_image, path) for number, (_, path) in files.items()}
    for number in _evenly([number for number in files if known is None or number in known], count):
        name, path = files[number]
        found = [None] if known is None else known[number]
        for place, face in enumerate(found):
            one = name if len(found) == 1 else f"{name}/{place}".lstrip("/")
            yield Frame(one, path, loads[number], number, face)


def _frames_of_file(path: Path, count: int | None) -> Iterator[Frame]:
    """Frames of a video file, of which nothing is decoded now: how many it has is seen when one is read."""
    if count is not None:
        for place in range(count):
            yield Frame(str(place), path, partial(load_frame, path, place, count), None)
        return
    try:
        count = count_frames(path)
    except DataError:
        count = 1  # which says the same when it is read, and is listed with that reason
    for number in range(count):
        yield Frame(str(number), path, partial(load_frame, path, number, None), number)


def _by_number(paths: Sequence[Path], alone: bool) -> dict[FrameId, tuple[str, Path]]:
    """{number of a frame: (its name within the video, its file)}; a video that is one image needs no such name."""
    found: dict[FrameId, tuple[str, Path]] = {}
    for path in paths:
        number = frame_id(path.stem)
        if number in found:
            raise DataError(f"{found[number][1]} and {path} would both be frame {number} of a video; remove one")
        found[number] = ("" if alone else path.stem, path)
    return found


def _evenly(numbers: Sequence[FrameId], count: int | None) -> list[FrameId]:
    """So many of them, evenly chosen; all of them where there are fewer."""
    if count is None or len(numbers) <= count:
        return list(numbers)
    return [numbers[picked(place, count, len(numbers))] for place in range(count)]


def _listed(videos: list[Video], folder: Path | None) -> tuple[list[Video], list[str]]:
    """The videos that official lists name, with their splits; all of them where there are no lists. And what is left
    out."""
    if folder is None:
        return videos, []
    splits = read_splits(folder)
    kept = [video._replace(split=splits[video.ids[0]]) for video in videos if video.ids[0] in splits]
    absent = splits.keys() - {video.ids[0] for video in videos if not video.fake}
    notes = []
    if absent:
        some = f"{len(absent)} of {len(splits)} videos that the lists in {folder} name"
        notes.append(f"{some} are not there, such as {min(absent)}")
    without = [f"{split}.json" for split in SPLITS if split not in splits.values()]
    notes += [f"the lists in {folder} have no video for {', '.join(without)}"] if without else []
    left_out = len(videos) - len(kept)
    notes += [f"{left_out} of {len(videos)} videos are in none of the lists in {folder}, left out"] if left_out else []
    return kept, notes


def _splits_folder(top: Path, splits: str | None) -> Path | None:
    """The folder of the official lists, None where there is none."""
    if splits is None:
        return next((folder for folder in (top / "splits", top) if has_splits(folder)), None)
    if not has_splits(Path(splits)):
        raise DataError(
            f"data.options.splits: {splits}: holds none of train.json, val.json and test.json; name another"
        )
    return Path(splits)


def _relative(video: Video, top: Path) -> str:
    return video.path.relative_to(top).as_posix()


def _with_boxes(
    top: Path, videos: list[Video], boxes: Mapping[str, Mapping[FrameId, Any]], file: str
) -> tuple[list[Video], list[str]]:
    """The videos of which the file names a face, and what is left out. Raises DataError for a frame that is not there,
    and when no video is left."""
    kept = [video for video in videos if _relative(video, top) in boxes]
    if not kept:
        raise DataError(
            f"data.options.faces: {file} names a face in none of the {len(videos)} videos; 'video' is the path from "
            f"{top} on, such as '{_relative(videos[0], top)}'"
        )
    for video in kept:
        there = [] if is_video_file(video.path) else [frame_id(path.stem) for path in frames_of(video)]
        for number in boxes[_relative(video, top)]:
            if number not in there and not (is_video_file(video.path) and isinstance(number, int)):
                raise DataError(
                    f"data.options.faces: {file} names frame {number!r} of {video.path}, which has none such; mend it"
                )
    names = {_relative(video, top) for video in videos}
    absent, without = sorted(boxes.keys() - names), sorted(names - boxes.keys())
    notes = []
    if absent:
        some = f"{len(absent)} of {len(boxes)} videos that {file} names"
        notes.append(f"{some} are not among those taken, such as {absent[0]}")
    if without:
        notes.append(f"{len(without)} of {len(videos)} videos have no face in {file}, left out, such as {without[0]}")
    return kept, notes


def _finder(faces: str) -> Callable[[Path], Find] | None:
    """Who finds the face in a frame. Raises RecipeError for an unknown word, or a detector that cannot be imported."""
    if faces == WHOLE or faces.endswith(BOX_FILE):
        return None
    if faces == BESIDE:
        return lambda path: partial(find_beside, *beside(path))
    if ":" not in faces:
        raise RecipeError(
            f"data.options.faces: '{faces}' is neither {WHOLE}, {BESIDE}, a file with the ending {BOX_FILE}, nor "
            f"package.module:detector{hint(faces, (WHOLE, BESIDE))}"
        )
    try:
        imported(faces)
    except RecipeError as error:
        raise RecipeError(f"data.options.faces: {error}") from error
    return lambda path: partial(find_detected, faces, path)


def _refuse_numbers(frames: int | None, margin: float, quality: int | None, blends: int) -> None:
    for name, value, good, wanted in (
        ("frames", frames, frames is None or frames >= 1, "1 or more, or null"),
        ("margin", margin, 0 <= margin <= 10, "from 0 to 10"),
        ("quality", quality, quality is None or 1 <= quality <= 100, "from 1 to 100, or null"),
        ("blends", blends, blends >= 0, "0 or more"),
    ):
        if not good:
            raise RecipeError(f"data.options.{name}: must be {wanted}, not {value}")


def _refuse_forensics_options(top: Path, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise RecipeError(f"data.options.{name}: is for FaceForensics++'s folders, and {top} has no {ORIGINAL}")


def _refuse_one_class(top: Path, videos: list[Video], blends: int) -> None:
    if all(video.fake for video in videos):
        raise DataError(f"data.root: {top}: no real video is left to be packed; see to its folders and data.options")
    if not blends and not any(video.fake for video in videos):
        raise DataError(
            f"data.root: {top}: has no manipulated video; add some, or set data.options.blends to 1 or more, so that "
            f"self-blended images take their place"
        )
