"""Golden vectors: examples of which every step to the output is known, in files that a phone reads as it is."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from kd_dist.checkpoint import write_atomic
from kd_dist.disk import published
from kd_dist.errors import KdError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Case(NamedTuple):
    """An example of which every step to the output is known."""

    name: str  # of its files: letters, digits, `-`, `_` and `.`
    image: np.ndarray  # (H, W, 3) uint8, decoded; or (mels, frames) uint8, the levels of a whole recording
    input: np.ndarray  # (C, H, W) float32, as the model takes it
    output: np.ndarray  # float32, what the student says to it in Python, without the batch


def write(folder: Path, cases: Sequence[Case]) -> None:
    """Write `golden.json`, and for each case `<name>.png`, the image, or `<name>.u8`, the levels of a recording, band
    by band; `<name>.input.f32` and `<name>.output.f32`. Numbers are little-endian, row-major, without a header.

    Raises KdError for a name that two cases have, or that no file can have everywhere.
    """
    names = [case.name for case in cases]
    for name in names:
        if names.count(name) > 1 or not NAME.fullmatch(name):
            raise KdError(
                f"{folder}: no golden case can be called {name!r}; give each case a name of its own, of letters, "
                f"digits, '-', '_' and '.'"
            )
    listed = []
    for case in cases:
        files = {}
        for step, (suffix, content, values) in _steps(case).items():
            files[step] = {"file": case.name + suffix, "shape": list(values.shape), "dtype": str(values.dtype)}
            with published(folder / files[step]["file"]) as file:
                file.write(content)
        listed.append({"name": case.name, **files})
    write_atomic(folder / "golden.json", json.dumps({"cases": listed}, indent=1) + "\n")


def _steps(case: Case) -> Mapping[str, Any]:
    """By step: suffix and bytes of its file, and its values."""
    original = (".png", _png(case.image)) if case.image.ndim == 3 else (".u8", case.image.tobytes())
    return {
        "original": (*original, case.image),
        "input": (".input.f32", _floats(case.input), case.input),
        "output": (".output.f32", _floats(case.output), case.output),
    }


def _floats(values: np.ndarray) -> bytes:
    return values.astype("<f4").tobytes()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
