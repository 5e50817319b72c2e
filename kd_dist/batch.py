"""The structures that cross rooms, with the shape, dtype and unit of each field."""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Example(NamedTuple):
    """One decoded example of a shard, before any view is replayed on it."""

    key: str  # unique within a split
    image: np.ndarray  # (H, W, 3) uint8, RGB, as decoded
    target: int  # class index, 0 <= target < classes


class TeacherSignal(NamedTuple):
    """What the teacher said about each row of a batch, decoded."""

    logits: Tensor  # (B, C) float32; each row is exact up to an additive constant, at any temperature


class Batch(NamedTuple):
    """One rank's share of one micro-batch. Rows are valid examples; only an empty share has a filler row."""

    keys: tuple[str, ...]  # B keys, in row order
    images: Tensor  # (B, 3, H, W) uint8 at view resolution
    targets: Tensor  # (B,) int64
    valid: Tensor  # (B,) bool; False for the single filler row of an empty share
    total: int  # valid examples of the whole step: all ranks, all its micro-batches
    signals: TeacherSignal | None  # None when the stage uses no cache


class StudentOutput(NamedTuple):
    """What a student returns. A named tuple, so that DDP and autocast wrappers look inside it."""

    logits: Tensor  # (B, C) float, any precision
