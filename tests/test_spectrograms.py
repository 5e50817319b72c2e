"""The front end: its golden signal, a second and a third implementation of it, its errors; and the member it makes."""

import hashlib
import io
import os
import pickle

import librosa
import numpy as np
import pytest
import soundfile
import soxr
import torch
from recordings import KINDS, encoded, tones

from kd_dist.errors import DataError, RecipeError
from kd_dist.inputs.spectrograms import LogMel, Spectrograms, filters, golden, log_mel, npy_header

SMALL = LogMel(sample_rate=8000, n_fft=256, hop=100, mels=24, fmin=50.0, fmax=3500.0, db=(-40.0, 30.0))
WAVEFORM = "76004f0ccc6edc47ed1091f85a7bf7410ce198a32bf920964ad07ca3d2599d73"  # as 16-bit numbers
MEL = "952c33fc5936beee22161cc022fc91e944cb2b0bdf9bc095159bef078dc7c981"
FRONT_ENDS = [LogMel(), SMALL, LogMel(sample_rate=16_000, n_fft=400, hop=400, mels=40, fmin=0.0)]


def written(parameters: LogMel, waveform: np.ndarray) -> np.ndarray:
    """The steps, not rounded, (mels, frames) float64, by the recipe of shards/FORMAT.md and NumPy alone."""
    rate, n_fft, hop, mels = parameters.sample_rate, parameters.n_fft, parameters.hop, parameters.mels
    top = rate / 2 if parameters.fmax is None else parameters.fmax
    zeros = np.zeros(n_fft // 2)
    padded = np.concatenate([zeros, waveform.astype(np.float64), zeros])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    frames = [padded[t * hop : t * hop + n_fft] * window for t in range(len(waveform) // hop + 1)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    frequency = np.arange(n_fft // 2 + 1) * rate / n_fft

    def to_mel(hertz):
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)

    points = np.linspace(to_mel(parameters.fmin), to_mel(top), mels + 2)
    edge = np.where(points < 15, points * 200 / 3, 1000 * np.exp((points - 15) * np.log(6.4) / 27))
    bands = np.empty((mels, len(power)))
    for m in range(mels):
        low, peak, high = edge[m : m + 3]
        rise, fall = (frequency - low) / (peak - low), (high - frequency) / (high - peak)
        bands[m] = power @ (2 / (high - low) * np.maximum(0, np.minimum(rise, fall)))
    bottom, ceiling = parameters.db
    with np.errstate(divide="ignore"):
        decibels = np.clip(10 * np.log10(bands), bottom, ceiling)
    return (decibels - bottom) * 255 / (ceiling - bottom)


# ------------------------------------------------------------------------------------------------ golden signal


def test_the_golden_signal_is_what_it_was():
    """Literal digests. In float64 no value lies within 1e-6 steps of where rounding turns, so none depends on the
    rounding of a processor or a library."""
    found = golden(LogMel())
    waveform, mel = found["waveform"], found["mel"]
    assert (waveform.shape, mel.shape, mel.dtype) == ((99_225,), (128, 194), np.uint8)
    whole = waveform * 32768
    assert waveform.dtype == np.float32 and np.array_equal(whole, np.rint(whole)) and np.abs(whole).max() == 32767
    assert hashlib.sha256(whole.astype("<i2").tobytes()).hexdigest() == WAVEFORM
    exact = written(LogMel(), waveform)
    assert np.abs(exact % 1 - 0.5).min() > 1e-6
    assert hashlib.sha256(mel.tobytes()).hexdigest() == MEL
    assert (mel == 0).mean() > 0.02 and (mel == 255).sum() >= 10  # silence, and a full sine beyond the range
    assert len(np.unique(mel)) > 200


@pytest.mark.parametrize("parameters", FRONT_ENDS)
def test_the_recipe_of_the_format_makes_the_same(parameters):
    found = golden(parameters)
    exact = written(parameters, found["waveform"])
    assert np.array_equal(np.rint(exact), found["mel"])
    assert np.array_equal(found["filters"], filters(parameters).astype(np.float32))


@pytest.mark.parametrize("parameters", FRONT_ENDS)
def test_torch_makes_the_same(parameters):
    """In float64 every byte, in float32 to one step in fewer than 1 of 1,000 places."""
    found = golden(parameters)
    waveform = torch.from_numpy(found["waveform"])
    assert np.array_equal(log_mel(waveform.double(), parameters).numpy(), found["mel"])
    single = log_mel(waveform, parameters)
    off = np.abs(single.numpy().astype(int) - found["mel"])
    assert single.dtype == torch.uint8 and off.max() <= 1 and (off > 0).mean() < 1e-3
    batch = log_mel(torch.stack([waveform, waveform.flip(0)]), parameters)
    assert batch.shape == (2, *found["mel"].shape) and torch.equal(batch[0], single)


def test_librosas_own_function_makes_the_same():
    """`melspectrogram` computes in float32."""
    waveform = golden(LogMel())["waveform"]
    power = librosa.feature.melspectrogram(
        y=waveform, sr=22050, n_fft=2048, hop_length=512, n_mels=128, fmin=20.0, center=True, pad_mode="constant"
    )
    off = np.abs(LogMel().quantise(power.astype(np.float64)).astype(int) - LogMel().spectrogram(waveform))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3


def test_torch_can_be_exported():
    class App(torch.nn.Module):
        def forward(self, waveform):
            return log_mel(waveform, SMALL)

    waveform = torch.from_numpy(golden(SMALL)["waveform"])
    exported = torch.export.export(App(), (waveform,)).module()
    assert torch.equal(exported(waveform.flip(0)), log_mel(waveform.flip(0), SMALL))


def test_a_long_recording_is_computed_in_pieces_that_do_not_show():
    waveform = np.tile(golden(SMALL)["waveform"], 7)
    steps = SMALL.spectrogram(waveform)
    assert steps.shape[1] > 2048 and np.array_equal(np.rint(written(SMALL, waveform)), steps)


@pytest.mark.parametrize("samples", [1, 99, 100, 101, 255, 256])
def test_few_samples(samples):
    waveform = tones(1, 8000)[:samples]
    steps = SMALL.spectrogram(waveform)
    assert steps.shape == (24, SMALL.frames(samples)) == (24, 1 + samples // 100)
    assert np.array_equal(log_mel(torch.from_numpy(waveform).double(), SMALL).numpy(), steps)


def test_the_error_of_a_byte_is_half_a_step():
    power = 10 ** np.linspace(-7, 5, 100_000)
    for parameters in (LogMel(), SMALL):
        low, high = parameters.db
        decibels = np.clip(10 * np.log10(power), low, high)
        error = np.abs(parameters.decibels(parameters.quantise(power)) - decibels)
        assert 0.99 * (high - low) / 510 < error.max() <= (high - low) / 510 * 1.0001
    assert LogMel().quantise(np.array([0.0, 1e-6, 1e4, 1e30])).tolist() == [0, 0, 255, 255]
    assert LogMel().decibels(np.array([0, 255], np.uint8)).tolist() == [-60.0, 40.0]


def test_loudness_is_kept():
    """Nothing is relative to a clip: 20 dB less are 51 of 255 steps of 100 dB less."""
    wave = tones(2, 22050)
    loud, quiet = LogMel().spectrogram(wave), LogMel().spectrogram(wave * np.float32(0.1))
    heard = quiet > 0
    assert heard.mean() > 0.1
    assert np.abs(loud[heard].astype(int) - quiet[heard] - 51).max() <= 1


def test_the_range_holds_full_scale_and_ends_above_dither():
    time = np.arange(22050) / 22050
    peak = max(
        (10 * np.log10((filters(LogMel()) @ np.abs(librosa.stft(np.sin(2 * np.pi * f * time))) ** 2).max()))
        for f in (30, 60, 98.5, 200, 440, 1000, 5000)
    )
    assert 40 < peak < 41.3
    noise = np.random.default_rng(0)
    assert LogMel().spectrogram(noise.uniform(-1, 1, 22050).astype(np.float32)).max() < 255
    dither = (noise.integers(-1, 2, 22050) / 32768).astype(np.float32)
    assert not LogMel().spectrogram(dither).any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sample_rate": 0}, "audio.sample_rate: 0 is not possible; it must be between 1,000 and 384,000 Hz"),
        ({"n_fft": 1023}, "audio.n_fft: 1023 is not possible; it must be an even number between 16 and 65,536"),
        ({"n_fft": 8}, "audio.n_fft: 8 is not"),
        ({"hop": 0}, "audio.hop: 0 is not possible; it must be between 1 and n_fft, 2048"),
        ({"hop": 2049}, "audio.hop: 2049"),
        ({"mels": 0}, "audio.mels: 0 is not possible; it must be between 1 and half of n_fft, 1024"),
        ({"mels": 1025}, "audio.mels: 1025"),
        ({"fmax": 11_026.0}, "audio.fmax: 11026.0 is not possible; it must be above 0 and at most 11025 Hz"),
        ({"fmin": 300.0, "fmax": 300.0}, "audio.fmin: 300.0 is not possible; it must be at least 0 and below fmax, 3"),
        ({"fmin": -1.0}, "audio.fmin: -1.0"),
        ({"fmin": float("nan")}, "audio.fmin: nan"),
        ({"db": (40.0, -60.0)}, r"audio.db: \(40.0, -60.0\) is not possible; it must be two numbers, the lower"),
        ({"db": (0.0, float("inf"))}, r"audio.db: \(0.0, inf\)"),
    ],
)
def test_values_that_no_front_end_has(change, sentence):
    with pytest.raises(RecipeError, match=f"^{sentence}"):
        LogMel(**change)


@pytest.mark.filterwarnings("ignore:Empty filters")
def test_bands_between_two_frequencies():
    with pytest.raises(RecipeError, match="^audio.mels: [0-9]+ of the 128 mel bands hold no frequency of a"):
        golden(LogMel(n_fft=256, hop=128))


# ------------------------------------------------------------------------------------------------ members

INPUT = Spectrograms(SMALL)


def test_a_spectrogram_is_a_value():
    assert (INPUT.kind, INPUT.channels, INPUT.shortest) == ("spectrogram", 1, 1.0)
    assert pickle.loads(pickle.dumps(INPUT)) == Spectrograms(SMALL) != Spectrograms(LogMel())
    for shortest in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="^audio.shortest: .* is not possible; it must be above 0 s$"):
            Spectrograms(SMALL, shortest)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_recording_becomes_a_member_and_a_picture(kind):
    wave = tones(2.5, 8000)
    members = INPUT.encode(encoded(wave, 8000, kind), kind)
    assert list(members) == ["mel.npy"] and len(members["mel.npy"]) == 128 + 24 * 201
    picture = INPUT.decode(members)
    assert (picture.shape, picture.dtype) == ((24, 201, 1), np.uint8)
    off = np.abs(picture[:, 5:-5, 0].astype(int) - SMALL.spectrogram(wave)[:, 5:-5])
    assert off.max() <= 1 if kind in ("wav", "flac") else np.median(off) < 25
    assert INPUT.encode(encoded(wave, 8000, kind), kind) == members


