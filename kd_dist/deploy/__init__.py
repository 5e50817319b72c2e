"""What an app developer gets beside the model: what it takes and gives, a model card, example code for Android."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_dist.checkpoint import write_atomic

INFO = "deployment_info.json"


class Case(NamedTuple):
    """An example of which every step to the output is known."""

    name: str  # of its files: letters, digits, `-`, `_` and `.`
    image: np.ndarray  # (H, W, 3) uint8, decoded; or (mels, frames) uint8, the levels of a whole recording
    input: np.ndarray  # (C, H, W) float32, as the model takes it
    output: np.ndarray  # float32, what the student says to it in Python, without the batch


def write(folder: Path, info: Mapping[str, Any], cases: Sequence[Case]) -> None:
    """Write deployment_info.json, MODEL_CARD.md, android/ and golden/ into `folder`, beside the model files that
    `info` lists."""
    write_atomic(folder / INFO, json.dumps(info, indent=1, ensure_ascii=False) + "\n")
