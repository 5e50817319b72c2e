"""Frames of video files: the very ones that are asked for, whatever the order in the file; and damage."""

import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from faces import CODECS, noise, number_in, numbered, write_video

from kd_dist.errors import DataError, KdError
from kd_dist.sources.videos import count_frames, picked, read_frame, refuse_without_library

FRAMES = 70


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: write_video(folder / name, map(numbered, range(FRAMES)), encoder, **options)
        for name, (encoder, options) in CODECS.items()
    }


def in_order(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def packets(path: Path) -> list:
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("name", CODECS)
def test_every_frame_is_the_one_that_its_number_says(videos, name):
    path = videos[name]
    shown = in_order(path)
    assert [number_in(image) for image in shown] == list(range(FRAMES))
    assert count_frames(path) == FRAMES
    for number in range(FRAMES):
        found, image = read_frame(path, number)
        assert found == number and np.array_equal(image, shown[number])


def test_the_videos_are_the_hard_ones(videos):
    """Frames stand in another order than they are shown in, far from a key, and behind open keys."""
    times = {name: [packet.pts for packet in packets(path)] for name, path in videos.items()}
    assert sum(some != sorted(some) for some in times.values()) >= 5
    keys = {name: sum(packet.is_keyframe for packet in packets(path)) for name, path in videos.items()}
    assert keys["closed.mp4"] == keys["long.mkv"] == 1 and keys["open.mp4"] >= 5
    found = packets(videos["open.mp4"])
    second = [place for place, packet in enumerate(found) if packet.is_keyframe][1]
    assert any(packet.pts < found[second].pts for packet in found[second:])  # shown before the key that it follows
    with av.open(str(videos["wrong_times.avi"])) as container:
        shown = [frame.pts for frame in container.decode(video=0)]
    assert sorted(times["wrong_times.avi"]) != shown


def test_a_file_that_begins_before_it_is_shown(videos, tmp_path):
    """An edit list hides the first ten frames; later ones are made from them."""
    path = tmp_path / "cut.mp4"
    with av.open(str(videos["closed.mp4"])) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - 5120, packet.dts - 5120, stream
                container.mux(packet)
    assert sum(packet.is_discard for packet in packets(path)) == 10
    assert count_frames(path) == FRAMES - 10
    assert [number_in(read_frame(path, number)[1]) for number in (0, 1, 30, 59)] == [10, 11, 40, 69]


def test_sampled_frames_are_the_middles_of_equal_shares(videos):
    path = videos["closed.mp4"]
    wanted = [int((place + 0.5) * FRAMES / 8) for place in range(8)]
    assert wanted == [4, 13, 21, 30, 39, 48, 56, 65]
    for place, number in enumerate(wanted):
        found, image = read_frame(path, place, 8)
        assert (found, number_in(image)) == (number, number)
    for count in range(1, 40):
        for of in range(1, 40):
            numbers = [picked(place, of, count) for place in range(of)]
            assert numbers == [int((place + 0.5) * count / of + 1e-9) for place in range(of)]
            assert set(numbers) <= set(range(count)) and (of < count or set(numbers) == set(range(count)))


def test_more_frames_than_there_are(tmp_path):
    path = write_video(tmp_path / "five.mp4", map(numbered, range(5)))
    found = {}
    for place in range(8):
        try:
            found[place] = number_in(read_frame(path, place, 8)[1])
        except DataError as error:
            assert str(error).startswith("the video has 5 frames, fewer than 8; this one would repeat frame ")
    assert sorted(found.values()) == list(range(5))
    with pytest.raises(DataError, match="^the video has 5 frames, counted from 0, and so none of number 5$"):
        read_frame(path, 5)


def test_damage_that_a_decoder_notices_is_told_and_not_painted_over(tmp_path):
    """A video has no checksums; what still makes sense to a decoder stays unnoticed."""
    images = [np.roll(noise(0, size=(120, 160)), 3 * number, 1) for number in range(30)]
    path = write_video(tmp_path / "good.mp4", images)
    shown, content, painted, told = in_order(path), path.read_bytes(), 0, 0
    assert len(content) > 30_000
    for place in range(5_000, len(content) - 5_000, len(content) // 12):
        bad = tmp_path / "bad.mp4"
        bad.write_bytes(content[:place] + bytes(64) + content[place + 64 :])
        pairs = list(zip(in_order(bad), shown, strict=True))
        for number in (number for number, (one, other) in enumerate(pairs) if not np.array_equal(one, other)):
            painted += 1
            try:
                read_frame(bad, number)
            except DataError as error:
                told += "damaged" in str(error)
    assert painted >= 100 and told == painted


@pytest.mark.parametrize("name", ["short.mkv", "short.mp4"])
def test_what_lies_before_a_key_is_not_decoded(videos, tmp_path, name):
    """Damage at the beginning: what is behind the next key is read all the same."""
    found, content = packets(videos[name]), bytearray(videos[name].read_bytes())
    second = sorted(packet.pts for packet in found if packet.is_keyframe)[1]
    later = sum(packet.pts >= second for packet in found)
    end = found[0].pos + found[0].size  # most of a first packet is what the encoder says of itself
    content[end - 20 : end] = bytes(20)
    path = tmp_path / name
    path.write_bytes(content)
    for number in (0, 3):
        with pytest.raises(DataError, match="damaged"):
            read_frame(path, number)
    for number in range(FRAMES - later, FRAMES):
        assert number_in(read_frame(path, number)[1]) == number
    assert later > 50


@pytest.mark.parametrize("name", ["closed.mp4", "plain.avi"])
def test_a_file_that_was_cut_off(videos, tmp_path, name):
    content = videos[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(DataError, match="damaged|no video"):
        read_frame(path, 0)


def test_files_that_are_no_video(videos, tmp_path):
    (tmp_path / "text.mp4").write_text("hello" * 100)
    (tmp_path / "empty.mp4").touch()
    shutil.copy(videos["closed.mp4"], tmp_path / "other.mp4")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    assert len(in_order(tmp_path / "list.mp4")) == FRAMES  # one that is not asked for a video of its own
    for name in ("text", "empty", "list"):
        with pytest.raises(DataError, match="^the video cannot be decoded .*; it is damaged, or no video$"):
            read_frame(tmp_path / f"{name}.mp4", 0)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="^the file has no video in it$"):
        read_frame(tmp_path / "sound.mp4", 0)
    with pytest.raises(OSError, match="No such file"):
        read_frame(tmp_path / "absent.mp4", 0)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(KdError, match=r"^a\.mp4: a video file is read through PyAV, which is not installed \(.*\);"):
        refuse_without_library(Path("a.mp4"))
