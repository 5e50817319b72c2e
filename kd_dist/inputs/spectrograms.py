"""Recordings as log-mel spectrograms: pictures of one channel, in decibels on a fixed scale, quantised to a byte.

Everything that makes the numbers is in `LogMel`, so that a phone can make the same ones; `shards/FORMAT.md` has it as a
recipe and `golden` a signal to try it on.
"""

import functools
import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kd_dist import plan
from kd_dist.errors import DataError, RecipeError
from kd_dist.inputs.audio import decode_audio

MEMBER = "mel.npy"
STEPS = 255  # from the low end of the range to the high one
FRAMES_AT_ONCE = 2048  # so that an hour takes no more memory than a minute
MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True)
class LogMel:
    """The front end: a waveform at `sample_rate` Hz -> (mels, frames) uint8.

    1. `n_fft / 2` zeros before and behind (librosa's `center=True, pad_mode="constant"`); frame t is the `n_fft`
       samples from `t * hop` on, 1 + n // hop frames of n samples.
    2. Times the periodic Hann window of `n_fft` samples; the squared magnitudes of its Fourier transform, not scaled.
    3. The `mels` triangles of Slaney's mel scale between `fmin` and `fmax` Hz (null: half the rate), each of area 1
       over Hz (`norm="slaney"`).
    4. dB = 10 log10 of that: the reference is 1, never a clip's own maximum, so loudness is kept.
    5. Held to `db` (low, high); q = round((dB - low) * 255 / (high - low)), halves to even.

    So dB = low + q (high - low) / 255 within half a step, (high - low) / 510 dB, inside the range. The default range
    ends at 40: a full-scale sine reaches 41.2 dB at most, a full-scale square wave 43.1, full-scale white noise 21. It
    begins at -60, just above the dither of 16-bit audio, at most -65.

    Computed in float64, so that a byte does not depend on a processor's rounding. Raises RecipeError for values that no
    front end can have.
    """

    sample_rate: int = 22050  # Hz
    n_fft: int = 2048  # samples, even
    hop: int = 512  # samples
    mels: int = 128
    fmin: float = 20.0  # Hz
    fmax: float | None = None  # Hz
    db: tuple[float, float] = (-60.0, 40.0)

    def __post_init__(self) -> None:
        low, high = self.db
        for name, held, wanted in (
            ("sample_rate", 1000 <= self.sample_rate <= 384_000, "between 1,000 and 384,000 Hz"),
            ("n_fft", 16 <= self.n_fft <= 2**16 and self.n_fft % 2 == 0, "an even number between 16 and 65,536"),
            ("hop", 1 <= self.hop <= self.n_fft, f"between 1 and n_fft, {self.n_fft}"),
            ("mels", 1 <= self.mels <= self.n_fft // 2, f"between 1 and half of n_fft, {self.n_fft // 2}"),
            ("fmax", 0 < self.highest <= self.sample_rate / 2, f"above 0 and at most {self.sample_rate / 2:g} Hz"),
            ("fmin", 0 <= self.fmin < self.highest, f"at least 0 and below fmax, {self.highest:g} Hz"),
            ("db", -300 <= low < high <= 300, "two numbers, the lower one first, between -300 and 300"),
        ):
            if not held:
                raise RecipeError(f"audio.{name}: {getattr(self, name)} is not possible; it must be {wanted}")

    @property
    def highest(self) -> float:
        """The upper end of the mel scale in Hz."""
        return self.sample_rate / 2 if self.fmax is None else self.fmax

    def frames(self, samples: int) -> int:
        """How many frames a waveform of so many samples has."""
        return 1 + samples // self.hop

    def spectrogram(self, waveform: np.ndarray) -> np.ndarray:
        """(n,) float32, finite -> (mels, frames) uint8."""
        import librosa

        padded = np.pad(waveform.astype(np.float64), self.n_fft // 2)
        steps = np.empty((self.mels, self.frames(len(waveform))), np.uint8)
        for first in range(0, steps.shape[1], FRAMES_AT_ONCE):
            last = min(first + FRAMES_AT_ONCE, steps.shape[1])
            piece = padded[first * self.hop : (last - 1) * self.hop + self.n_fft]
            spectrum = librosa.stft(piece, n_fft=self.n_fft, hop_length=self.hop, window="hann", center=False)
            steps[:, first:last] = self.quantise(filters(self) @ np.abs(spectrum) ** 2)
        return steps

    def heard(self, steps: np.ndarray) -> bool:
        """Whether a spectrogram (mels, frames) has sound in it. Frames that reach into the zeros around it are looked
        at only where there are no others: in them a constant is a step."""
        edge = -(-self.n_fft // 2 // self.hop)
        within = steps[:, edge:-edge]
        return bool((within if within.size else steps).any())

    def quantise(self, power: np.ndarray) -> np.ndarray:
        """Mel power of any shape -> steps of the range, uint8."""
        low, high = self.db
        decibels = 10 * np.log10(np.maximum(power, 10 ** (low / 10)))
        return np.rint((np.clip(decibels, low, high) - low) * (STEPS / (high - low))).astype(np.uint8)

    def decibels(self, steps: np.ndarray) -> np.ndarray:
        """Steps of the range, uint8 -> dB, float32."""
        low, high = self.db
        return (low + steps * ((high - low) / STEPS)).astype(np.float32)


@functools.lru_cache(maxsize=4)
def filters(parameters: LogMel) -> np.ndarray:
    """The triangles of the mel scale, (mels, 1 + n_fft / 2) float64.

    Raises RecipeError when one of them lies between two frequencies of the Fourier transform: it would always be 0.
    """
    import librosa

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Empty filters")  # an error, below
        bank = librosa.filters.mel(
            sr=parameters.sample_rate,
            n_fft=parameters.n_fft,
            n_mels=parameters.mels,
            fmin=parameters.fmin,
            fmax=parameters.highest,
            htk=False,
            norm="slaney",
            dtype=np.float64,
        )
    empty = int((bank.max(axis=1) == 0).sum())
    if empty:
        raise RecipeError(
            f"audio.mels: {empty} of the {parameters.mels} mel bands hold no frequency of a transform of "
            f"{parameters.n_fft} samples; take fewer mels or a larger n_fft"
        )
    bank.flags.writeable = False
    return bank


def log_mel(waveform: Tensor, parameters: LogMel) -> Tensor:
    """What `LogMel.spectrogram` computes, in torch and in the waveform's own precision, as an app does: (..., n) ->
    (..., mels, frames) uint8.

    In float32 it is at most one step off, in fewer than 1 in 1,000 places of music.
    """
    low, high = parameters.db
    window = torch.hann_window(parameters.n_fft, periodic=True, dtype=waveform.dtype, device=waveform.device)
    spectrum = torch.stft(
        waveform,
        parameters.n_fft,
        parameters.hop,
        window=window,
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    bank = torch.from_numpy(filters(parameters).copy()).to(waveform)
    power = bank @ (spectrum.real**2 + spectrum.imag**2)
    decibels = 10 * torch.log10(power.clamp(min=10 ** (low / 10)))
    return ((decibels.clamp(low, high) - low) * (STEPS / (high - low))).round().to(torch.uint8)


def golden(parameters: LogMel) -> dict[str, np.ndarray]:
    """A waveform and what becomes of it, for another implementation of the front end to be tried on.

    `waveform` (n,) float32, 4.5 s of multiples of 1/32768, so that a 16-bit file holds it exactly: three sines, a full
    sine, a sweep, clicks, silence, and noise that grows; everywhere but in the silence there is noise of at least
    -60 dB of full scale. `filters` (mels, 1 + n_fft / 2) float32, `mel` (mels, frames) uint8.
    """
    rate = parameters.sample_rate
    half = np.arange(rate // 2)
    second = np.arange(rate) / rate
    clicks = (half % (rate // 10) == rate // 20).astype(np.float64)
    parts = [
        sum(level * np.sin(2 * np.pi * rate / share * second) for level, share in ((0.4, 200), (0.2, 22), (0.01, 4.4))),
        np.sin(2 * np.pi * rate / 220 * half / rate),
        0.5 * np.sin(2 * np.pi * rate / 1000 * (450**second - 1) / math.log(450)),
        clicks,
        0 * half,
        np.zeros(rate),
    ]
    wave = np.concatenate(parts)
    noise = (plan.mix(0, np.arange(len(wave))) >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
    level = np.full(len(wave), 1e-3)
    level[-rate - len(half) : -rate] = 0
    level[-rate:] = 1e-3 * 1000**second
    whole = np.rint(np.clip(wave + level * noise, -1, 1) * 32767)
    waveform = (whole / 32768).astype(np.float32)
    bank = filters(parameters).astype(np.float32)
    return {"waveform": waveform, "filters": bank, "mel": parameters.spectrogram(waveform)}


@dataclass(frozen=True)
class Spectrograms:
    """Recordings, each stored as the log-mel spectrogram that `front_end` makes of it. A recording, or its part, of
    fewer than `shortest` seconds is refused."""

    front_end: LogMel
    shortest: float = 1.0  # s

    kind: ClassVar[str] = "spectrogram"
    channels: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("librosa", "soundfile", "soxr")  # that decide what is packed

    def __post_init__(self) -> None:
        if not 0 < self.shortest < math.inf:
            raise RecipeError(f"audio.shortest: {self.shortest} is not possible; it must be above 0 s")

    def encode(
        self, payload: bytes | memoryview, extension: str, span: tuple[float, float] | None = None
    ) -> dict[str, bytes]:
        """The member of a recording, or of its part `span` (start, end) in seconds.

        Raises DataError with the reason when the recording cannot be decoded, or is empty, silent or too short.
        """
        rate = self.front_end.sample_rate
        waveform = decode_audio(payload, extension, rate, span)
        if len(waveform) < self.shortest * rate:
            seconds = len(waveform) / rate
            raise DataError(f"the recording has {seconds:.2f} s, less than the {self.shortest:g} s that it must have")
        steps = self.front_end.spectrogram(waveform)
        if not self.front_end.heard(steps):
            raise DataError(f"the recording is silent: nothing in it is above {self.front_end.db[0]:g} dB")
        return self.members(steps)

    def members(self, steps: np.ndarray) -> dict[str, bytes]:
        """The member that holds a spectrogram (mels, frames) uint8."""
        return {MEMBER: npy_header(*steps.shape) + steps.tobytes()}

    def described(self) -> dict[str, Any]:
        """What a manifest says of how examples were made."""
        return {"kind": self.kind, **asdict(self.front_end), "db": list(self.front_end.db), "shortest": self.shortest}

    def decode(self, members: Mapping[str, bytes | memoryview]) -> np.ndarray:
        """The members of an example -> (mels, frames, 1) uint8, a view of the member. Raises DataError when there is no
        spectrogram of this front end."""
        if MEMBER not in members:
            raise DataError(f"expected a {MEMBER} member, found {', '.join(sorted(members))}")
        payload, mels = members[MEMBER], self.front_end.mels
        size = len(npy_header(mels, 1))
        frames = (len(payload) - size) // mels
        # Compared, not parsed: whatever else a header may say is never looked at.
        if frames < 1 or npy_header(mels, frames) != payload[:size] or len(payload) != size + mels * frames:
            raise DataError(
                f"its {MEMBER} member, {len(payload)} bytes that begin {bytes(payload[:80])!r}, is no spectrogram of "
                f"{mels} mels, as audio.mels says"
            )
        return np.frombuffer(payload, np.uint8, offset=size).reshape(mels, frames, 1)


def npy_header(mels: int, frames: int) -> bytes:
    """The header of an npy file, format 1.0, of a (mels, frames) uint8 array: 128 bytes."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({mels}, {frames}), }}"
    padded = text.encode().ljust(128 - len(MAGIC) - 2 - 1) + b"\n"
    return MAGIC + struct.pack("<H", len(padded)) + padded
