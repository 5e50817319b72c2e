"""Sound to what a student of recordings takes, as graphs of their own: the log-mel front end for a phone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_dist.inputs.spectrograms import LogMel


def write(
    folder: Path, front_end: LogMel, frames: int, formats: Sequence[str] = ("torchscript", "onnx", "executorch")
) -> dict[str, Any]:
    """Write the front end of a student whose views have `frames` frames to `folder`, and return what
    `info["front_end"]` says of it.

    `front_end.<onnx, pte, torchscript>`: waveform (B, samples) float32, full scale 1, to spectrogram
    (B, 1, mels, frames) float32. `golden/front_end.wav` and `golden/front_end.u8`: a sound, and its levels.
    """
    raise NotImplementedError
