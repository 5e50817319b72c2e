"""The losses a recipe may name, and the objective that weighs them against each other."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_dist.batch import Batch, StudentOutput
from kd_dist.choose import check_options, entry
from kd_dist.errors import RecipeError
from kd_dist.losses import logits
from kd_dist.losses.schedules import check_weight, weight_at
from kd_dist.losses.table import Loss

LOSSES: dict[str, Loss] = {**logits.LOSSES}


def check_losses(losses: Mapping[str, Mapping[str, Any]], task: str, classes: int) -> None:
    """Raise a RecipeError unless an Objective of `losses` makes sense for `task` with `classes` classes.

    `losses` is as a recipe writes it: loss name -> {weight: ..., **options}, the weight 1 when left out.
    """
    if not losses:
        raise RecipeError(f"no loss is named; known: {', '.join(sorted(LOSSES))}")
    for name, written in losses.items():
        row = entry(LOSSES, "loss", name)
        try:
            _check_place(row, task, classes)
            _check_options(row, written)
            check_weight(_weight(written))
        except RecipeError as error:
            raise RecipeError(f"loss '{name}': {error}") from error


def signals_needed(losses: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The TeacherSignal fields that these losses read; empty when no teacher is needed."""
    return {LOSSES[name].against for name in losses} - {"targets"}


@dataclass(frozen=True)
class Objective:
    """The weighted sum of losses that a stage minimises. `losses` is as in `check_losses`, and has passed it."""

    losses: Mapping[str, Mapping[str, Any]]
    epochs: int  # length of the run, which the weight schedules need

    def weights(self, epoch: float) -> dict[str, float]:
        """Each loss's weight at `epoch`, by loss name."""
        return {name: weight_at(_weight(written), epoch, self.epochs) for name, written in self.losses.items()}

    def __call__(self, output: StudentOutput, batch: Batch, epoch: float) -> tuple[Tensor, dict[str, Tensor]]:
        """This share's part of the step's loss, and of each unweighted term (detached, by loss name); 0-d float32.

        Both are sums over the valid rows divided by `batch.total`, the valid examples of the whole step. So the parts
        add up, over ranks and micro-batches, to the mean over the step: add them, do not average them. A row that is
        not valid adds exactly 0 to the value and to the gradient.
        """
        # A loss works in float32. Elementwise operations do so by themselves, a matrix product would not.
        with torch.autocast(batch.valid.device.type, enabled=False):
            terms = {name: self._term(name, output, batch) for name in self.losses}
        weights = self.weights(epoch)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        return loss, {name: term.detach() for name, term in terms.items()}

    def _term(self, name: str, output: StudentOutput, batch: Batch) -> Tensor:
        row = LOSSES[name]
        against = batch.targets if row.against == "targets" else getattr(batch.signals, row.against)
        values = row.function(getattr(output, row.student), against, **_options(self.losses[name]))
        return torch.where(batch.valid, values, 0.0).sum() / batch.total


def _check_place(row: Loss, task: str, classes: int) -> None:
    """RecipeError unless the loss makes sense for the task and its number of classes."""
    if _fits(row, task, classes):
        return
    least, most = row.classes
    limit = f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
    others = [name for name, other in LOSSES.items() if _fits(other, task, classes)]
    raise RecipeError(
        f"is for {' and '.join(row.tasks)} with {limit} classes, not for {task} with {classes}; "
        f"losses that fit: {', '.join(others) or 'none'}"
    )


def _fits(row: Loss, task: str, classes: int) -> bool:
    least, most = row.classes
    return task in row.tasks and least <= classes and (most is None or classes <= most)


def _check_options(row: Loss, written: Mapping[str, Any]) -> None:
    """RecipeError unless the loss takes these options with these values."""
    tensors = list(inspect.signature(row.function).parameters)[:2]
    check_options(row.function, written, given=tensors, beside=["weight"])
    for option, (least, most) in row.ranges.items():
        if option in written and not least <= written[option] <= most:
            raise RecipeError(f"option '{option}' must be from {least:g} to {most:g}, not {written[option]}")


def _weight(written: Mapping[str, Any]) -> Any:
    return written.get("weight", 1.0)


def _options(written: Mapping[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in written.items() if option != "weight"}
