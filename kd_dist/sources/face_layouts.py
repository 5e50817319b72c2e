"""Where videos of real and manipulated faces lie: FaceForensics++'s folders, or plain ones; and which belong together.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from kd_dist.choose import hint
from kd_dist.errors import DataError
from kd_dist.inputs.images import IMAGE_EXTENSIONS
from kd_dist.sources.faces import FRAMES
from kd_dist.sources.videos import VIDEO_EXTENSIONS

ORIGINAL, MANIPULATED = "original_sequences", "manipulated_sequences"
VIDEOS = "videos"
SPLITS = ("train", "val", "test")
IDS = re.compile(r"(\d+)(?:_(\d+))?(?:__.*)?")  # 071; 071_054, whose face in whose place; 01_02__a_scene__another
NUMBER = re.compile(r"\d+")


class Video(NamedTuple):
    """One video, as a folder of frames, a video file or a single image."""

    name: str  # unique in its split
    path: Path
    fake: bool
    split: str | None  # None: the recipe's fractions decide
    ids: tuple[str, ...]  # what it was made from, its own place in the layout first: videos that share one are a group


def is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def is_image_file(path: Path) -> bool:
    return is_image(path) and path.is_file()


def is_video_file(path: Path) -> bool:
    return path.suffix[1:].lower() in VIDEO_EXTENSIONS and path.is_file()


def frames_of(video: Video) -> list[Path]:
    """The images of a folder of frames, by their names, numbers in them by value; an image alone. Not of a file."""
    if is_image_file(video.path):
        return [video.path]
    return sorted((one for one in video.path.iterdir() if is_image(one)), key=lambda path: natural(path.stem))


def natural(text: str) -> list[int | str]:
    """What texts are sorted by so that frame 10 comes behind frame 9."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", text))]


def is_forensics(top: Path) -> bool:
    """Whether a folder has FaceForensics++'s layout."""
    return (top / ORIGINAL).is_dir() or (top / MANIPULATED).is_dir()


def forensics(
    top: Path, compression: str, methods: Sequence[str] | None, origins: Sequence[str] | None
) -> list[Video]:
    """The videos of FaceForensics++'s layout: `original_sequences/<origin>/<compression>/` and
    `manipulated_sequences/<method>/<compression>/`, in each `frames/<video>/*.png`, or else `videos/<video>.mp4`.

    Raises DataError for an origin or a method that is not there.
    """
    videos = []
    for kind, option, chosen in ((ORIGINAL, "origins", origins), (MANIPULATED, "methods", methods)):
        there = {one.name for one in _folders(top / kind) if (one / compression).is_dir()}
        if chosen is None and not there and _folders(top / kind):
            found = {inner.name for one in _folders(top / kind) for inner in _folders(one)}
            raise DataError(
                f"data.options.compression: no folder of {top / kind} holds a '{compression}'{hint(compression, found)}"
            )
        for name in sorted(there) if chosen is None else chosen:
            if name not in there:
                raise DataError(
                    f"data.options.{option}: {top / kind / name / compression}: no such folder{hint(name, there)}"
                )
            for stem, path in _stems(top / kind / name / compression):
                found = IDS.fullmatch(stem)
                ids = tuple(one for one in found.groups() if one) if found else (stem,)
                videos.append(Video(f"{name}/{stem}", path, kind == MANIPULATED, None, ids))
    originals = {video.ids[0] for video in videos if not video.fake}
    return [_related(video, originals) for video in videos]


def _related(video: Video, originals: set[str]) -> Video:
    """A video whose name is of no known form, with the originals that it names."""
    stem = video.ids[0]
    named = sorted(originals.intersection(NUMBER.findall(stem)))
    return video if IDS.fullmatch(stem) else video._replace(ids=(stem, *named))


