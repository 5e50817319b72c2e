"""Train one stage of a recipe: `accelerate launch kd_dist/train.py RECIPE --stage NAME [key.path=value ...]`.

The loop is flat. Randomness, learning rate and the examples of a step are pure functions of the step, so what changes
is one `Progress`, and a resumed run continues bit for bit.
"""

import os
import sys

if __name__ == "__main__":
    # The launcher put this file's folder first: a user's own `models` or `data` package must resolve to theirs.
    sys.path[0] = os.getcwd()

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from kd_dist import assemble, checkpoint, guard, manifest, monitor, trial
from kd_dist.batch import Batch, StudentOutput
from kd_dist.checkpoint import Progress
from kd_dist.config import load, to_dict
from kd_dist.data import Corridor, batches, on_device, to_device
from kd_dist.errors import MismatchError, TrainingError, one_sentence
from kd_dist.evaluation import agree_on_buffers, evaluate, first_examples, picture
from kd_dist.losses import Objective
from kd_dist.meter import Meter, Share
from kd_dist.plan import mix, shuffle_problem
from kd_dist.recipe import Monitor, Recipe, Stage
from kd_dist.student import Student
from kd_dist.tasks import Task, is_better, retention
from kd_dist.teacher import Teacher


@dataclass(frozen=True)
class Run:
    """The parts of one training run; all values, nothing that changes but the tensors they hold."""

    accelerator: Accelerator
    stage: Stage
    folder: Path
    identity: dict[str, Any]
    seed: int
    model: nn.Module  # prepared
    optimizer: Any  # prepared
    teacher: Teacher | None  # only when it is online
    objective: Objective
    train: Corridor
    validation: Corridor
    workers: int
    task: Task
    metric: str
    teacher_metrics: dict[str, float] | None  # of the cached teacher on the validation split
    shown: Batch | None  # examples of which each epoch draws a picture, on the main process
    limits: Monitor
    writer: SummaryWriter | None  # on the main process

    @property
    def student(self) -> Student:
        return self.accelerator.unwrap_model(self.model)

    @property
    def steps(self) -> int:
        return assemble.planned_steps(self.stage, self.train)


def train(run: Run, progress: Progress) -> None:
    """Train from `progress` to the end of the stage, evaluating and saving after each epoch."""
    plan, stage, accelerator = run.train.plan, run.stage, run.accelerator
    stream = read_ahead(run, progress.step * plan.accumulate)
    names = ["loss", *stage.losses]
    recent, epoch_meter = Meter(names), Meter(names)
    while progress.step < run.steps and not out_of_patience(progress, stage.patience):
        step, epoch = progress.step, progress.step / plan.steps_per_epoch
        torch.manual_seed(int(mix(run.seed, step, accelerator.process_index) >> 1))
        lr = learning_rate(step, stage, plan.steps_per_epoch)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.model.train()
        shares = []
        for micro in range(stage.accumulate):
            batch, waited = next(stream)
            hold = accelerator.no_sync(run.model) if micro + 1 < stage.accumulate else contextlib.nullcontext()
            with hold:
                output, loss, terms = forward(run, batch, epoch)
                # Shares add up to the step's mean; DDP averages over the ranks instead of adding.
                accelerator.backward(loss * accelerator.num_processes)
            shares.append(
                Share({"loss": loss.detach(), **terms}, output.logits.detach().abs().max(), batch.keys, waited)
            )
        grad_norm, taken = take_step(run, progress, shares)
        for meter in (recent, epoch_meter):
            meter.add(shares, plan.total(step), taken)
        progress.step += 1
        if due(progress.step, stage.log_every):
            scalars = {
                **recent.report(accelerator),
                "lr": lr,
                "grad_norm": float(grad_norm),
                "skipped": progress.skipped,
            }
            log(run, "train", scalars | weight_scalars(run, epoch), progress.step)
            recent = Meter(names)
        epoch_over = due(progress.step, plan.steps_per_epoch) or progress.step == run.steps
        if epoch_over:
            end_epoch(run, progress, epoch_meter.report(accelerator) | {"lr": lr, "grad_norm": float(grad_norm)})
            recent, epoch_meter = Meter(names), Meter(names)
        if epoch_over or due(progress.step, stage.checkpoint_every):
            save(run, progress)


