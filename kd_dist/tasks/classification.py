"""Image classification: one class index an image."""

import io
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torchmetrics
import torchmetrics.classification
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kd_dist.batch import Example
from kd_dist.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp", "ppm", "pgm")
HIGHER_IS_BETTER = {"accuracy": True, "nll": False}


def check_label(label: Any, classes: int) -> int:
    """The label as a class index. Raises DataError for NaN, a fraction, another type or a class out of range."""
    if isinstance(label, bool) or not isinstance(label, (int, float, np.integer, np.floating)):
        raise DataError(f"label {label!r} is not a class index")
    if not np.isfinite(label) or label != int(label):
        raise DataError(f"label {label} is not a whole number")
    if not 0 <= label < classes:
        raise DataError(f"label {int(label)} is outside 0..{classes - 1}, the task's {classes} classes")
    return int(label)


def decode_image(payload: bytes | memoryview) -> np.ndarray:
    """Encoded image -> (H, W, 3) uint8 RGB. Raises DataError when it is damaged, too large or not 8 bits deep."""
    try:
        with Image.open(io.BytesIO(payload)) as image:
            if image.mode[0] in "IF":  # Pillow would clip it to 255
                raise DataError(f"the image has pixels of mode {image.mode}, not of 8 bits; convert it to 8 bits")
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:  # its own words hold an address, other bytes in every run's manifest
        raise DataError("the image is of no known format, or its first bytes are damaged") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be decoded ({error})") from error


def encode_members(image: bytes, extension: str, label: int, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The members of one example in its shard: the image as it came, and the label as JSON.

    Raises DataError for an extension that is not one of IMAGE_EXTENSIONS.
    """
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"the extension '{extension}' is none of {', '.join(IMAGE_EXTENSIONS)}")
    record = json.dumps({"label": label, "metadata": metadata}, sort_keys=True, separators=(",", ":"))
    return {extension: image, "json": record.encode()}


def decode_example(key: str, members: Mapping[str, bytes | memoryview], classes: int) -> Example:
    """One example of a shard. Raises DataError that names the key."""
    try:
        found = [name for name in IMAGE_EXTENSIONS if name in members]
        if len(found) != 1 or "json" not in members:
            raise DataError(f"expected one image and one json member, found {', '.join(sorted(members))}")
        record = json.loads(bytes(members["json"]))
        if not isinstance(record, dict) or "label" not in record:
            raise DataError("its json member has no 'label'")
        label = check_label(record["label"], classes)
        return Example(key, decode_image(members[found[0]]), label)
    except (DataError, ValueError) as error:
        raise DataError(f"example '{key}': {error}; correct the source and pack again") from error


def metrics(classes: int) -> torchmetrics.MetricCollection:
    """Metrics over logits (B, C) and targets (B,), as sums that merge exactly over any number of processes."""
    collection = {
        "accuracy": torchmetrics.classification.MulticlassAccuracy(classes, average="micro"),
        "nll": NegativeLogLikelihood(),
    }
    return torchmetrics.MetricCollection(collection, compute_groups=False)


class NegativeLogLikelihood(torchmetrics.Metric):
    """Mean of -log softmax(logits)[target], in nat, summed in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        losses = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
        self.total += losses
        self.count += len(targets)

    def compute(self) -> Tensor:
        return self.total / self.count


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` beats `best`. Anything beats no value and NaN; NaN beats no number."""
    if best is None or math.isnan(best):
        return True
    return value > best if HIGHER_IS_BETTER[metric] else value < best


def retention(metric: str, student: float, teacher: float) -> float | None:
    """The share of the teacher's metric that the student keeps (1.0 = all); None where that is undefined."""
    kept, reference = (student, teacher) if HIGHER_IS_BETTER[metric] else (teacher, student)
    return kept / reference if reference > 0 else None


def teacher_sums(logits: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Sums over rows, logits (n, C) float32 and targets (n,), that add up over batches and shards.

    A row is saturated when its top probability exceeds 0.99.
    """
    classes = logits.shape[1]
    z = logits.astype(np.float64)
    log_p = z - z.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p, top = np.exp(log_p), z.argmax(axis=1)
    return {
        "rows": len(z),
        "right": int((top == targets).sum()),
        "nll": -float(log_p[np.arange(len(z)), targets].sum()),
        "entropy": -float((p * log_p).sum()),
        "saturated": int((p.max(axis=1) > 0.99).sum()),
        "labelled_per_class": np.bincount(targets, minlength=classes).tolist(),
        "predicted_per_class": np.bincount(top, minlength=classes).tolist(),
    }


def teacher_report(sums: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher said over a split: accuracy, nll and entropy (nat), saturated share, rows per class."""
    rows = max(sums["rows"], 1)
    means = {name: sums[name] / rows for name in ("nll", "entropy", "saturated")}
    counts = {name: sums[name] for name in ("rows", "labelled_per_class", "predicted_per_class")}
    return {"accuracy": sums["right"] / rows, **means, **counts}