def _stems(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder of frames or video file) of every video; the file only where there is no frame of it."""
    found = {path.stem: path for path in sorted(_inside(folder / VIDEOS)) if is_video_file(path)}
    found |= {one.name: one for one in _folders(folder / FRAMES) if any(map(is_image, one.iterdir()))}
    yield from sorted(found.items())


def plain(top: Path, real: str, fake: str) -> list[Video]:
    """The videos of `top/<real>` and `top/<fake>`, or of these in `top/train`, `top/val` and `top/test`.

    A folder that holds images is a video of them, a video file is one, and so is an image right in `real` or `fake`. Of
    a video that is there both as a folder and as a file, the folder is taken. A fake belongs to a real video whose name
    its own begins or ends with, joined by `_`. Raises DataError without a folder of real ones.
    """
    splits = [split for split in SPLITS if (top / split / real).is_dir() or (top / split / fake).is_dir()]
    if splits:
        _refuse_beside(top, real, fake)
    videos = []
    for split in splits or [None]:
        home = top / (split or "")
        _refuse_nested(home / real, home / fake)
        reals, fakes = (dict(_found(home / name)) if (home / name).is_dir() else {} for name in (real, fake))
        known = defaultdict(list)
        for name in reals:
            known[name.rpartition("/")[2]].append(name)
        prefix = f"{split}/" if split else ""  # what splits have in common is the user's to decide
        for name, path in reals.items():
            videos.append(Video(_joined(real, name), path, False, split, (prefix + name,)))
        for name, path in fakes.items():
            ids = dict.fromkeys([name, *(one for part in _parts(name) for one in known.get(part, ()))])
            videos.append(Video(_joined(fake, name), path, True, split, tuple(prefix + one for one in ids)))
    if not any(not video.fake for video in videos):
        raise DataError(
            f"data.root: {top / real}: no such folder, or no image or video in it; set data.root to a folder with "
            f"{ORIGINAL} and {MANIPULATED}, or with real and fake, or name these in data.options.real and .fake"
        )
    return videos


def _refuse_beside(top: Path, real: str, fake: str) -> None:
    """Raise a DataError for videos that would be left out beside those of the splits."""
    for home in (top, *(one for one in _folders(top) if one.name not in SPLITS)):
        for name in (real, fake):
            if name != "." and (home / name).is_dir() and (home / name).name not in SPLITS:
                raise DataError(
                    f"{home / name}: stands beside the splits {', '.join(SPLITS)}, whose folders alone are taken; move "
                    f"it into one of them, or out of {top}"
                )


def _refuse_nested(real: Path, fake: Path) -> None:
    if fake.is_dir() and real.resolve() in (fake.resolve(), *fake.resolve().parents):
        raise DataError(f"data.options.real: {real} holds {fake} as well; give each a folder of its own")


def _parts(name: str) -> Iterator[str]:
    """What a fake may be named after: the last part of its name, and all that stands before or behind a `_` in it."""
    last = name.rpartition("/")[2]
    yield last
    for place in (place for place, letter in enumerate(last) if letter == "_"):
        yield last[:place]
        yield last[place + 1 :]


def _joined(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _found(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of the videos anywhere in a folder, by their names."""
    found: dict[str, Path] = {}
    for home, _, files in sorted(os.walk(folder)):
        paths = [Path(home, name) for name in sorted(files)]
        images = [path for path in paths if is_image(path)]
        here = [path for path in paths if is_video_file(path)] + (images if Path(home) == folder else [])
        if images and Path(home) != folder:
            found[Path(home).relative_to(folder).as_posix()] = Path(home)
        for path in here:
            name = path.relative_to(folder).with_suffix("").as_posix()
            if name in found:
                raise DataError(f"{found[name]} and {path} would both be the video '{name}'; rename one of them")
            if not path.with_suffix("").is_dir() or not any(map(is_image, path.with_suffix("").iterdir())):
                found[name] = path
    yield from sorted(found.items(), key=lambda pair: natural(pair[0]))


def read_splits(folder: Path) -> dict[str, str]:
    """Video -> split, of the lists of pairs `train.json`, `val.json` and `test.json` in a folder, those that are there.

    Raises DataError for another content, and for a video in two of them.
    """
    found: dict[str, str] = {}
    for split in SPLITS:
        path = folder / f"{split}.json"
        if not path.is_file():
            continue
        try:
            pairs = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is no JSON ({error}); give a list of pairs of videos") from error
        if not isinstance(pairs, list) or not all(
            isinstance(pair, list) and all(isinstance(one, str) for one in pair) for pair in pairs
        ):
            raise DataError(f'{path}: is no list of pairs of videos, such as [["071", "054"]]; correct it')
        for name in (name for pair in pairs for name in pair):
            if found.setdefault(name, split) != split:
                raise DataError(f"{path}: video '{name}' is in {found[name]}.json as well; take it out of one")
    return found


def has_splits(folder: Path) -> bool:
    """Whether a folder holds such lists."""
    return any((folder / f"{split}.json").is_file() for split in SPLITS)


def groups(videos: Iterable[Video]) -> list[str]:
    """The group of each video: of all that are connected by what they were made from, the id that sorts first."""
    above: dict[str, str] = {}

    def first(name: str) -> str:
        while above.setdefault(name, name) != name:
            above[name] = above[above[name]]
            name = above[name]
        return name

    videos = list(videos)
    for video in videos:
        for other in video.ids[1:]:
            low, high = sorted((first(video.ids[0]), first(other)))
            above[high] = low
    return [first(video.ids[0]) for video in videos]


def _inside(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _folders(folder: Path) -> list[Path]:
    return sorted(one for one in _inside(folder) if one.is_dir() and not one.name.startswith("."))