def due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is due after `step` steps."""
    return every is not None and step % every == 0


def learning_rate(step: int, stage: Stage, steps_per_epoch: int) -> float:
    """Linear warm-up over `warmup_epochs` to `lr`, then a cosine that ends in `min_lr` one step after the last."""
    warmup, total = stage.warmup_epochs * steps_per_epoch, stage.epochs * steps_per_epoch
    if step < warmup:
        return stage.lr * min((step + 1) / warmup, 1.0)
    share = (step - warmup) / max(total - warmup, 1)
    return stage.min_lr + (stage.lr - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def out_of_patience(progress: Progress, patience: int | None) -> bool:
    return patience is not None and len(progress.history) - 1 - progress.best_epoch >= patience > 0


def read_ahead(run: Run, cursor: int) -> Iterator[tuple[Batch, float]]:
    """Batches on the device from micro-batch `cursor` on, each with the seconds that the loop waited for it."""
    device = run.accelerator.device
    codecs = on_device(run.train.codecs, device)
    stream = batches(run.train, cursor, len(run.train), run.workers, pin=device.type == "cuda")
    while True:
        began = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            return
        waited = time.perf_counter() - began
        yield to_device(batch, device, codecs), waited


def forward(run: Run, batch: Batch, epoch: float) -> tuple[StudentOutput, Tensor, dict[str, Tensor]]:
    """Student and objective on one micro-batch; an online teacher speaks first, on the same pixels."""
    if run.teacher is not None:
        batch = batch._replace(signals=run.teacher(batch.images))
    if len(batch.valid) == 1 and not batch.valid.item():
        run.model.eval()  # the filler row of an empty share must not enter BatchNorm
    output = run.model(batch.images)
    run.model.train()  # what a forward pass has put into evaluation mode too: see Student
    loss, terms = run.objective(output, batch, epoch)
    return output, loss, terms


def take_step(run: Run, progress: Progress, shares: list[Share]) -> tuple[Tensor, bool]:
    """Clip and step, or skip on every rank when the gradient is not finite. Returns its norm, () float, and which."""
    accelerator = run.accelerator
    norm = accelerator.clip_grad_norm_(run.model.parameters(), run.stage.clip or math.inf)
    finite = guard.is_finite(norm)
    # With fp16 the scaler itself skips the step and lowers the scale; it must see every step to do so.
    if finite or accelerator.scaler is not None:
        run.optimizer.step()
    run.optimizer.zero_grad()
    progress.streak = 0 if finite else progress.streak + 1
    if not finite:
        progress.skipped += 1
        for sentence in guard.diagnose(progress.step, accelerator.process_index, shares):
            print(sentence, file=sys.stderr, flush=True)
        guard.check_streak(progress.step, progress.streak)
    return norm, finite


def end_epoch(run: Run, progress: Progress, means: dict[str, float]) -> None:
    """Evaluate, record, warn, and keep the weights when they are the best so far."""
    accelerator, metric = run.accelerator, run.metric
    agree_on_buffers(accelerator, run.student)
    values = run_evaluation(run)
    epoch = -(-progress.step // run.train.plan.steps_per_epoch) - 1
    record = {
        "epoch": epoch,
        "step": progress.step,
        **means,
        **{f"val_{name}": value for name, value in values.items()},
    }
    if run.teacher_metrics is not None:
        record[f"teacher_{metric}"] = run.teacher_metrics[metric]
        record["retention"] = retention(metric, values[metric], run.teacher_metrics[metric])
    progress.history.append(record)
    if is_better(metric, values[metric], progress.best):
        progress.best, progress.best_epoch = values[metric], len(progress.history) - 1
        if accelerator.is_main_process:
            checkpoint.save_weights(run.student.network.backbone, run.folder / assemble.BEST)
    log(run, "epoch", {name: value for name, value in record.items() if value is not None}, progress.step)
    draw(run, progress.step)
    accelerator.print(console_line(record, run.stage.epochs, run.objective, metric), flush=True)
    for warning in monitor.warnings(progress.history, **asdict(run.limits)):
        accelerator.print(f"warning: {warning}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """The module in evaluation mode, put back afterwards."""
    module.eval()
    try:
        yield module
    finally:
        module.train()


def run_evaluation(run: Run) -> dict[str, float]:
    """The student's metrics on the validation split, exact over all ranks."""
    stream = batches(run.validation, 0, len(run.validation), 0, pin=False)
    with evaluating(run.student) as student:
        return evaluate(lambda batch: student(batch.images).logits, stream, run.task, run.accelerator.device)


