"""Image classification: one class index an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torchmetrics
import torchmetrics.classification
from torch import Tensor

from kd_dist.batch import Example
from kd_dist.errors import DataError
from kd_dist.inputs import Input, Span
from kd_dist.inputs.images import Images
from kd_dist.tasks import binary, records
from kd_dist.tasks.certainty import certainty, certainty_warnings
from kd_dist.views.blended import FAKE, is_fake

HIGHER_IS_BETTER = {"accuracy": True, "nll": False, "ece": False}  # and of two classes: `binary`
BINS = 15  # of the calibration error
LISTED = 20  # classes that are told one by one


@dataclass(frozen=True)
class Classification:
    """Each example is of one of `classes` classes; logits are (B, C)."""

    classes: int
    input: Input = Images()

    name: ClassVar[str] = "classification"
    maps: ClassVar[bool] = False
    shown: ClassVar[int] = 0  # examples in a picture
    canonical_whole: ClassVar[bool] = False
    metrics_known: ClassVar[tuple[str, ...]] = (*HIGHER_IS_BETTER, *binary.HIGHER_IS_BETTER)

    def encode(
        self, payload: bytes, extension: str, label: Any, metadata: Mapping[str, Any], span: Span = None
    ) -> dict[str, bytes]:
        """The members of one example in its shard: the input as it keeps it, and the label as JSON.

        `label` is a class index; `span` the part of a recording, see `Item`. Raises DataError when the input cannot be
        decoded or the label is none.
        """
        index = check_label(label, self.classes)
        record = records.encoded({"label": index, "metadata": metadata})
        return {**self.input.encode(payload, extension, span), **record}

    def decode(self, key: str, members: Mapping[str, bytes | memoryview]) -> Example:
        """One example of a shard. Raises DataError that names the key."""
        with records.naming(key):
            label, about = records.read(members)
            return Example(key, self.input.decode(members), check_label(label, self.classes), about)

    def replay_target(self, target: int, view: np.void, size: tuple[int, int]) -> int:
        """The target of a view of (h, w) `size`: that of its image, or the fake's that the view makes of it."""
        return FAKE if is_fake(view) else target

    def no_target(self, size: tuple[int, int]) -> int:
        """The target of a row without an example: any class will do, as the row is masked."""
        return 0

    def collate(self, targets: list[int]) -> tuple[np.ndarray, None]:
        """The targets of a batch, (B,) int64; they have no sizes."""
        return np.array(targets, np.int64), None

    def metrics(self) -> torchmetrics.MetricCollection:
        """Sums for `update`, which merge exactly over any number of processes; `compute()` gives values by name."""
        collection = {
            "accuracy": torchmetrics.classification.MulticlassAccuracy(self.classes, average="micro"),
            "nll": NegativeLogLikelihood(),
            "ece": CalibrationError(),
        }
        if self.classes == 2:
            collection["ranking"] = binary.Ranking()
        return torchmetrics.MetricCollection(collection, compute_groups=False)

    def update(
        self,
        metrics: torchmetrics.MetricCollection,
        logits: Tensor,
        targets: Tensor,
        sizes: None,
        groups: Tensor | None = None,
    ) -> None:
        """Count rows: logits (B, C), targets (B,) and what videos they are of, (B, 2) as in a batch; B at least 1."""
        metrics.update(logits, targets, groups=groups)

    def teacher_sums(self, logits: np.ndarray, targets: np.ndarray, sizes: None) -> dict[str, Any]:
        """Sums over rows, logits (n, C) float32 and targets (n,), that add up over batches and shards."""
        log_p, sums = certainty(logits)
        top = logits.argmax(axis=1)
        return {
            "rows": len(logits),
            "right": int((top == targets).sum()),
            "nll": -float(log_p[np.arange(len(logits)), targets].sum()),
            **sums,
            "labelled_per_class": np.bincount(targets, minlength=self.classes).tolist(),
            "predicted_per_class": np.bincount(top, minlength=self.classes).tolist(),
        }

    def teacher_report(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """What a teacher said over a split: accuracy, nll and entropy (nat), saturated share, rows per class."""
        rows = max(sums["rows"], 1)
        means = {name: sums[name] / rows for name in ("nll", "entropy", "saturated")}
        counts = {name: sums[name] for name in ("rows", "labelled_per_class", "predicted_per_class")}
        return {"accuracy": sums["right"] / rows, **means, **counts}

    def teacher_sentences(self, report: Mapping[str, Any]) -> list[str]:
        """A teacher's report in words; the first goes on after `teacher on SPLIT: `."""
        return [
            f"accuracy {report['accuracy']:.4f}, nll {report['nll']:.4f}, entropy {report['entropy']:.4f} nat, "
            f"saturated {report['saturated']:.1%} of {report['rows']:,} rows",
            f"  rows per class, labelled / predicted: {counts(report['labelled_per_class'])} / "
            f"{counts(report['predicted_per_class'])}",
            *self._ignorance_warnings(report),
            *certainty_warnings(report["entropy"]),
        ]

    def _ignorance_warnings(self, report: Mapping[str, Any]) -> list[str]:
        """A sentence about a teacher that knows nothing, or was not given what it was trained on."""
        commonest = max(report["labelled_per_class"]) / max(report["rows"], 1)
        if report["accuracy"] > commonest:
            return []
        return [
            f"warning: the teacher is right no more often than the commonest class is there ({commonest:.4f}); see to "
            f"its weights, and that mean and std are those that it was trained with"
        ]

    def picture(self, images: np.ndarray, targets: list[int], predictions: dict[str, list[np.ndarray]]) -> None:
        """Nothing: a class needs no picture."""
        return None

    def table(self, metrics: Mapping[str, float], names: Sequence[str]) -> list[tuple[str, float]]:
        """No rows: no metric is by class."""
        return []


def check_label(label: Any, classes: int) -> int:
    """The label as a class index. Raises DataError for NaN, a fraction, another type or a class out of range."""
    if isinstance(label, bool) or not isinstance(label, (int, float, np.integer, np.floating)):
        raise DataError(f"label {label!r} is not a class index")
    if not np.isfinite(label) or label != int(label):
        raise DataError(f"label {label} is not a whole number")
    if not 0 <= label < classes:
        raise DataError(f"label {int(label)} is outside 0..{classes - 1}, the task's {classes} classes")
    return int(label)


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


class CalibrationError(torchmetrics.Metric):
    """Expected calibration error of the top class (Guo et al. 2017): over BINS bins of equal width, open below, of its
    probability, the mean distance of a bin's accuracy from its mean probability, weighted by its rows; in float64."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "confidence"):
            self.add_state(name, torch.zeros(BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        p, top = logits.detach().double().softmax(dim=1).max(dim=1)
        edges = torch.arange(1, BINS, dtype=torch.float64, device=p.device) / BINS
        bins = torch.bucketize(p, edges)
        self.right.index_add_(0, bins, (top == targets).double())
        self.confidence.index_add_(0, bins, p)
        self.count += len(targets)

    def compute(self) -> Tensor:
        return (self.right - self.confidence).abs().sum() / self.count


def counts(rows: Sequence[int]) -> str:
    """How many rows each class has; of many classes the fewest and the most."""
    return str(list(rows)) if len(rows) <= LISTED else f"{min(rows):,} to {max(rows):,}"