@pytest.mark.slow
def test_the_golden_signal_as_a_file():
    """16 bits hold it exactly, so an app may start from a recording."""
    found = golden(LogMel())
    picture = Spectrograms(LogMel()).decode(Spectrograms(LogMel()).encode(encoded(found["waveform"], 22050), "wav"))
    assert np.array_equal(picture[..., 0], found["mel"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flac", "mp3"])
def test_a_recording_by_the_recipe_of_the_format(kind):
    """All of the format's five steps, on a part of a stereo recording at another rate."""
    left, right = tones(6, 44_100, 330.0), tones(6, 44_100, 1470.0)
    payload = encoded(np.stack([left, 0.3 * right], axis=1), 44_100, kind)
    decoded, rate = soundfile.read(io.BytesIO(payload), dtype="float64")
    assert rate == 44_100 and decoded.shape[1] == 2
    waveform = soxr.resample(decoded.mean(axis=1)[66_150:198_450], rate, 22_050, quality="HQ")
    packed = Spectrograms(LogMel()).encode(payload, kind, (1.5, 4.5))["mel.npy"]
    off = np.abs(np.rint(written(LogMel(), waveform)) - np.frombuffer(packed, np.uint8, offset=128).reshape(128, -1))
    assert off.shape == (128, 130) and off.max() <= 1 and (off > 0).mean() < 1e-3


@pytest.mark.slow
def test_a_part_of_a_recording():
    whole = encoded(tones(5, 8000), 8000)
    part = INPUT.encode(whole, "wav", (1.25, 3.0))
    assert part == INPUT.encode(encoded(tones(5, 8000)[10_000:24_000], 8000), "wav")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wave", "span", "reason"),
    [
        (tones(0.5, 8000), None, r"the recording has 0\.50 s, less than the 1 s that it must have"),
        (tones(2, 8000), (1.5, 9.0), r"the recording has 0\.50 s, less than the 1 s that it must have"),
        (np.zeros(0), None, "the recording is empty: it has no samples"),
        (np.zeros(16_000), None, "the recording is silent: nothing in it is above -40 dB"),
        (tones(2, 8000) * 1e-4, None, "the recording is silent: nothing in it is above -40 dB"),
        (np.full(16_000, 0.1), None, "the recording is silent: nothing in it is above -40 dB"),
        (np.full(16_000, np.nan), None, "the recording is no sound: .*"),
        (tones(2, 8000) * 1e30, None, "the recording is no sound: .*"),
    ],
)
def test_recordings_that_are_none(wave, span, reason):
    with pytest.raises(DataError, match=f"^{reason}$"):
        INPUT.encode(encoded(wave, 8000, subtype="FLOAT"), "wav", span)


@pytest.mark.slow
def test_a_truncated_mp3():
    payload = encoded(tones(5, 8000), 8000, "mp3")
    for length in (0, 10, len(payload) // 20, len(payload) // 2):
        with pytest.raises(DataError, match=r"^the recording cannot be decoded \("):
            INPUT.encode(payload[:length], "mp3")


def member(steps: np.ndarray) -> dict[str, bytes]:
    return {"mel.npy": npy_header(*steps.shape) + steps.tobytes()}


STEPS = np.random.default_rng(0).integers(0, 256, (24, 301), np.uint8)


def test_a_member_is_what_numpy_writes_and_is_not_copied():
    assert np.array_equal(np.load(io.BytesIO(member(STEPS)["mel.npy"]), allow_pickle=False), STEPS)
    buffer = io.BytesIO()
    np.save(buffer, STEPS, allow_pickle=False)
    span = memoryview(buffer.getvalue() + b"more")[:-4]
    picture = INPUT.decode({"mel.npy": span, "json": b"{}"})
    assert np.array_equal(picture[..., 0], STEPS)
    assert np.shares_memory(picture, np.frombuffer(span, np.uint8)) and not picture.flags.writeable
    for shape in ((1, 1), (1024, 10**9), (65_536, 10**12)):
        assert len(npy_header(*shape)) == 128


class Trap:
    """Pickled, it makes the folder `trapped` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def hostile() -> dict[str, bytes]:
    objects, floats, other = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(objects, np.array([[Trap()]], object), allow_pickle=True)
    np.save(floats, STEPS.astype(np.float32))
    np.save(other, STEPS.T)
    whole = member(STEPS)["mel.npy"]
    return {
        "objects": objects.getvalue(),
        "pickle": pickle.dumps(Trap()),
        "floats": floats.getvalue(),
        "transposed": other.getvalue(),
        "huge": npy_header(24, 10**9) + bytes(24),
        "nested": whole[:10] + b"(" * 118 + whole[128:],
        "negative": whole[:10] + whole[10:128].replace(b"301", b"-31") + whole[128:],
        "bands": npy_header(12, 602) + STEPS.tobytes(),
        "no frames": npy_header(24, 0),
        "short": whole[:-1],
        "long": whole + b"\0",
        "head": whole[:100],
        "empty": b"",
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_members(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = hostile()[name]
    with pytest.raises(DataError, match=rf"^its mel\.npy member, {len(content)} bytes that begin b.*, is no spec"):
        INPUT.decode({"mel.npy": content})
    assert not list(tmp_path.iterdir())
    assert INPUT.decode(member(STEPS)).shape == (24, 301, 1)


def test_no_member():
    with pytest.raises(DataError, match=r"^expected a mel\.npy member, found json, png$"):
        INPUT.decode({"png": b"", "json": b""})