def draw(run: Run, step: int) -> None:
    """Image, truth, cached teacher and student side by side, for TensorBoard, where the task has such a picture."""
    if run.shown is not None:
        with evaluating(run.student) as student, torch.inference_mode():
            said = student(run.shown.images.to(run.accelerator.device)).logits
        columns = {run.stage.model: said}
        if run.shown.signals is not None:
            columns = {"cached teacher": run.shown.signals.logits, **columns}
        run.writer.add_image("epoch/examples", picture(run.task, run.shown, columns), step, dataformats="HWC")


def console_line(record: dict[str, Any], epochs: int, objective: Objective, metric: str) -> str:
    """An epoch's record as the terminal shows it."""
    terms = " ".join(f"{name} {record[name]:.4f}" for name in objective.losses)
    line = f"epoch {record['epoch'] + 1}/{epochs}  loss {record['loss']:.4f} ({terms})  lr {record['lr']:.2e}"
    line += f"  grad {record['grad_norm']:.2f}  {record['examples_per_second']:,.0f} ex/s"
    line += f"  wait {record['data_wait']:.0%}  val {metric} {record[f'val_{metric}']:.4f}"
    if record.get("retention") is not None:
        line += f"  teacher {record[f'teacher_{metric}']:.4f}  retention {record['retention']:.1%}"
    return line


def weight_scalars(run: Run, epoch: float) -> dict[str, float]:
    return {f"weight/{name}": weight for name, weight in run.objective.weights(epoch).items()}


def log(run: Run, group: str, scalars: dict[str, float], step: int) -> None:
    if run.writer is not None:
        for name, value in scalars.items():
            run.writer.add_scalar(f"{group}/{name}", value, step)


def save(run: Run, progress: Progress) -> None:
    """A checkpoint by the main process; the others wait, so that none runs ahead of what is durable."""
    accelerator = run.accelerator
    if accelerator.is_main_process:
        raw = run.optimizer.optimizer
        checkpoint.save(run.folder, run.student, raw, accelerator.scaler, progress, run.identity)
    accelerator.wait_for_everyone()


def agree(about: dict[str, Any], cursor: str) -> None:
    """Raise a MismatchError unless every rank holds the same data, plan, recipe and cursor.

    It must be the first collective call of a run: ranks that differ would hang in any other.
    """
    everyone = gather_object([(manifest.digest(manifest.plain(about)), cursor)])
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise MismatchError(
                f"rank {rank} starts from {other[1]} with recipe and data {other[0][:12]}, rank 0 from "
                f"{everyone[0][1]} with {everyone[0][0][:12]}; give every node the same recipe, shards and runs folder"
            )


