"""The structures that cross rooms, with the shape, dtype and unit of each field."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

IGNORED = 255  # in a mask: a pixel without a label, neither learnt from nor counted


class Example(NamedTuple):
    """One decoded example of a shard, before any view is replayed on it."""

    key: str  # unique within a split
    # (H, W, 3) uint8, RGB, an array or a `views.pictures.Picture`; or a spectrogram (mels, frames, 1) uint8
    image: Any
    # Class index, 0 <= target < classes; a mask of them (H, W) uint8, 255: ignored; or numbers (D,) float32, NaN: none
    target: int | np.ndarray
    about: Mapping[str, Any] = {}  # what its source told of it: the metadata that it was packed with
    partner: tuple[int, "Example"] | None = None  # what one view of it is mixed with, and its place in the shard


class TopLogits(NamedTuple):
    """A teacher's logits z of C classes by the largest K of them and the others' mass, as `signals.topk` keeps them."""

    ids: Tensor  # (B, K) int64: classes, the largest first; the labels are among them
    logits: Tensor  # (B, K) float32: their z - max z
    tail: Tensor  # (B, n) float32: log sum exp(b (z - max z)) over the other classes, at the b of `signals.topk`


def each_tensor(logits: Any, function: Callable[[Any], Tensor]) -> Any:
    """Logits, dense or TopLogits, with `function` applied to each of their tensors."""
    return TopLogits(*map(function, logits)) if isinstance(logits, TopLogits) else function(logits)


class TeacherSignal(NamedTuple):
    """What the teacher said about each row of a batch.

    `features` are channels first whatever the teacher's own order. Between the shards and `loader.to_device` they are
    still the row's fields as stored, by field name: decoding is work for the device.
    """

    # (B, C) or (B, C, h, w) float32; exact at each place up to an additive constant, at any temperature. Or the numbers
    # of a regression (B, D), exact. Or the largest of (B, C), and what is known of the others.
    logits: Tensor | TopLogits
    features: dict[str, Tensor] = {}  # by feature name, each (B, C, *grid) float32


class Mixture(NamedTuple):
    """The second of the two examples that each row of a batch shows."""

    targets: Tensor  # (B,) int64
    share: Tensor  # (B,) float32, 0 to 1: how much of it is seen; 0: the row is not mixed


class Batch(NamedTuple):
    """One rank's share of one micro-batch. Rows are valid examples, but for those that failed, which are zeros and
    masked; a share without a valid example is one such row, the filler."""

    keys: tuple[str, ...]  # B keys, in row order
    images: Tensor  # (B, 3, H, W) uint8 at view resolution; spectrograms are images (B, 1, mels, frames)
    # (B,) int64; or masks (B, H, W) uint8, 255: ignored, which also pads them to the largest; or (B, D) float32
    targets: Tensor
    sizes: Tensor | None  # (B, 2) int64, (height, width) of each mask without its padding; None: targets are no masks
    # (B,) bool, always on the host, where nobody waits for a GPU to ask it. False for rows of failed examples and for
    # the single filler row.
    valid: Tensor
    total: int  # examples planned for the whole step: all ranks, all its micro-batches; failed ones count
    signals: TeacherSignal | None  # None when the stage uses no cache
    failed: tuple[str, ...] = ()  # a sentence for each example of the share that could not be read or decoded
    # (B, 2) int64, digests of the video and the frame that each example shows, 0: of none. None where no video is
    # named, and where students learn.
    groups: Tensor | None = None
    # None where views are not mixed. `targets` are those of the first; what reads them weighs both: see Objective.
    mixture: Mixture | None = None


def mapped(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """The batch with `function` applied to each of its tensors, in the order of its fields."""
    signals = batch.signals
    optional = lambda value: value if value is None else function(value)  # noqa: E731
    return batch._replace(
        images=function(batch.images),
        targets=function(batch.targets),
        sizes=optional(batch.sizes),
        valid=function(batch.valid),
        signals=signals
        and TeacherSignal(
            each_tensor(signals.logits, function),
            {name: function(value) for name, value in signals.features.items()},
        ),
        groups=optional(batch.groups),
        mixture=batch.mixture and Mixture(*map(function, batch.mixture)),
    )


def valid_rows(batch: Batch) -> Batch:
    """The batch without the rows of failed examples, which must not enter BatchNorm; as it is if it has no others."""
    kept = batch.valid
    if kept.all() or not kept.any():
        return batch
    keys = tuple(key for key, valid in zip(batch.keys, kept.tolist(), strict=True) if valid)
    return mapped(batch, lambda value: value[kept])._replace(keys=keys)


class StudentOutput(NamedTuple):
    """What a student returns. A named tuple, so that DDP and autocast wrappers look inside it."""

    logits: Tensor  # (B, C) or (B, C, h, w) float, any precision; of a regression its D numbers (B, D)
    features: dict[str, Tensor] = {}  # by feature name, each (B, C, *grid) float, channels first
    projected: dict[str, dict[str, Tensor]] = {}  # by loss, by feature: (B, channels of the teacher, *grid)
