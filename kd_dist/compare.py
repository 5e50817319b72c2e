"""Teacher and students side by side: every metric, what each model takes, and what is kept of the teacher."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from kd_dist.batch import Batch
from kd_dist.checkpoint import read_record, write_atomic
from kd_dist.errors import MismatchError
from kd_dist.manifest import first_difference
from kd_dist.report import COST, cost, interval, measured_on, plot_roc, role_in_words, spread, summarise
from kd_dist.tasks import METRICS, Task
from kd_dist.tasks.classification import BINS, LISTED

KEPT = 1024  # examples of a regression of which a record says what the model said
DIGITS = 5  # significant ones, of these numbers


class Subject(NamedTuple):
    """What is compared."""

    title: str  # the recipes
    split: str  # that all are judged on
    task: str  # its name
    names: tuple[str, ...]  # of its classes, or of the outputs of a regression
    command: str  # which compares them again


class Outcomes:
    """What a model says of each example of a split, counted as a comparison shows it: bounded, however long the split
    is. Of a segmentation nothing: its metrics are by class."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.pairs: list[Tensor] = []  # of a regression: (B, 2 D) float32, truth and prediction of the labelled rows
        classes = task.classes if task.name == "classification" else 0
        self.labelled, self.predicted, self.right = torch.zeros(3, classes, dtype=torch.int64)
        few = classes if classes <= LISTED else 0
        self.confusion = torch.zeros(few, few, dtype=torch.int64)
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64)  # rows, right ones, summed probability of the top class

    def counting(self, network: Callable[[Tensor], Tensor]) -> Callable[[Batch], Tensor]:
        """What `evaluation.judge` asks for the logits of a batch, which are counted on their way."""

        def predict(batch: Batch) -> Tensor:
            logits = network(batch.images)
            if not self.task.maps:
                self._count(logits[batch.valid].detach().float().cpu(), batch.targets[batch.valid].cpu())
            return logits

        return predict

    def _count(self, logits: Tensor, targets: Tensor) -> None:
        """Rows of logits (B, C) with targets (B,), in the bins of `tasks.classification.CalibrationError`; or of
        numbers (B, D) with targets (B, D)."""
        if self.task.name == "regression":
            known = ~targets.isnan().any(dim=1)
            self.pairs.append(torch.cat([targets[known], logits[known]], dim=1))
            return
        p, top = logits.double().softmax(dim=1).max(dim=1)
        right, classes = top == targets, self.task.classes
        self.labelled += torch.bincount(targets, minlength=classes)
        self.predicted += torch.bincount(top, minlength=classes)
        self.right += torch.bincount(targets[right], minlength=classes)
        if self.confusion.numel():
            self.confusion += torch.bincount(targets * classes + top, minlength=classes**2).view(classes, classes)
        places = torch.bucketize(p, torch.arange(1, BINS, dtype=torch.float64) / BINS)
        self.bins.index_add_(0, places, torch.stack([torch.ones_like(p), right.double(), p], dim=1))

    def record(self) -> dict[str, Any]:
        """As JSON. Of classes: rows `labelled`, `predicted` and `right` by class, `confusion` [truth][prediction] of
        few of them, and `reliability`: rows, right ones and the summed probability of the top class by bin. Of a
        regression: `pairs`, a row an example, its truth and then its prediction by output, KEPT evenly chosen ones at
        most."""
        if self.task.name == "classification":
            counts = {name: getattr(self, name).tolist() for name in ("labelled", "predicted", "right", "confusion")}
            bins = [[int(rows), int(right), finite(p)] for rows, right, p in self.bins.tolist()]
            return {**counts, "reliability": bins}
        if self.task.name == "regression" and self.pairs:
            pairs = torch.cat(self.pairs)
            kept = torch.linspace(0, len(pairs) - 1, min(KEPT, len(pairs))).round().long()
            return {"pairs": [[finite(value) for value in row] for row in pairs[kept].tolist()]}
        return {}


def finite(value: float) -> float | None:
    """A number of a record, rounded to DIGITS; None for what JSON does not know."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def refuse_incomparable(paths: Sequence[Path], said: Sequence[dict[str, Any]]) -> None:
    """Raise a MismatchError, naming both values, unless recipes agree in all that is `said` of each but its `name`,
    which is its own."""
    known: dict[str, Path] = {}
    for path, one in zip(paths, said, strict=True):
        other = known.setdefault(one["name"], path)
        if other is not path:
            raise MismatchError(f"{path}: is called '{one['name']}', as {other} is; give each recipe a name of its own")
        ours, theirs = ({name: each[name] for name in each if name != "name"} for each in (one, said[0]))
        if ours["task"] != theirs["task"]:  # all else follows from it
            ours, theirs = {"task": ours["task"]}, {"task": theirs["task"]}
        difference = first_difference(ours, theirs)
        if difference is not None:
            place, its, others = difference
            raise MismatchError(
                f"{path}: has {place} = {its!r}, {paths[0]} has {others!r}; compare recipes of one task that are "
                f"judged by one metric on the same examples, packed alike"
            )


def named_after(recipe: str, models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The models of a further recipe, whose stages may be called as those of others: `<recipe>/<stage>`."""
    stages = ("stage", "taught_by", "without_generated")
    renamed = [{name: f"{recipe}/{one[name]}" for name in stages if one.get(name) is not None} for one in models]
    return [{**one, **names} for one, names in zip(models, renamed, strict=True)]


