"""Frames of video files, through PyAV: each the very one that its number says, in the order in which they are shown."""

import contextlib
import errno
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_dist.errors import DataError, KdError

VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "mkv", "webm", "avi")
FORMATS = "mov,mp4,matroska,webm,avi"  # another, such as a playlist, may name further files
TIMED = ("mov", "matroska")  # whose packets have the times of the frames in them


class Table(NamedTuple):
    """What a video file says of its packets, before anything is decoded."""

    times: list[int | None]  # of each frame that is shown, in the order of the file
    keys: list[tuple[int, int]]  # (time, where to seek to) of each frame from which on decoding can begin
    timed: bool  # whether the times are those of decoded frames


def picked(place: int, of: int, count: int) -> int:
    """Which of `count` frames is number `place` of `of` that are evenly chosen: the middle of its share."""
    return (2 * place + 1) * count // (2 * of)


def refuse_without_library(path: Path) -> None:
    """Raise a KdError when PyAV, which reads `path`, is not installed."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise KdError(
            f"{path}: a video file is read through PyAV, which is not installed ({error}); pip install "
            f"'kd_dist[video]', or give folders of frames"
        ) from error


def count_frames(path: Path) -> int:
    """The frames of a video file, counted without decoding. Raises DataError when it is damaged."""
    return len(_table(path).times)


def read_frame(path: Path, number: int, of: int | None = None) -> tuple[int, np.ndarray]:
    """(n, pixels) of frame n of a video file, counted from 0 in the order in which frames are shown; (H, W, 3) uint8
    RGB.

    n is `number`, or with `of` the frame that is number `number` of `of` evenly chosen ones. Raises DataError where
    there is no such frame, where it would repeat the one before, and when what leads to the frame is damaged.
    """
    table = _table(path)
    count = len(table.times)
    if of is not None:
        place, number = number, picked(number, of, count)
        if place and picked(place - 1, of, count) == number:
            raise DataError(f"the video has {count} frames, fewer than {of}; this one would repeat frame {number}")
    if number >= count:
        raise DataError(f"the video has {count} frames, counted from 0, and so none of number {number}")
    if not table.timed:
        found = next(itertools.islice(_decoded(path, None), number, None), None)
    else:
        wanted = sorted(table.times)[number]
        found, keys = None, [key for key in table.keys if key[0] <= wanted]
        with contextlib.suppress(DataError):  # not every key is one; from the first frame on is the last word
            found = _at(wanted, _decoded(path, max(keys))) if keys else None
        found = found or _at(wanted, _decoded(path, None))
    if found is None:
        raise DataError(f"frame {number} of the video's {count} cannot be decoded; it is damaged")
    return number, found.to_ndarray(format="rgb24")


def _at(time: int, frames: Iterator[Any]) -> Any | None:
    """The frame that is shown at that time."""
    found = next((frame for frame in frames if frame.pts is None or frame.pts >= time), None)
    return found if found is not None and found.pts == time else None


def _table(path: Path) -> Table:
    """The packets of a video file. Raises DataError when one is cut off, or there is none."""
    with _opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        timed = container.format.name.split(",")[0] in TIMED
    if any(packet.is_corrupt for packet in packets):
        raise DataError("the video is cut off, or damaged")
    times = [packet.pts for packet in packets if not packet.is_discard]
    if not times:
        raise DataError("the video has no frame")
    timed = timed and None not in times and len(set(times)) == len(times)
    keys = [
        (packet.pts, packet.pts if packet.dts is None else packet.dts)
        for packet in packets
        if packet.is_keyframe and packet.pts is not None
    ]
    return Table(times, keys, timed)


def _decoded(path: Path, key: tuple[int, int] | None) -> Iterator[Any]:
    """The frames of a video file in the order in which they are shown, from a key of its table on; None: from the
    first. Raises DataError at damage that the decoder notices."""
    with _opened(path) as (container, stream):
        stream.codec_context.thread_count = 1  # the items of a shard are read in threads already
        if key is not None:
            container.seek(key[1], stream=stream)
        for packet in container.demux(stream):
            if key is not None and packet.pts is not None and packet.pts < key[0]:
                continue  # made from what lies before the key, and shown before it
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise DataError("the video is damaged")
                yield frame


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream). What PyAV cannot read within the block becomes a DataError."""
    import av

    try:
        with av.open(str(path), options={"format_whitelist": FORMATS}) as container:
            if not container.streams.video:
                raise DataError("the file has no video in it")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        if isinstance(error, (OSError, MemoryError)) and error.errno != errno.EIO:  # EIO also says: ends too early
            raise  # no fault of the video's own
        raise DataError(f"the video cannot be decoded ({error.strerror}); it is damaged, or no video") from error
