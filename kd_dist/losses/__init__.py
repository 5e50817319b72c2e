"""The losses a recipe may name, and the objective that weighs them against each other."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kd_dist.batch import Batch, StudentOutput
from kd_dist.choose import check_options, describe, entry, fits, hint
from kd_dist.errors import ModelError, RecipeError
from kd_dist.losses import features as feature_losses
from kd_dist.losses import logits, outputs, segmentation
from kd_dist.losses.relations import related
from kd_dist.losses.schedules import check_weight, weight_at
from kd_dist.losses.table import Loss

LOSSES: dict[str, Loss] = {**logits.LOSSES, **outputs.LOSSES, **segmentation.LOSSES, **feature_losses.LOSSES}


def check_losses(
    losses: Mapping[str, Mapping[str, Any]], task: str, classes: int, features: Collection[str] = ()
) -> None:
    """Raise a RecipeError unless an Objective of `losses` makes sense for `task` with `classes` classes, or outputs.

    `losses` is as a recipe writes it: loss name -> {weight: ..., **options}, the weight 1 when left out. `features`
    are the names of the features that teacher and student both have. A loss on features may say which it reads,
    `features: [a, b]`, all when left out; a relational one may say whether to `gather`, see `Objective`.
    """
    if not losses:
        raise RecipeError(f"no loss is named; known: {', '.join(sorted(LOSSES))}")
    for name, written in losses.items():
        row = entry(LOSSES, "loss", name)
        try:
            _check_place(row, task, classes)
            _check_options(row, written)
            _check_features(row, written, features)
            check_weight(_weight(written))
        except RecipeError as error:
            raise RecipeError(f"loss '{name}': {error}") from error


def suits(row: Loss, task: str, classes: int) -> bool:
    """Whether a loss makes sense for `task` with so many classes, or outputs."""
    least, most = row.classes
    return task in row.tasks and least <= classes and (most is None or classes <= most)


def signals_needed(losses: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The TeacherSignal fields that these losses read; empty when no teacher is needed."""
    return {"logits" if LOSSES[name].with_teacher else LOSSES[name].against for name in losses} - {"targets"}


