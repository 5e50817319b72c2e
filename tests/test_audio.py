"""Encoded recordings become waveforms; whatever is wrong with one is told, and costs nothing but that one."""

import contextlib
import io
import math
import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor

import librosa
import numpy as np
import pytest
import soundfile
from recordings import KINDS, encoded, tones

from kd_dist.errors import DataError, KdError
from kd_dist.inputs import decoder
from kd_dist.inputs.audio import AUDIO_EXTENSIONS, decode_audio

pytestmark = pytest.mark.slow  # each decodes in a process of its own

RATE = 24_000  # one that Opus has


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_decoded_to_what_soundfile_reads_at_once(kind):
    """Longer than a block, so that nothing is lost between blocks."""
    assert set(KINDS) == set(AUDIO_EXTENSIONS)
    wave = tones(14, RATE)
    payload = encoded(wave, RATE, kind)
    whole, rate = soundfile.read(io.BytesIO(payload), dtype="float32")
    assert rate == RATE and len(whole) > decoder.BLOCK
    found = decode_audio(payload, kind, RATE)
    assert found.dtype == np.float32 and found.shape == whole.shape
    assert found == pytest.approx(whole, abs=1e-6)
    assert np.corrcoef(found, wave[: len(found)])[0, 1] > 0.99


def test_a_wav_is_exact():
    wave = np.rint(tones(0.5, 8000) * 32767) / 32768
    assert np.array_equal(decode_audio(memoryview(encoded(wave, 8000)), "wav", 8000), wave.astype(np.float32))


def test_channels_become_their_mean():
    wave = np.stack([tones(1, RATE), np.zeros(RATE, np.float32), tones(1, RATE, 300)], axis=1)
    found = decode_audio(encoded(wave, RATE, subtype="FLOAT"), "wav", RATE)
    assert found == pytest.approx(wave.mean(axis=1), abs=1e-7)


