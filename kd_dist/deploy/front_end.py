"""Sound to what a student of recordings takes, as graphs of their own: the log-mel front end for a phone."""

import json
import math
import sys
import wave
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_dist.choose import imported
from kd_dist.disk import file_digest, published
from kd_dist.errors import ExportError
from kd_dist.formats import FORMATS, Graph, missing
from kd_dist.inputs.spectrograms import STEPS, LogMel, filters, golden

NAME = "front_end"  # of its files
WRITTEN = ("torchscript", "onnx", "executorch")  # one for each runtime of an app
OFF = 1e-3  # of all levels may be off, by one step: what shards/FORMAT.md asks of an implementation in float32
RULE = (
    "One channel (the mean of all) at sample_rate Hz, full scale 1; loudness is kept. A recording of n samples has "
    "T = 1 + n // hop frames. The graph takes `samples` samples from max(0, T - frames) // 2 * hop - n_fft / 2 on, "
    "zeros where the recording has none, and gives the middle `frames` frames. Where T is less than `frames`, set the "
    "columns from T on to 0: the first of them still hear the end of the recording."
)


class FrontEnd(nn.Module):
    """What `LogMel.spectrogram` makes of sound, in float32 and in operations that every runtime has: (B, samples), full
    scale 1, to (B, 1, mels, frames), levels / 255, as a student takes it.

    The Fourier transform is two products with matrices (Cooley and Tukey, 1965). With n_fft = inner * outer, sample
    outer i + j of a frame, and frequency a + inner b,

        X[a + inner b] = sum_j exp(-2 pi i (a + inner b) j / n_fft) sum_i exp(-2 pi i a i / inner) x[outer i + j]

    The inner sum is one product for all j, the outer one has a matrix for each a. Sound is real, so a from 0 to
    inner / 2 is enough: every frequency is there, or its mirror image n_fft - k of the same power. Matrices are
    computed in float64 and rounded once, and no sum is longer than inner or 2 outer numbers, so float32 is as exact as
    with an FFT. For 2,048 samples a dense transform takes 4.2 million multiplications and 17 MB of weights, this one
    0.27 million and 0.56 MB; the bands of the mel scale add 0.14 million and 0.54 MB.

    The weights of the bands carry the low end of the range, so level 0 is the logarithm of 1: 0 exactly.
    """

    def __init__(self, parameters: LogMel, frames: int) -> None:
        super().__init__()
        n_fft = parameters.n_fft
        low, high = parameters.db
        self.frames, self.hop, self.n_fft = frames, parameters.hop, n_fft
        self.hops = _hops(parameters)
        self.inner = _inner(n_fft)
        self.outer = n_fft // self.inner
        self.scale = STEPS / (high - low) * 10 / math.log(10)

        place, column = np.arange(self.inner), np.arange(self.inner // 2 + 1)
        later = np.arange(self.outer)
        frequency = column[:, None] + self.inner * later
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
        cos, sin = _turned(np.outer(column, place), self.inner)
        self._keep("window", window.reshape(self.inner, self.outer))
        self._keep("first", np.concatenate([cos, -sin]))
        cos, sin = _turned(later[:, None] * frequency[:, None], n_fft)
        self._keep("second", np.block([[cos, -sin], [sin, cos]]))  # of real and imaginary parts, by column

        mirrored = np.minimum(frequency, n_fft - frequency).ravel()
        once = np.zeros(len(mirrored))
        once[np.unique(mirrored, return_index=True)[1]] = 1  # a frequency and its mirror image may both be there
        self._keep("bands", filters(parameters)[:, mirrored] * once * 10 ** (-low / 10))

    def _keep(self, name: str, values: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(values).float())

    def forward(self, waveform: Tensor) -> Tensor:
        """(B, samples) -> (B, 1, mels, frames), both float32."""
        hops = waveform.reshape(-1, self.frames - 1 + self.hops, self.hop)
        pieces = [hops[:, first : first + self.frames] for first in range(self.hops)]
        heard = torch.cat(pieces, 2)[:, :, : self.n_fft].reshape(-1, self.inner, self.outer) * self.window
        inner = F.linear(heard.transpose(1, 2), self.first).reshape(-1, self.outer, 2, len(self.second))
        outer = inner.permute(3, 0, 2, 1).reshape(len(self.second), -1, 2 * self.outer) @ self.second
        squared = outer * outer
        power = (squared[:, :, : self.outer] + squared[:, :, self.outer :]).permute(1, 0, 2)
        bands = F.linear(power.reshape(-1, self.frames, self.bands.shape[1]), self.bands).transpose(1, 2)
        levels = torch.round(torch.log(bands.clamp(min=1)) * self.scale).clamp(max=STEPS)
        return (levels / STEPS).unsqueeze(1)


def samples(parameters: LogMel, frames: int) -> int:
    """How many samples the graph for views of so many frames takes: a whole number of hops."""
    return (frames - 1 + _hops(parameters)) * parameters.hop


def _hops(parameters: LogMel) -> int:
    """How many hops a frame reaches over."""
    return -(-parameters.n_fft // parameters.hop)


def _inner(n_fft: int) -> int:
    """The factor of n_fft with which a transform takes the fewest multiplications."""
    factors = (one for one in range(1, n_fft + 1) if n_fft % one == 0)
    return min(factors, key=lambda inner: (inner // 2 + 1) * (2 * n_fft + 4 * (n_fft // inner) ** 2))


def _turned(steps: np.ndarray, whole: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of so many steps, of which `whole` make a turn."""
    angles = 2 * np.pi * (steps % whole) / whole  # small ones: large ones have lost digits
    return np.cos(angles), np.sin(angles)


def write(folder: Path, front_end: LogMel, frames: int, formats: Sequence[str] = WRITTEN) -> dict[str, Any]:
    """Write the front end of a student whose views have `frames` frames to `folder`, and return what
    `info["front_end"]` says of it.

    `front_end.<torchscript, onnx, pte>` are the graph, each proven on the golden waveform against
    `LogMel.spectrogram`; `golden/front_end.wav` and `golden/front_end.u8` are that waveform and its levels. The dict
    has the parameters (`fmax` in Hz, never null), `frames`, the `samples` that the graph takes, in `rule` which ones,

        "files": {format: {"file", "bytes", "sha256", "max_difference" in levels, "off" of all levels}}
        "not_written": {format: why its library, or the graph in it, does not make these levels}
        "golden": [{"waveform", "levels": files, "samples": their number, "shape": [mels, frames of that waveform]}]
    """
    shown = golden(front_end)
    graph = _graph(front_end, frames)
    trial = _trial(front_end, frames, shown["waveform"])
    files, refused = {}, {}
    for name in formats:
        path = folder / f"{NAME}{Path(FORMATS[name].file).suffix}"
        try:
            files[name] = _written(path, name, graph, *trial)
        except ExportError as error:
            path.unlink(missing_ok=True)
            refused[name] = str(error).removeprefix(f"{path}: ")
            print(f"export {path.name}: not written: {refused[name]}", file=sys.stderr, flush=True)
    with published(folder / "golden" / f"{NAME}.wav") as file:
        _write_wav(file, shown["waveform"], front_end.sample_rate)
    with published(folder / "golden" / f"{NAME}.u8") as file:
        file.write(shown["mel"].tobytes())
    return {
        **_described(front_end, frames),
        "rule": RULE,
        "files": files,
        "not_written": refused,
        "golden": [
            {
                "waveform": f"golden/{NAME}.wav",
                "levels": f"golden/{NAME}.u8",
                "samples": len(shown["waveform"]),
                "shape": list(shown["mel"].shape),
            }
        ],
    }


def _graph(front_end: LogMel, frames: int) -> Graph:
    shape = (samples(front_end, frames),)
    metadata = {NAME: json.dumps(_described(front_end, frames))}
    return Graph(FrontEnd(front_end, frames).eval(), shape, "waveform", "spectrogram", metadata)


def _described(front_end: LogMel, frames: int) -> dict[str, Any]:
    ends = {"fmax": front_end.highest, "db": list(front_end.db)}
    return {**asdict(front_end), **ends, "frames": frames, "samples": samples(front_end, frames)}


def _trial(front_end: LogMel, frames: int, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the graph is tried on: the waveform (n,), repeated to fill views that follow each other, as inputs
    (views, samples) float32; and its levels in float64, (views, mels, frames) uint8."""
    views, view = -(-front_end.frames(len(waveform)) // frames), frames * front_end.hop
    repeated = np.resize(waveform, views * view)
    size = samples(front_end, frames)
    around = np.pad(repeated, (front_end.n_fft // 2, size))
    inputs = np.stack([around[number * view :][:size] for number in range(views)])
    levels = front_end.spectrogram(repeated)[:, : views * frames]
    return inputs, levels.reshape(front_end.mels, views, frames).transpose(1, 0, 2)


def _written(path: Path, name: str, graph: Graph, inputs: np.ndarray, levels: np.ndarray) -> dict[str, Any]:
    """Write the graph in a format, run the file and say how far it is from `levels`. Raises ExportError when that is
    too far, or when the format cannot be written."""
    form = FORMATS[name]
    lacking = missing(form)
    if lacking:
        raise ExportError(f"{name} cannot be written without {', '.join(lacking)}; run pip install 'kd_dist[export]'")
    imported(form.write)(graph, torch.empty(0, *graph.shape), path)
    made = imported(form.open)(path, torch.get_num_threads())(inputs)[:, 0]
    largest = float(np.abs(made * STEPS - levels).max())
    off = float((made != levels.astype(np.float32) / np.float32(STEPS)).mean())
    if not (largest < 1.5 and off <= OFF):  # as of what is no number
        raise ExportError(
            f"{path}: as {name} the front end differs from training by up to {largest:.3g}, in {off:.2%} of all "
            f"levels; 1, in {OFF:.1%} of them, may be; compute them with LogMel.java, which does not take float32"
        )
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "max_difference": round(largest, 3),
        "off": off,
    }


def _write_wav(file: BinaryIO, waveform: np.ndarray, rate: int) -> None:
    """Multiples of 1/32768 as a file of one channel in 16 bits."""
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes((waveform * 32768).astype("<i2").tobytes())