def imitates(losses: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether one of these losses asks for no label."""
    return any(LOSSES[name].against != "targets" for name in losses)


def asks_the_cache(name: str, written: Mapping[str, Any]) -> bool:
    """Whether a loss, as a recipe writes it, lacks what only a cache of the whole training set knows: see `filled`."""
    return name == "ail" and written.get("eta") is None


def filled(losses: Mapping[str, Mapping[str, Any]], largest_error: float) -> dict[str, Mapping[str, Any]]:
    """These losses, with the `eta` of `ail` where it is left out: `largest_error`, the largest `outputs.mse` of the
    teacher with the targets over every training example, in every view that the teacher has seen."""
    return {
        name: {**written, "eta": largest_error} if asks_the_cache(name, written) else written
        for name, written in losses.items()
    }


def features_read(losses: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> list[str]:
    """The features that these losses read, of those that teacher and student both have; in the order of `known`."""
    read = {name for loss, written in losses.items() if _on_features(loss) for name in _chosen(written, known)}
    return [name for name in known if name in read]


def isometric(losses: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> list[str]:
    """Those of the features that these losses read which no loss sees otherwise than through norms and inner products
    of the teacher's channels; in the order of `known`."""
    others = {loss: written for loss, written in losses.items() if not LOSSES[loss].isometric}
    bound = features_read(others, known)
    return [name for name in features_read(losses, known) if name not in bound]


def projections(losses: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> dict[str, list[str]]:
    """By loss, the features that the student must project for it to the teacher's channels; in the order of `known`."""
    return {loss: _chosen(written, known) for loss, written in losses.items() if LOSSES[loss].student == "projected"}


@dataclass(frozen=True)
class Objective:
    """The weighted sum of losses that a stage minimises. `losses` is as in `check_losses`, and has passed it.

    The value of a loss on features is the mean over its features, so that a weight does not depend on their number.
    A relational loss compares the rows of one micro-batch with each other; where several ranks train, those of each
    rank by themselves, which gives another value than one process has. With its option `gather: true` it compares the
    rows of all ranks, as one process would; each rank then fetches the others' rows in every micro-batch. `ccc` and
    `kd_ccc`, whose rows are a few numbers, do so unless told `gather: false`.
    Of a row that shows two examples, what a loss says with the target of each is weighed by how much of it is seen.
    """

    losses: Mapping[str, Mapping[str, Any]]
    epochs: int  # length of the run, which the weight schedules need

    def weights(self, epoch: float) -> dict[str, float]:
        """Each loss's weight at `epoch`, by loss name."""
        return {name: weight_at(_weight(written), epoch, self.epochs) for name, written in self.losses.items()}

    def __call__(self, output: StudentOutput, batch: Batch, epoch: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This share's part of the step's loss, and of each unweighted term (detached, by loss name); 0-d float32.

        Both are sums over the valid rows divided by `batch.total`, the valid examples of the whole step; a relational
        loss counts its value once for each row that it relates. So the parts add up, over ranks and micro-batches, to
        the mean over the step: add them, do not average them. A row that is not valid adds exactly 0 to the value and
        to the gradient. ModelError: a feature is missing, or what the student says does not fit what it is held to.
        """
        # A loss works in float32. Elementwise operations do so by themselves, a matrix product would not.
        with torch.autocast(output.logits.device.type, enabled=False):
            terms = {name: self._term(name, output, batch) for name in self.losses}
        weights = self.weights(epoch)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return loss, {name: term.detach() for name, term in terms.items()}

    def _term(self, name: str, output: StudentOutput, batch: Batch) -> Tensor:
        row, written = LOSSES[name], self.losses[name]
        if not _on_features(name):
            against = batch.targets if row.against == "targets" else getattr(batch.signals, row.against)
            return _share(row, written, getattr(output, row.student), against, batch)
        shares = []
        for feature, student, teacher in _feature_pairs(name, written, output, batch):
            try:
                shares.append(_share(row, written, student, teacher, batch))
            except ModelError as error:
                raise ModelError(f"loss '{name}': feature '{feature}': {error}") from error
        return torch.stack(shares).mean()


def _share(row: Loss, written: Mapping[str, Any], student: Tensor, against: Tensor, batch: Batch) -> Tensor:
    """What this share of the step adds to the mean over the step's valid rows."""
    function = partial(row.function, **{key: value for key, value in written.items() if key not in _BESIDE})
    if row.relational:
        rows = batch.valid
        if row.against == "targets":
            rows = rows.to(against.device, non_blocking=True) & outputs.labelled(against)
        return related(function, student, against, rows, batch.total, written.get("gather", row.gather))
    teacher = [batch.signals.logits] if row.with_teacher else []
    values = function(student, against, *teacher)
    if row.against == "targets" and batch.mixture is not None:
        values = torch.lerp(values, function(student, batch.mixture.targets, *teacher), batch.mixture.share)
    if not batch.valid.all():
        values = torch.where(batch.valid.to(values.device, non_blocking=True), values, 0.0)
    return values.sum() / batch.total


def _feature_pairs(
    name: str, written: Mapping[str, Any], output: StudentOutput, batch: Batch
) -> list[tuple[str, Tensor, Tensor]]:
    """(feature, student's tensor, teacher's tensor) of every feature that the loss reads."""
    students = output.features if LOSSES[name].student == "features" else output.projected.get(name, {})
    teachers = batch.signals.features
    known = [feature for feature in teachers if feature in students]
    pairs = []
    for feature in written.get("features", known):
        for holder, held in (("the student's", students), ("the teacher's", teachers)):
            if feature not in held:
                raise ModelError(f"loss '{name}': feature '{feature}' is not among {holder}{hint(feature, held)}")
        pairs.append((feature, students[feature], teachers[feature]))
    if not pairs:
        raise ModelError(
            f"loss '{name}': the student has features {sorted(students)} for it and the teacher {sorted(teachers)}; "
            "name the same ones in cache.features and student.taps"
        )
    return pairs


def _check_place(row: Loss, task: str, classes: int) -> None:
    """RecipeError unless the loss makes sense for the task and its number of classes."""
    if suits(row, task, classes):
        return
    others = ", ".join(name for name, other in LOSSES.items() if suits(other, task, classes)) or "none"
    if task == "regression" and row.student == "logits" and task not in row.tasks:
        raise RecipeError(
            "its softmax compares classes, or the places of a map, with each other, and the outputs of a regression "
            "are neither: a student that is off by a constant would score as if it were right; "
            f"losses that fit: {others}"
        )
    least, most = row.classes
    limit = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
    where = f" with {limit} classes, not for {task} with {classes}" if row.classes != (1, None) else f", not for {task}"
    raise RecipeError(f"is for {' and '.join(row.tasks)}{where}; losses that fit: {others}")


def _check_options(row: Loss, written: Mapping[str, Any]) -> None:
    """RecipeError unless the loss, or the Objective for it, takes these options with these values."""
    tensors = list(inspect.signature(row.function).parameters)[: 3 if row.with_teacher else 2]
    allowed = {"weight": True, "features": row.against == "features", "gather": row.relational}
    beside = [option for option, may_be in allowed.items() if may_be]
    check_options(row.function, written, given=tensors, beside=beside)
    for option in beside:
        if option in written and not fits(written[option], _BESIDE[option]):
            raise RecipeError(f"option '{option}' must be {describe(_BESIDE[option])}, not {written[option]!r}")
    for option, (least, most) in row.ranges.items():
        if written.get(option) is not None and not least <= written[option] <= most:
            raise RecipeError(f"option '{option}' must be from {least:g} to {most:g}, not {written[option]}")


def _check_features(row: Loss, written: Mapping[str, Any], features: Collection[str]) -> None:
    """RecipeError unless teacher and student have the features that the loss compares."""
    if row.against != "features":
        return
    if not features:
        raise RecipeError("needs features: name them in cache.features and student.taps alike")
    if not written.get("features", features):
        raise RecipeError("option 'features' must name at least one; leave it out to read all")
    if len(set(written.get("features", ()))) < len(written.get("features", ())):
        raise RecipeError("option 'features' names one of them twice")
    for name in written.get("features", ()):
        if name not in features:
            raise RecipeError(f"teacher and student do not both have a feature '{name}'{hint(name, features)}")


# What the Objective reads itself, and of what type it is; a weight has its own check.
_BESIDE: dict[str, Any] = {"weight": Any, "features": list[str], "gather": bool}


def _on_features(loss: str) -> bool:
    return LOSSES[loss].against == "features"


def _chosen(written: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """The features that a loss reads, in the order of `known`."""
    return [name for name in known if name in written.get("features", known)]


def _weight(written: Mapping[str, Any]) -> Any:
    return written.get("weight", 1.0)
