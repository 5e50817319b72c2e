"""Small recordings for tests, encoded by soundfile."""

import io

import numpy as np
import soundfile

KINDS = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
}


def tones(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    """(n,) float32: a tone and a fainter one an octave above it, that swell and fade twice a second."""
    time = np.arange(round(seconds * rate)) / rate
    swell = 0.6 + 0.4 * np.sin(4 * np.pi * time)
    wave = 0.5 * np.sin(2 * np.pi * pitch * time) + 0.1 * np.sin(4 * np.pi * pitch * time)
    return (swell * wave).astype(np.float32)


def encoded(wave: np.ndarray, rate: int, kind: str = "wav", **options) -> bytes:
    """(n,) or (n, channels) -> the bytes of a file of `kind`."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, **{**KINDS[kind], **options})
    return buffer.getvalue()
