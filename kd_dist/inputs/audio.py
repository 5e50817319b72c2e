"""Encoded recordings -> waveforms of one channel at one rate."""

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kd_dist.errors import DataError, KdError

AUDIO_EXTENSIONS = ("wav", "flac", "ogg", "opus", "mp3")
LOUDEST = 1000.0  # where full scale is 1: a recording beyond it is no sound, or not scaled
DECODER = Path(__file__).with_name("decoder.py")
STOPPING = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # a command's own to answer
FAULTS = ("ABRT", "BUS", "FPE", "ILL", "SEGV", "SYS", "TRAP", "XCPU")  # what a recording can do to its decoder


def decode_audio(
    payload: bytes | memoryview, extension: str, rate: int, span: tuple[float, float] | None = None
) -> np.ndarray:
    """Encoded recording -> (n,) float32 at `rate` Hz, full scale 1: the mean of its channels, resampled by soxr.

    `span` (start, end) in seconds takes that part; what of it lies behind the recording's end is not there. Raises
    DataError with the reason for what is broken, empty, no sound, or more than an hour from its start to the end of the
    part. An ogg or mp3 without its length in a header that was cut off is a shorter recording. Raises KdError when
    decoding fails for a reason outside the recording.
    """
    if extension not in AUDIO_EXTENSIONS:
        raise DataError(f"the extension '{extension}' is none of {', '.join(AUDIO_EXTENSIONS)}")
    start, end = (0.0, math.inf) if span is None else span
    if not 0 <= start < end:
        raise DataError(f"the span {start} to {end} s is no part of a recording")
    samples, own_rate, length = _decoded(payload, start, end)
    if not length:
        raise DataError("the recording is empty: it has no samples")
    if not len(samples):
        raise DataError(f"the recording ends at {length:.2f} s, before the span {start} to {end} s begins")
    if not np.abs(samples).max() <= LOUDEST:  # a NaN compares False
        raise DataError(f"the recording is no sound: it has NaN, infinity, or more than {LOUDEST:.0f} times full scale")
    if own_rate == rate:
        return samples
    import librosa

    return librosa.resample(samples, orig_sr=own_rate, target_sr=rate)


def _decoded(payload: bytes | memoryview, start: float, end: float) -> tuple[np.ndarray, int, float]:
    """The samples (n,) of a part, their rate in Hz, and how far in seconds the recording was decoded."""
    command = [sys.executable, "-P", str(DECODER), repr(float(start)), repr(float(end))]
    with _started(command) as (child, complaints):
        with contextlib.suppress(BrokenPipeError), child.stdin as stdin:  # if it died, its status says of what
            stdin.write(payload)
        found = _answers(child.stdout)
        child.wait()
        if child.returncode == 0 and found is not None:
            return found
        name = signal.Signals(-child.returncode).name if child.returncode < 0 else ""
        if name.removeprefix("SIG") in FAULTS:
            raise DataError(f"the recording cannot be decoded (the decoder died of {name})")
        complaints.seek(0)
        last = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
    raise KdError(
        f"{DECODER}: the decoder of recordings ended with {name or f'status {child.returncode}'} ({last}); see to it "
        f"that {sys.executable} can import soundfile and has memory, and run the same command again"
    )


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[tuple[subprocess.Popen, BinaryIO]]:
    """The decoder and what it complains of, with the signals blocked that stop a command: it must not look as if a
    recording had failed."""
    with contextlib.ExitStack() as stack:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # a process inherits what its thread blocks
        try:
            complaints = stack.enter_context(tempfile.TemporaryFile())
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints)
        except OSError as error:  # the machine is short of something, and no recording is to blame
            raise KdError(
                f"{DECODER}: the decoder of recordings cannot be started ({error}); free what is short, and run the "
                f"same command again"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield stack.enter_context(child), complaints


def _answers(stream: BinaryIO) -> tuple[np.ndarray, int, float] | None:
    """What the decoder says, as `_decoded` returns it; None when it breaks off."""
    rate, channels, blocks = 0, 1, []
    for line in stream:
        match json.loads(line):
            case {"rate": rate, "channels": channels}:
                pass
            case {"bytes": size}:
                content = stream.read(size)
                if len(content) < size:
                    return None
                block = np.frombuffer(content, np.float32).reshape(-1, channels)
                blocks.append(block[:, 0] if channels == 1 else block.mean(axis=1))
            case {"end": length}:
                return np.concatenate([np.zeros(0, np.float32), *blocks]), rate, length
            case {"error": reason}:
                raise DataError(f"the recording cannot be decoded ({reason})")
    return None