def by_part(subject: Subject, rows: Sequence[dict[str, Any]], models: Sequence[dict[str, Any]]) -> dict[str, list]:
    """What the models come to by class or output: under the name of a quantity, a class or output a line, its `name`
    and by stage [mean, interval]. Recall of classes, IoU of classes in maps, ccc and mae of outputs."""
    if subject.task == "classification":
        found: dict[str, list] = {"recall": []}
        counted = [(one["stage"], read_record(Path(one["record"]), "outcomes")["outcomes"]) for one in models]
        for place, name in enumerate(subject.names):
            shares: dict[str, list[float]] = {}
            for stage, of in counted:
                if of["labelled"][place]:
                    shares.setdefault(stage, []).append(of["right"][place] / of["labelled"][place])
            stages = {stage: list(interval(values)) for stage, values in shares.items()}
            found["recall"] += [{"name": name, "stages": stages}] if stages else []
        return found
    found = {}
    for row in rows:
        for part, mean, half in row["parts"]:
            quantity, _, name = ("IoU", "", part) if subject.task == "segmentation" else part.partition("/")
            if name:
                lines = found.setdefault(quantity, {})
                lines.setdefault(name, {})[row["stage"]] = [mean, half]
    return {
        quantity: [{"name": name, "stages": stages} for name, stages in lines.items()]
        for quantity, lines in found.items()
    }


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Summary rows turned on their side: a line a quantity, its name and then a cell for each stage. The first line
    has the stages. A student's metric has its retention in brackets."""
    found = [["", *(row["stage"] for row in rows)]]
    found.append(["role", *map(role_in_words, rows)])
    found.append(["model", *(row["name"] for row in rows)])
    found.append(["seeds", *(str(row["seeds"]) for row in rows)])
    for metric in rows[0]["metrics"]:
        name = metric if METRICS[metric] else f"{metric} (lower is better)"
        found.append([name, *(cell(row["metrics"][metric], row["role"]) for row in rows)])
    found += [[name, *values] for name, *values in zip(COST, *map(cost, rows), strict=True)]
    return found


def cell(one: dict[str, Any], role: str) -> str:
    """A metric with its interval and what it keeps of the teacher's."""
    kept = "" if one["retention"] is None or role == "teacher" else f" [{one['retention']:.1%}]"
    return spread(one["mean"], one["interval"]) + kept


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The comparison for a terminal."""
    first, *others = lines(rows)
    shown = Table(title=title)
    for heading in first:
        shown.add_column(heading, overflow="fold")
    for line in others:
        shown.add_row(*(one.replace("[", "\\[") for one in line))  # else rich takes brackets for a style
    return shown


def markdown(rows: Sequence[dict[str, Any]], title: str, split: str, pictured: bool) -> str:
    """The comparison as a page; the ROC curves, if any, lie beside it."""
    first, *others = lines(rows)
    page = [f"# {title}", "", f"{measured_on(split)} In brackets: the share of the teacher's metric that is kept.", ""]
    page += ["| " + " | ".join(first) + " |", "|" + " --- |" * len(first)]
    page += ["| " + " | ".join(line) + " |" for line in others]
    page += ["", f"![roc-{split}](roc-{split}.png)"] if pictured else []
    return "\n".join([*page, ""])


def write(folder: Path, subject: Subject, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Write `compare.json`, `compare.md` and, of two classes, `roc-<split>.png`; return what the JSON holds: the
    subject, the `models` as `journey.evaluate_recipe` gives them, their `summary`, the same `table` and `by_part`."""
    rows, split = summarise(models), subject.split
    content = {**subject._asdict(), "names": list(subject.names), "models": models, "summary": rows}
    content |= {"table": lines(rows), "by_part": by_part(subject, rows, models)}
    pictured = plot_roc(folder / f"roc-{split}.png", models, split)
    write_atomic(folder / "compare.json", json.dumps(content, indent=1, sort_keys=True))
    write_atomic(folder / "compare.md", markdown(rows, subject.title, split, pictured))
    return content
