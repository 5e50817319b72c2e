"""The end of an epoch: evaluate, record, warn, keep the best weights, draw, print."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from kd_dist import checkpoint, monitor, places
from kd_dist.checkpoint import Progress
from kd_dist.errors import DataError, TrainingError, cause, is_out_of_memory
from kd_dist.evaluation import agree_on_buffers, evaluate, picture
from kd_dist.loader import split_batches
from kd_dist.losses import Objective
from kd_dist.stage import Run
from kd_dist.tasks import is_better, retention, undefined


def end_epoch(run: Run, progress: Progress, means: dict[str, float]) -> None:
    """Evaluate, record, warn, and keep the weights when they are the best so far. Every rank calls it."""
    accelerator = run.accelerator
    agree_on_buffers(accelerator, run.student)
    with run.averaged():
        agree_on_buffers(accelerator, run.student)
        judge_epoch(run, progress, means)


def judge_epoch(run: Run, progress: Progress, means: dict[str, float]) -> None:
    """The same for the weights that the student now has: with `ema` their average."""
    accelerator, metric = run.accelerator, run.metric
    values = run_evaluation(run)
    if math.isnan(values[metric]) and math.isfinite(values.get("nll", math.nan)):  # the model says something
        raise DataError(f"{undefined(metric, run.validation.examples.folder)} evaluate.metric")
    epoch = -(-progress.step // run.train.plan.steps_per_epoch) - 1
    record = {
        "epoch": epoch,
        "step": progress.step,
        **means,
        "skipped": progress.skipped,
        **{f"val_{name}": value for name, value in values.items()},
    }
    if run.teacher_metrics is not None:
        record[f"teacher_{metric}"] = run.teacher_metrics[metric]
        record["retention"] = retention(metric, values[metric], run.teacher_metrics[metric])
    # Means of no step, a norm that was not finite: null, which JSON knows.
    record = {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}
    if progress.history and progress.history[-1]["epoch"] == epoch:  # it was cut by `max_steps`, and went on
        progress.history.pop()
    progress.history.append(record)
    if math.isfinite(values[metric]) and is_better(metric, values[metric], progress.best):
        weights = run.engine.weights()
        if checkpoint.unsound(weights) is None:  # a model that says nothing may still be right by chance
            progress.best, progress.best_epoch = values[metric], len(progress.history) - 1
            if accelerator.is_main_process:
                progress.best_sha256 = checkpoint.save_best(backbone(weights), run.folder / places.BEST)
    run.log("epoch", {name: value for name, value in record.items() if value is not None}, progress.step)
    draw(run, progress.step)
    who = f"{run.name}, seed {run.seed}"
    accelerator.print(f"{who}: {console_line(record, run.stage.epochs, run.objective, metric)}", flush=True)
    for warning in monitor.warnings(progress.history, **asdict(run.limits)):
        run.warn(f"warning: {warning}")
    slow = monitor.waiting(progress.history, run.workers)
    if slow is not None:
        run.warn(f"hint: {slow}")


def backbone(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the student's own model, without the projections that it is trained with."""
    prefix = "network.backbone."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode, put back afterwards."""
    module.eval()
    try:
        yield module
    finally:
        module.train()


def run_evaluation(run: Run) -> dict[str, float]:
    """The student's metrics on the validation split, exact over all ranks, in float32."""
    device, rows = run.accelerator.device, run.validation.plan.rows
    try:
        with evaluating(run.student) as student, split_batches(run.validation, run.workers, device) as stream:
            return evaluate(lambda batch: student(batch.images).logits, stream, run.task, device, run.error_limit)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"stages.{run.name}: out of memory while {rows} examples are evaluated at a time ({cause(error)}); make "
            f"views.size or the model smaller; the last checkpoint is untouched"
        ) from error


def draw(run: Run, step: int) -> None:
    """Image, truth, cached teacher and student side by side, for TensorBoard, where the task has such a picture."""
    if run.shown is None:
        return
    with evaluating(run.student) as student, torch.no_grad():  # on every rank: its weights may be spread over them
        said = student(run.shown.images.to(run.accelerator.device)).logits
    if run.writer is not None:
        columns = {run.stage.model: said}
        if run.shown.signals is not None:
            columns = {"cached teacher": run.shown.signals.logits, **columns}
        run.writer.add_image("epoch/examples", picture(run.task, run.shown, columns), step, dataformats="HWC")


def console_line(record: dict[str, Any], epochs: int, objective: Objective, metric: str) -> str:
    """An epoch's record as the terminal shows it."""
    number = {name: math.nan if value is None else value for name, value in record.items()}
    terms = " ".join(f"{name} {number[name]:.4f}" for name in objective.losses)
    line = f"epoch {record['epoch'] + 1}/{epochs}  loss {number['loss']:.4f} ({terms})  lr {record['lr']:.2e}"
    line += f"  grad {number['grad_norm']:.2f}  {record['examples_per_second']:,.0f} ex/s"
    line += f"  skipped {record['skipped']}" if record["skipped"] else ""
    line += f"  wait {record['data_wait']:.0%}  val {metric} {number[f'val_{metric}']:.4f}"
    if record.get("retention") is not None:
        line += f"  teacher {number[f'teacher_{metric}']:.4f}  retention {record['retention']:.1%}"
    return line
