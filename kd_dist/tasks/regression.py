"""Regression: some real numbers an example, such as the valence and the arousal of music."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torchmetrics
from torch import Tensor

from kd_dist.batch import Example
from kd_dist.errors import DataError, RecipeError
from kd_dist.inputs import Input, Span
from kd_dist.inputs.images import Images
from kd_dist.tasks import records

HIGHER_IS_BETTER = {"ccc": True, "mae": False}
PANEL = 4.0  # inches, of one scatter plot


@dataclass(frozen=True)
class Regression:
    """Each example has one number for each of `outputs`, from `range[0]` to `range[1]`; what a model says, called
    logits everywhere, is these numbers (B, D).

    An example without a label, as a generated one, has NaN for each. Raises RecipeError for outputs that cannot be.
    """

    outputs: tuple[str, ...]
    range: tuple[float, float] = (-1.0, 1.0)
    input: Input = Images()

    name: ClassVar[str] = "regression"
    maps: ClassVar[bool] = False
    shown: ClassVar[int] = 1024  # examples in a picture
    canonical_whole: ClassVar[bool] = False
    metrics_known: ClassVar[tuple[str, ...]] = tuple(HIGHER_IS_BETTER)

    def __post_init__(self) -> None:
        if not self.outputs or len(set(self.outputs)) < len(self.outputs):
            raise RecipeError(f"task.outputs: must name each output once, at least one, not {list(self.outputs)}")
        if not self.range[0] < self.range[1]:
            raise RecipeError(f"task.range: must begin with its lower end, not {list(self.range)}")

    @property
    def classes(self) -> int:
        """How many numbers a model gives."""
        return len(self.outputs)

    def encode(
        self, payload: bytes, extension: str, label: Any, metadata: Mapping[str, Any], span: Span = None
    ) -> dict[str, bytes]:
        """The members of one example in its shard: the input as it keeps it, and the label as JSON.

        `label` is a sequence of numbers, None for an example without one. Raises DataError when the input cannot be
        decoded or the label does not fit.
        """
        values = None if label is None else check_values(label, self.outputs, self.range)
        record = records.encoded({"label": values, "metadata": metadata})
        return {**self.input.encode(payload, extension, span), **record}

    def decode(self, key: str, members: Mapping[str, bytes | memoryview]) -> Example:
        """One example of a shard. Raises DataError that names the key."""
        with records.naming(key):
            label = records.label_in(members)
            values = [math.nan] * self.classes if label is None else check_values(label, self.outputs, self.range)
            return Example(key, self.input.decode(members), np.array(values, np.float32))

    def replay_target(self, target: np.ndarray, view: np.void, size: tuple[int, int]) -> np.ndarray:
        """The target of a view of (h, w) `size`: that of its example."""
        return target

    def no_target(self, size: tuple[int, int]) -> np.ndarray:
        """The target of a row without an example: no label."""
        return np.full(self.classes, math.nan, np.float32)

    def collate(self, targets: list[np.ndarray]) -> tuple[np.ndarray, None]:
        """The targets of a batch, (B, D) float32; they have no sizes."""
        return np.stack(targets), None

    def metrics(self) -> torchmetrics.Metric:
        """Sums for `update`, which merge exactly over any number of processes; `compute()` gives values by name."""
        return Concordance(self.outputs)

    def update(
        self, metrics: torchmetrics.Metric, logits: Tensor, targets: Tensor, sizes: None, groups: Tensor | None = None
    ) -> None:
        """Count rows: what a model says (B, D) and targets (B, D), B at least 1."""
        metrics.update(logits, targets)

    def teacher_sums(self, logits: np.ndarray, targets: np.ndarray, sizes: None) -> dict[str, Any]:
        """Sums over labelled rows, logits and targets (n, D) float32, that add up over batches and shards; and the
        largest squared error of a row, mean over its outputs."""
        labelled = ~np.isnan(targets).any(axis=1)
        said, truth = logits[labelled].astype(np.float64), targets[labelled].astype(np.float64)
        squared = ((said - truth) ** 2).mean(axis=1)
        return {
            "rows": len(logits),
            "moments": moments(torch.from_numpy(said), torch.from_numpy(truth)).tolist(),
            "largest_error": float(squared.max(initial=0.0)),
        }

    def teacher_report(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """What a teacher said over a split: rows, ccc and mae of each output and their means, and the largest squared
        error of a row."""
        values = scores(torch.tensor(sums["moments"], dtype=torch.float64), self.outputs)
        known = {name: None if value.isnan() else float(value) for name, value in values.items()}
        return {"rows": sums["rows"], "labelled": int(sums["moments"][0][0]), **known} | {
            "largest_error": sums["largest_error"]
        }

    def teacher_sentences(self, report: Mapping[str, Any]) -> list[str]:
        """A teacher's report in words; the first goes on after `teacher on SPLIT: `."""
        if not report["labelled"]:
            return [f"{report['rows']:,} rows without a label"]
        metrics = {name: value for name, value in report.items() if name.startswith(self.metrics_known)}
        shown = {name: "undefined" if value is None else f"{value:.4f}" for name, value in metrics.items()}
        by_output = ", ".join(f"{name} {shown[f'ccc/{name}']} / {shown[f'mae/{name}']}" for name in self.outputs)
        return [
            f"ccc {shown['ccc']}, mae {shown['mae']} of {report['labelled']:,} labelled rows in {report['rows']:,}",
            f"  ccc / mae by output: {by_output}",
        ]

    def picture(
        self, images: np.ndarray, targets: list[np.ndarray], predictions: dict[str, list[np.ndarray]]
    ) -> np.ndarray:
        """Scatter plots of the labelled examples, a row an output and a column each of `predictions`, (D,) by name,
        against the truth; one (height, width, 3) uint8 RGB array."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows, columns = len(self.outputs), len(predictions)
        figure = Figure(figsize=(PANEL * columns, PANEL * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        truth = np.stack(targets)
        for column, (name, said) in enumerate(predictions.items()):
            values = np.stack(said)
            for row, output in enumerate(self.outputs):
                axes = panels[row, column]
                axes.plot(self.range, self.range, color="grey", linewidth=0.8)
                axes.scatter(truth[:, row], values[:, row], s=10, alpha=0.6)
                axes.set(title=f"{output}, {name}", xlabel="truth", ylabel="prediction")
                axes.grid(alpha=0.3)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def table(self, metrics: Mapping[str, float], names: Sequence[str]) -> list[tuple[str, float]]:
        """(ccc or mae, or that of an output, value) for each that is defined."""
        found = {name: value for name, value in metrics.items() if name.startswith(self.metrics_known)}
        return [(name, value) for name, value in found.items() if not math.isnan(value)]


def check_values(label: Any, outputs: Sequence[str], limits: tuple[float, float]) -> list[float]:
    """The label as one number for each output. Raises DataError for another number of them, NaN, or out of range."""
    if not isinstance(label, Sequence) or isinstance(label, str) or len(label) != len(outputs):
        raise DataError(f"label {label!r} is not one number for each of {', '.join(outputs)}")
    values = []
    for name, value in zip(outputs, label, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise DataError(f"label {name} = {value!r} is no number")
        if math.isnan(value):
            raise DataError(f"has no label {name}")
        if not limits[0] <= value <= limits[1]:
            raise DataError(f"label {name} = {value} is outside {limits[0]:g} to {limits[1]:g}, the task's range")
        values.append(float(value))
    return values


def moments(said: Tensor, truth: Tensor) -> Tensor:
    """The sums that `scores` is made of, over rows (n, D) float64: (D, 7) float64, n, x, y, x^2, y^2, xy, |x - y|."""
    x, y = said.double(), truth.double()
    return torch.stack([one.sum(dim=0) for one in (torch.ones_like(x), x, y, x * x, y * y, x * y, (x - y).abs())], 1)


def scores(sums: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """`moments` (D, 7) -> `ccc`, `mae`, and both by output as `ccc/<output>`; each () float64.

    ccc = 2 cov(x, y) / (var(x) + var(y) + (mean(x) - mean(y))^2), with n in the denominators (Lin 1989); NaN where that
    is 0 / 0. `ccc` and `mae` are the means over the outputs.
    """
    n, x, y, xx, yy, xy, gap = sums.unbind(dim=1)
    x, y = x / n, y / n
    ccc = 2 * (xy / n - x * y) / ((xx / n - x * x) + (yy / n - y * y) + (x - y) ** 2)
    mae = gap / n
    values = {"ccc": ccc.mean(), "mae": mae.mean()}
    for number, name in enumerate(outputs):
        values |= {f"ccc/{name}": ccc[number], f"mae/{name}": mae[number]}
    return values


class Concordance(torchmetrics.Metric):
    """Concordance correlation and mean absolute error over every labelled row, from seven sums in float64."""

    def __init__(self, outputs: Sequence[str]) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self.add_state("sums", torch.zeros(len(self.outputs), 7, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        labelled = ~targets.isnan().any(dim=1)
        self.sums += moments(logits[labelled], targets[labelled])

    def compute(self) -> dict[str, Tensor]:
        return scores(self.sums, self.outputs)