def prepare(recipe: Recipe, name: str) -> Run:
    """Build every part of a stage. Everything that can be wrong with the recipe and the data is found here."""
    stage, seed = recipe.stages[name], assemble.stage_seed(recipe, name)
    precision = {None: None, "fp32": "no"}.get(stage.precision, stage.precision)
    # Losses on features alone leave the layers above them without a gradient, which DDP must be told.
    whole = DistributedDataParallelKwargs(find_unused_parameters=not assemble.reads_logits(stage))
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[whole])
    guard.check_world(accelerator.num_processes)
    trial.check_relations(recipe, name, accelerator.num_processes)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would train in fp32
        raise TrainingError(f"stages.{name}.precision: fp16 needs a GPU; use bf16 or fp32 here")
    rank, world = accelerator.process_index, accelerator.num_processes
    corridor = assemble.training_corridor(recipe, name, rank, world)
    identity, folder = assemble.stage_identity(recipe, name, corridor), assemble.stage_folder(recipe, name)
    validation = assemble.VALIDATION_SPLIT
    known = stage.model == "student" and manifest.finished(assemble.signals_folder(recipe, validation)) is not None
    last = checkpoint.latest(folder)
    agree({**identity, "stage": to_dict(stage), "known": known}, "the beginning" if last is None else last.name)
    problem = shuffle_problem(corridor.plan.order, stage.batch_size)
    if problem is not None:
        accelerator.print(f"warning: {problem}", file=sys.stderr)
    teacher = None
    if assemble.is_online(stage):
        teacher = assemble.teacher(recipe, assemble.stage_features(recipe, name)).to(accelerator.device)
    module = assemble.module(recipe, name, corridor, teacher)
    model, optimizer = accelerator.prepare(module, build_optimizer(module, stage))
    task = assemble.task(recipe)
    shown = task.maps and accelerator.is_main_process
    return Run(
        accelerator=accelerator,
        stage=stage,
        folder=folder,
        identity=identity,
        seed=seed,
        model=model,
        optimizer=optimizer,
        teacher=teacher,
        objective=Objective(stage.losses, stage.epochs),
        train=corridor,
        validation=assemble.evaluation_corridor(recipe, validation, rank, world, cached=False),
        workers=recipe.data.workers,
        task=task,
        metric=recipe.evaluate.metric,
        teacher_metrics=cached_teacher_metrics(recipe, validation, accelerator) if known else None,
        shown=first_examples(assemble.evaluation_corridor(recipe, validation, 0, world, known)) if shown else None,
        limits=recipe.monitor,
        writer=SummaryWriter(folder / "tensorboard") if accelerator.is_main_process else None,
    )


def build_optimizer(module: nn.Module, stage: Stage) -> torch.optim.Optimizer:
    """AdamW or SGD; biases and norm parameters (one dimension) are not decayed."""
    trained = [value for value in module.parameters() if value.requires_grad]
    groups = [
        {"params": [value for value in trained if value.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [value for value in trained if value.ndim <= 1], "weight_decay": 0.0},
    ]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=stage.momentum)
    return torch.optim.AdamW(groups, lr=stage.lr)


def cached_teacher_metrics(recipe: Recipe, split: str, accelerator: Accelerator) -> dict[str, float]:
    """The metrics of the teacher's cached signals: what a student is compared with, without a teacher."""
    corridor = assemble.evaluation_corridor(
        recipe, split, accelerator.process_index, accelerator.num_processes, cached=True
    )
    stream = batches(corridor, 0, len(corridor), 0, pin=False)
    return evaluate(lambda batch: batch.signals.logits, stream, assemble.task(recipe), accelerator.device)


def run_stage(recipe: Recipe, name: str) -> None:
    """Train a stage to its end, from its last checkpoint if there is one, and write `result.json`."""
    run = prepare(recipe, name)
    run.folder.mkdir(parents=True, exist_ok=True)
    accelerator = run.accelerator
    progress = Progress()
    last = checkpoint.latest(run.folder)
    if last is not None:
        raw = run.optimizer.optimizer
        progress = checkpoint.load(last, run.student, raw, accelerator.scaler, run.identity)
        accelerator.print(f"{name}: goes on from {last}", flush=True)
    train(run, progress)
    if accelerator.is_main_process:
        result = {"identity": run.identity, "steps": run.steps, "metric": run.metric, **asdict(progress)}
        checkpoint.write_atomic(run.folder / assemble.RESULT, json.dumps(result, indent=1, sort_keys=True))
        run.writer.close()
    accelerator.print(f"{name}: done after {progress.step} steps, best {run.metric} {progress.best:.4f}", flush=True)
    accelerator.end_training()


def main(arguments: list[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch kd_dist/train.py",
        description="Train one stage of a recipe, from its last checkpoint if there is one.",
        epilog="example: accelerate launch kd_dist/train.py configs/digits.yaml --stage distill train.lr=3e-4",
    )
    parser.add_argument("recipe", help="the recipe, a YAML file")
    parser.add_argument("--stage", required=True, help="a stage of the recipe")
    parser.add_argument("overrides", nargs="*", help="key.path=value; train.KEY is the stage's own KEY")
    given = parser.parse_intermixed_args(arguments)
    run_stage(load(given.recipe, given.overrides, stage=given.stage), given.stage)


if __name__ == "__main__":
    with one_sentence():
        main()
