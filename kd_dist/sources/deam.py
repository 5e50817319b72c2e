"""DEAM's layout, the MediaEval Database for Emotional Analysis of Music: songs, each with valence and arousal."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from kd_dist.errors import DataError, RecipeError
from kd_dist.sources import Item, Listing
from kd_dist.sources.labels import number, read_labels

OUTPUTS = ("valence", "arousal")
AUDIO = "MEMD_audio"
AVERAGES = ("annotations", "annotations averaged per song")
STATIC, DYNAMIC = "song_level", "dynamic (per second annotations)"
SONG_LISTS = "static_annotations_averaged_songs_*.csv"
SONG = "song_id"
BEGIN = 15_000  # ms; where the dynamic annotations begin: listeners need some time
SPACING = 500  # ms between them
COLUMN = re.compile(r"sample_(\d+)ms")

Pair = tuple[float, float]  # valence, arousal


def deam(root: str, windows: float | None = None, missing: Literal["error", "skip"] = "error") -> Listing:
    """List the songs `root/MEMD_audio/<song_id>.mp3` that have annotations, labelled (valence, arousal) in [-1, 1].

    Without `windows`, an item is a song; its label are the means in `static_annotations_averaged_songs_*.csv`, 1..9
    there, as (x - 5) / 4. With `windows`, in seconds, items are the consecutive windows of a song from 15 s on; the
    label is the mean of the dynamic annotations in the window, which are in [-1, 1] and twice a second. A window of
    which fewer than half are there is left out. Windows of a song are a group: they stay in one split.

    A song without annotations is left out. One without audio is a DataError, or left out where `missing` is `skip`.
    Raises DataError as well for a missing folder, file or column, and for a song that is annotated twice.
    """
    if windows is not None and not SPACING <= windows * 1000 < math.inf:
        raise RecipeError(f"data.options.windows: {windows} s hold no annotation; take 0.5 s or more, or leave it out")
    top = Path(root)
    audio, averages = _folder(top, AUDIO), _folder(top, *AVERAGES)
    if windows is None:
        parts = _songs(_folder(averages, STATIC))
    else:
        parts = _windows(_folder(averages, DYNAMIC), round(windows * 1000))
    few, parts = len([song for song in parts if not parts[song]]), {song: one for song, one in parts.items() if one}
    songs = {song: audio / f"{song}.mp3" for song in parts}
    absent = [song for song, path in songs.items() if not path.is_file()]
    if absent and (missing == "error" or len(absent) == len(songs)):
        raise DataError(
            f"data.root: {songs[absent[0]]}: no such file, and so with {len(absent)} of {len(songs)} annotated songs; "
            f"add the audio, or set data.options.missing to 'skip' if only some of it is there"
        )
    items = []
    for song in sorted(songs.keys() - absent, key=lambda song: (len(song), song)):
        for begin, label in parts[song].items():
            name = song if begin is None else f"{song}/{begin}ms"
            span = None if begin is None else (begin / 1000, begin / 1000 + windows)
            items.append(Item(name, None, "mp3", label, songs[song].read_bytes, song, span))
    if not items:
        raise DataError(f"data.root: {averages}: no song has annotations enough; see to the files there")
    notes = [f"{few} songs have no window of {windows:g} s with half of its annotations, left out"] if few else []
    notes += [f"{len(absent)} of {len(songs)} annotated songs have no audio, left out"] if absent else []
    return Listing(OUTPUTS, items, tuple(notes))


def _songs(folder: Path) -> dict[str, dict[None, Pair]]:
    """Song -> {None: its label}."""
    paths = sorted(folder.glob(SONG_LISTS))
    if not paths:
        raise DataError(f"data.root: {folder}: holds no {SONG_LISTS}; set data.root to the folder of DEAM")
    columns, songs = [f"{output}_mean" for output in OUTPUTS], {}
    for path in paths:
        for song, row in _by_song(path, columns).items():
            if song in songs:
                raise DataError(f"{path}: song {song} is also in another file of {folder}; remove one of the two")
            songs[song] = {None: tuple((number(row, column, path) - 5) / 4 for column in columns)}
    return songs


def _windows(folder: Path, length: int) -> dict[str, dict[int, Pair]]:
    """Song -> {begin of a window in ms: its label}, empty where none has annotations enough; `length` in ms too."""
    by_output = [_annotations(folder / f"{output}.csv") for output in OUTPUTS]
    enough = length / SPACING / 2
    songs = {}
    for song in by_output[0].keys() & by_output[1].keys():
        held: dict[int, list[Pair]] = defaultdict(list)
        valence, arousal = (one[song] for one in by_output)
        for time in valence.keys() & arousal.keys():
            if time >= BEGIN:
                held[(time - BEGIN) // length].append((valence[time], arousal[time]))
        songs[song] = {
            BEGIN + index * length: tuple(_mean(values) for values in zip(*pairs, strict=True))
            for index, pairs in sorted(held.items())
            if len(pairs) >= enough
        }
    return songs


def _mean(values: Iterable[float]) -> float:
    """The mean, whatever the order."""
    values = tuple(values)
    return math.fsum(values) / len(values)


def _annotations(path: Path) -> dict[str, dict[int, float]]:
    """Song -> {time in ms: annotation}, of those that are there."""
    songs = {}
    for song, row in _by_song(path, []).items():
        times = {name: int(found[1]) for name in row if (found := COLUMN.fullmatch(name))}
        if not times:
            found = ", ".join(list(row)[:30])
            raise DataError(f"{path}: needs columns sample_15000ms and so on, found {found}; correct the header")
        values = {time: number(row, name, path) for name, time in times.items()}
        songs[song] = {time: value for time, value in values.items() if not math.isnan(value)}
    return songs


def _by_song(path: Path, columns: list[str]) -> dict[str, dict[str, str]]:
    """The rows of a file by song."""
    songs: dict[str, dict[str, str]] = {}
    for row in read_labels(path, [SONG, *columns]):
        song = row[SONG]
        if not re.fullmatch(r"\d+", song) or song in songs:
            told = "stands twice" if song in songs else "is no number"
            raise DataError(f"{path}: {SONG} '{song}' {told}; correct it")
        songs[song] = row
    return songs


def _folder(top: Path, *names: str) -> Path:
    """The folder `top/names...`, the first of them also one level deeper, spelt with spaces or underscores."""
    for depth, name in enumerate(names):
        near = [*top.glob("*/"), *(top.glob("*/*/") if depth == 0 else ())]
        wanted = name.replace(" ", "_").lower()
        found = [path for path in sorted(near) if path.name.replace(" ", "_").lower() == wanted and path.is_dir()]
        if not found:
            raise DataError(
                f"data.root: {top / name}: no such folder; set data.root to the folder that holds {AUDIO} and "
                f"{'/'.join(AVERAGES)}"
            )
        top = min(found, key=lambda path: len(path.parts))
    return top