def test_another_rate_is_resampled_by_soxr():
    wave = tones(1, 44_100)
    found = decode_audio(encoded(wave, 44_100, subtype="FLOAT"), "wav", 22_050)
    assert np.array_equal(found, librosa.resample(wave, orig_sr=44_100, target_sr=22_050, res_type="soxr_hq"))
    assert found[1000:-1000] == pytest.approx(tones(1, 22_050)[1000:-1000], abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_span_is_that_part(kind):
    payload = encoded(tones(14, RATE), RATE, kind)
    whole = decode_audio(payload, kind, RATE)
    for start, end in ((0.0, 1.0), (0.5, 2.25), (10.5, 12.0)):  # the last begins behind the first block
        part = decode_audio(payload, kind, RATE, (start, end))
        assert part == pytest.approx(whole[round(start * RATE) : round(end * RATE)], abs=1e-6)
        assert len(part) == round((end - start) * RATE)


def test_a_span_beyond_the_end_is_cut_or_told():
    payload = encoded(tones(2, RATE), RATE)
    assert len(decode_audio(payload, "wav", RATE, (1, 11))) == RATE
    with pytest.raises(DataError, match=r"^the recording ends at 2\.00 s, before the span 2 to 11 s begins$"):
        decode_audio(payload, "wav", RATE, (2, 11))
    for span in ((-1.0, 1.0), (1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(DataError, match=r"^the span .* s is no part of a recording$"):
            decode_audio(payload, "wav", RATE, span)


# ------------------------------------------------------------------------------------------------ what is no recording

WAV, FLAC, OGG, MP3 = (encoded(tones(2, RATE), RATE, kind) for kind in ("wav", "flac", "ogg", "mp3"))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "Format not recognised"),
        (b"hello" * 1000, "Format not recognised"),
        (b"RIFF\xff\xff\xff\xffWAVE", ".+"),
        (FLAC[: len(FLAC) // 2], ".*flac.*"),
        (OGG[:100], ".+"),
        (MP3[:3], ".+"),
    ],
    ids=["nothing", "text", "riff", "flac", "ogg", "mp3"],  # an ogg file's serial number is another each time
)
def test_what_is_broken_gets_the_same_words_every_time(payload, reason):
    """The words are part of a manifest, whose bytes are promised."""
    told = []
    for _ in range(2):
        with pytest.raises(DataError, match=rf"^the recording cannot be decoded \({reason}\)$") as raised:
            decode_audio(payload, "wav", RATE)
        told.append(str(raised.value))
    assert told[0] == told[1] and "0x" not in told[0]


def test_a_truncated_wav():
    for length in (len(WAV) // 4, len(WAV) * 9 // 10):
        said = rf"\(it ends at {length / len(WAV) * 2:.1f}\d s and says that it has 2\.00 s\)$"
        with pytest.raises(DataError, match=said):
            decode_audio(WAV[:length], "wav", RATE)
    assert len(decode_audio(WAV[: len(WAV) // 2], "wav", RATE, (0.0, 0.9))) == round(0.9 * RATE)  # it has that part
    at = WAV.index(b"data") + 4
    streamed = WAV[:at] + b"\xff" * 4 + WAV[at + 4 :]  # by a program that could not know its length
    assert np.array_equal(decode_audio(streamed, "wav", RATE), decode_audio(WAV, "wav", RATE))


def test_a_flac_that_does_not_say_how_long_it_is():
    at = 8 + 13  # of STREAMINFO: 36 bits of samples
    streamed = FLAC[:at] + bytes([FLAC[at] & 0xF0]) + bytes(4) + FLAC[at + 5 :]
    assert streamed != FLAC
    assert np.array_equal(decode_audio(streamed, "flac", RATE), decode_audio(FLAC, "flac", RATE))


def test_a_truncated_mp3():
    """Where its first frame says how long it is; else it is a shorter recording."""
    with pytest.raises(DataError, match=r"\(it ends at 0\.[89]\d s and says that it has 2\.00 s\)$"):
        decode_audio(MP3[: len(MP3) // 2], "mp3", RATE)
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, 2 * RATE)
    bare = encoded(noise, RATE, "mp3", bitrate_mode="CONSTANT", compression_level=0.5)
    bare = bare[bare.find(bare[:2], bare.find(b"Info")) :]
    whole, part = (decode_audio(one, "mp3", RATE) for one in (bare, bare[: len(bare) // 2]))
    assert 2 * RATE <= len(whole) < 2.2 * RATE and 0.3 * len(whole) < len(part) < 0.6 * len(whole)
    assert len(decode_audio(MP3[: len(MP3) // 2], "mp3", RATE, (0.1, 0.6))) == RATE // 2  # what it has, it has


def test_garbage_ends_nothing():
    """Bytes at random places, overwritten: whatever becomes of the recording, it is a waveform or a DataError."""
    random = np.random.default_rng(0)
    ends = {"decoded": 0, "refused": 0}
    for payload, kind in ((WAV, "wav"), (FLAC, "flac"), (OGG, "ogg"), (MP3, "mp3")):
        for _ in range(6):
            broken = np.frombuffer(payload, np.uint8).copy()
            places = random.integers(0, len(broken), 20)
            broken[places] = random.integers(0, 256, 20)
            try:
                assert decode_audio(broken.tobytes(), kind, RATE).dtype == np.float32
                ends["decoded"] += 1
            except DataError:
                ends["refused"] += 1
    assert sum(ends.values()) == 24 and min(ends.values()) >= 1


def test_an_extension_that_is_none():
    with pytest.raises(DataError, match="^the extension 'aac' is none of wav, flac, ogg, opus, mp3$"):
        decode_audio(WAV, "aac", RATE)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_no_samples(kind):
    with pytest.raises(DataError, match="^the recording (is empty: it has no samples|cannot be decoded .*)$"):
        decode_audio(encoded(np.zeros(0, np.float32), RATE, kind), kind, RATE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 32767.0])
def test_no_sound(value):
    wave = tones(1, RATE)
    wave[1234] = value
    with pytest.raises(DataError, match="^the recording is no sound: it has NaN, infinity, or more than 1000 times"):
        decode_audio(encoded(wave, RATE, subtype="FLOAT"), "wav", RATE)


def test_a_small_file_that_holds_hours():
    payload = encoded(np.zeros(decoder.LONGEST * 1000 + 1000, np.int16), 1000, "flac")
    assert len(payload) < 100_000
    with pytest.raises(DataError, match="no more than 3600 s are decoded, and it is longer; cut it"):
        decode_audio(payload, "flac", 1000)
    assert len(decode_audio(payload, "flac", 1000, (3599, 3600))) == 1000


@pytest.mark.parametrize(("channels", "seconds", "held"), [(1, 6, True), (1, 7, False), (3, 2, True), (3, 3, False)])
def test_many_channels_are_fewer_seconds(monkeypatch, channels, seconds, held):
    monkeypatch.setattr(decoder, "MOST", 6 * 8000)
    out = io.BytesIO()
    decoder.decode(encoded(np.zeros((seconds * 8000, channels)), 8000), 0.0, math.inf, out)
    assert (b'{"end": ' in out.getvalue(), b"no more than" in out.getvalue()) == (held, not held)


def test_a_header_that_says_hours():
    payload = bytearray(FLAC)
    payload[21] |= 0x0F
    payload[22:26] = b"\xff" * 4  # 2**36 - 1 samples
    assert soundfile.info(io.BytesIO(payload)).frames == 2**36 - 1
    with pytest.raises(DataError, match=r"\(it ends at 2\.00 s and says that it has 2863311\.53 s\)$"):
        decode_audio(bytes(payload), "flac", RATE)


def test_a_rate_that_no_music_has():
    payload = bytearray(WAV)
    payload[24:28] = (2**31 - 1).to_bytes(4, "little")
    with pytest.raises(DataError, match=r"\(it claims 1 channels at 2147483647 Hz\)$"):
        decode_audio(bytes(payload), "wav", RATE)


def test_an_mp3_of_which_libsndfile_would_lose_most():
    """A bit rate that varies, no header that says so, quiet at first: the length is guessed far too short."""
    quiet, loud = 1e-3 * tones(10, RATE), np.random.default_rng(0).uniform(-0.9, 0.9, 10 * RATE)
    payload = encoded(np.concatenate([quiet, loud]), RATE, "mp3", bitrate_mode="VARIABLE", compression_level=0.5)
    assert len(decode_audio(payload, "mp3", RATE)) == 20 * RATE
    stripped = payload[payload.find(payload[:2], payload.find(b"Xing")) :]
    assert len(soundfile.read(io.BytesIO(stripped))[0]) < 12 * RATE
    with pytest.raises(DataError, match=r"\(only [\d,]+ of its [\d,]+ bytes are read; encode it again\)$"):
        decode_audio(stripped, "mp3", RATE)


# ------------------------------------------------------------------------------------------------ a decoder that dies


def library(folder, monkeypatch, text: str) -> None:
    """Put a `soundfile` of `text` before the real one, for processes that start from now on."""
    (folder / "soundfile.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGFPE", "SIGXCPU"])
def test_a_recording_on_which_the_library_dies(tmp_path, monkeypatch, name):
    library(tmp_path, monkeypatch, f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    with pytest.raises(DataError, match=rf"^the recording cannot be decoded \(the decoder died of {name}\)$"):
        decode_audio(WAV * 50, "wav", RATE)


def test_a_recording_that_asks_for_all_memory(tmp_path, monkeypatch):
    text = "class LibsndfileError(Exception): pass\nclass SoundFile:\n    def __init__(self, file): bytearray(2**34)\n"
    library(tmp_path, monkeypatch, text)
    with pytest.raises(DataError, match=r"^the recording cannot be decoded \(it asks for too much memory\)$"):
        decode_audio(WAV, "wav", RATE)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", r"ended with SIGKILL \(\)"),
        ("raise ImportError('no libsndfile')\n", r"ended with status 1 \(ImportError: no libsndfile\)"),
    ],
)
def test_what_is_not_the_recordings_fault_is_none_of_its_errors(tmp_path, monkeypatch, text, told):
    library(tmp_path, monkeypatch, text)
    with pytest.raises(KdError, match=rf"decoder\.py: the decoder of recordings {told}; see to it that .*") as raised:
        decode_audio(WAV, "wav", RATE)
    assert not isinstance(raised.value, DataError)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_signals_that_stop_a_command_do_not_look_like_a_broken_recording(tmp_path, monkeypatch, name):
    """Slurm and a terminal send them to every process."""
    there = tmp_path / "sent"
    library(
        tmp_path,
        monkeypatch,
        f"import os, signal, sys\nos.kill(os.getpid(), signal.{name})\nopen({str(there)!r}, 'w').close()\n"
        f"sys.path.remove({str(tmp_path)!r})\ndel sys.modules['soundfile']\nimport soundfile\n",
    )
    assert len(decode_audio(WAV, "wav", RATE)) == 2 * RATE
    assert there.exists()
    assert getattr(signal, name) not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_threads_decode_side_by_side():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda payload: decode_audio(payload, "wav", RATE), [WAV, FLAC, OGG, MP3] * 2))
    for one in range(4):
        assert len(found[one]) == 2 * RATE and np.array_equal(found[one], found[one + 4])


def test_a_machine_that_is_short_of_files_is_no_recordings_fault():
    limits, spare = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(spare)  # the lowest number that is free
    for more in range(4):  # the file of complaints, then each pipe
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + more, limits[1]))
        try:
            with pytest.raises(KdError, match=r"cannot be started \(\[Errno 24\] Too many open files") as raised:
                decode_audio(WAV, "wav", RATE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert not isinstance(raised.value, DataError)


def test_nothing_stays_behind(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    for payload in (WAV, b"hello"):
        for _ in range(3):
            try:
                decode_audio(payload, "wav", RATE)
            except DataError:
                assert payload == b"hello"
    assert len(os.listdir("/proc/self/fd")) == len(before)
    with contextlib.suppress(ChildProcessError):  # there is none at all
        assert os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None  # one that ended, and nobody looked
