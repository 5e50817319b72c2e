"""One stage of a recipe, ready to train: every part built, everything that can be wrong found."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from kd_dist import assemble, caches, checkpoint, engine, guard, manifest, places, trial
from kd_dist.average import Average
from kd_dist.batch import Batch
from kd_dist.compress import FeatureCodec
from kd_dist.config import to_dict
from kd_dist.data import Corridor
from kd_dist.engine import Engine
from kd_dist.errors import MismatchError, ModelError, TrainingError, is_out_of_memory
from kd_dist.evaluation import evaluate, first_examples
from kd_dist.loader import on_device, split_batches, to_device
from kd_dist.losses import LOSSES, Objective, signals_needed
from kd_dist.models.blocks import depths, freeze, recompute
from kd_dist.plan import shuffle_problem
from kd_dist.recipe import Monitor, Recipe, Stage
from kd_dist.signals.topk import spread_out
from kd_dist.student import Student
from kd_dist.tasks import Task
from kd_dist.teacher import Teacher


@dataclass(frozen=True)
class Run:
    """The parts of one training run; all values, nothing that changes but the tensors they hold."""

    accelerator: Accelerator
    name: str  # of the stage
    stage: Stage
    folder: Path
    identity: dict[str, Any]
    seed: int
    student: Student
    engine: Engine  # which trains it
    precision: str  # fp32, bf16 or fp16
    average: Average | None  # of what it trains
    kept: guard.Keep  # the student's buffers before the step
    once: guard.Keep | None  # likewise, before blocks run again in the backward pass
    teacher: Teacher | None  # only when it is online
    objective: Objective
    train: Corridor
    codecs: Mapping[str, FeatureCodec]  # of the features that it delivers, on the device
    validation: Corridor
    workers: int
    error_limit: int  # examples that may fail
    task: Task
    metric: str
    teacher_metrics: dict[str, float] | None  # of the cached teacher on the validation split
    shown: Batch | None  # examples of which each epoch draws a picture
    limits: Monitor
    writer: SummaryWriter | None  # on the main process

    @property
    def fp16(self) -> bool:
        return self.precision == "fp16"

    @property
    def steps(self) -> int:
        return assemble.planned_steps(self.stage, self.train)

    def averaged(self) -> AbstractContextManager:
        """Within it the student has the average of its weights, if there is one. A collective call."""
        return contextlib.nullcontext() if self.average is None else self.average.shown()

    def log(self, group: str, scalars: dict[str, float], step: int) -> None:
        """Scalars for TensorBoard."""
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)

    def warn(self, sentence: str) -> None:
        """On the console, once."""
        self.accelerator.print(sentence, file=sys.stderr, flush=True)


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
    stage, seed = recipe.stages[name], places.stage_seed(recipe, name)
    accelerator = engine.accelerator(key for key in engine.NOT_FOR_DEEPSPEED if getattr(stage, key))
    guard.check_world(accelerator.num_processes)
    trial.check_relations(recipe, name, accelerator.num_processes)
    rank, world = accelerator.process_index, accelerator.num_processes
    precision = stage.precision or engine.launched_precision()
    corridor = assemble.training_corridor(recipe, name, rank, world)
    identity, folder = assemble.stage_identity(recipe, name, corridor), places.stage_folder(recipe, name)
    validation, teachers = places.VALIDATION_SPLIT, recipe.teachers_of(stage)
    known = stage.model == "student" and are_cached(recipe, teachers, validation)
    last = checkpoint.latest(folder)
    about = {**identity, "stage": to_dict(stage), "known": known, "precision": precision}
    agree(about, "the beginning" if last is None else last.name)
    if (problem := shuffle_problem(corridor.plan.order, corridor.plan.examples_of_step)) is not None:
        accelerator.print(f"warning: {problem}", file=sys.stderr)
    teacher = assemble.online_teacher(recipe, name).to(accelerator.device) if assemble.is_online(stage) else None
    module = equipped(assemble.module(recipe, name, corridor, teacher).to(accelerator.device), stage, name)
    codecs = on_device(assemble.stage_codecs(recipe, name, corridor), accelerator.device)
    losses = assemble.stage_losses(recipe, name, corridor)
    alone = {loss: {**one, "gather": False} if LOSSES[loss].relational else one for loss, one in losses.items()}
    attempt = partial(one_step, module, teacher, codecs, Objective(alone, stage.epochs), precision, stage.sam)
    if stage.find_batch_size:
        corridor = fitting(corridor, attempt, accelerator, f"stages.{name}")
    if accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.DEEPSPEED:
        tell_unused(accelerator, attempt(first_share(corridor)) or bool(stage.unfreeze))
    # Only now: a rank that runs out of memory while one is tried would leave the others waiting for its statistics.
    module = synchronised(module, stage, name, accelerator)
    made = engine.start(accelerator, module, build_optimizer(module, stage), precision, stage.compile)
    task = assemble.task(recipe)
    evaluation = assemble.evaluation_corridor(recipe, validation, rank, world, cached=False)
    shown = assemble.evaluation_corridor(recipe, validation, 0, world, known, teachers) if task.maps else None
    return Run(
        accelerator=accelerator,
        name=name,
        stage=stage,
        folder=folder,
        identity=identity,
        seed=seed,
        student=module,
        engine=made,
        precision=precision,
        average=None if stage.ema is None else Average(made, stage.ema),
        kept=guard.Keep(module),
        once=guard.Keep(module) if stage.gradient_checkpointing else None,
        teacher=teacher,
        objective=Objective(losses, stage.epochs),
        train=corridor,
        codecs=codecs,
        validation=evaluation,
        workers=recipe.data.workers,
        error_limit=recipe.data.error_limit,
        task=task,
        metric=recipe.evaluate.metric,
        teacher_metrics=cached_teacher_metrics(recipe, validation, accelerator, teachers) if known else None,
        shown=None if shown is None else first_examples(shown),
        limits=recipe.monitor if signals_needed(stage.losses) else replace(recipe.monitor, retention_target=0.0),
        writer=SummaryWriter(folder / "tensorboard") if accelerator.is_main_process else None,
    )


def equipped(module: Student, stage: Stage, name: str) -> Student:
    """The student as the whole stage will need it: all that will ever learn learns, blocks run again in the backward
    pass, memory lies as it is asked to."""
    if stage.unfreeze:
        freeze(module.network, stage.learning(stage.epochs))
    if stage.gradient_checkpointing:
        try:
            recompute(module.network)
        except ModelError as error:
            raise ModelError(f"stages.{name}.gradient_checkpointing: {error}") from error
    if stage.channels_last:
        module.to(memory_format=torch.channels_last)
        module.network.layout = torch.channels_last
    return module


def are_cached(recipe: Recipe, teachers: Sequence[str], split: str) -> bool:
    """Whether the signals of all these teachers are there for a split."""
    return all(caches.is_cached(recipe.with_teacher(name), split) for name in teachers)


def synchronised(module: Student, stage: Stage, name: str, accelerator: Accelerator) -> Student:
    """The student, with `sync_bn` its BatchNorm statistics taken over all ranks."""
    if not stage.sync_bn or accelerator.num_processes == 1:
        return module
    if accelerator.device.type == "cpu":
        raise TrainingError(f"stages.{name}.sync_bn: PyTorch synchronises BatchNorm on GPUs only; set it to false here")
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def first_share(corridor: Corridor) -> Batch:
    """The largest micro-batch of this rank's first step."""
    plan = corridor.plan
    largest = max(range(plan.accumulate), key=lambda micro: len(plan.share(0, corridor.rank, micro)))
    return corridor[largest]


def tell_unused(accelerator: Accelerator, unused: bool) -> None:
    """DDP must be told when there are parameters without a gradient: layers above the features that are learned from,
    or an auxiliary head."""
    anywhere = accelerator.reduce(torch.tensor(float(unused), device=accelerator.device), "sum")
    accelerator.ddp_handler.find_unused_parameters = bool(anywhere)


def fitting(corridor: Corridor, attempt: Callable[[Batch], bool], accelerator: Accelerator, where: str) -> Corridor:
    """The corridor with as many micro-batches a step as it takes for each to fit into the memory of every rank.

    The examples of a step, and so the result of the run, stay what they are. `attempt` runs one micro-batch.
    """
    plan, device = corridor.plan, accelerator.device
    while True:
        tried = replace(corridor, plan=plan)
        try:
            attempt(first_share(tried))
            full = False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            full = True
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not accelerator.reduce(torch.tensor(float(full), device=device), "sum"):  # no rank ran out of it
            accelerator.print(
                f"accumulate: {plan.accumulate}, micro-batches of up to {plan.rows} examples fit", flush=True
            )
            return tried
        larger = [one for one in range(2 * plan.accumulate, plan.batch_size + 1) if not plan.batch_size % one]
        if plan.rows == 1 or not larger:
            raise TrainingError(
                f"{where}: not even {plan.rows} examples at a time fit into memory; make views.size or the model "
                f"smaller"
            )
        plan = replace(plan, accumulate=larger[0])


def one_step(
    module: Student,
    teacher: Teacher | None,
    codecs: Mapping[str, FeatureCodec],
    objective: Objective,
    precision: str,
    sam: float | None,
    batch: Batch,
) -> bool:
    """Forward and backward pass beside as much memory as DDP, the optimiser and `sam` will take; leaves nothing behind.
    Returns whether a parameter that is trained had no part in it."""
    kept = guard.Keep(module)
    kept.store()
    trained = [value for value in module.parameters() if value.requires_grad]
    ballast = [torch.empty_like(value) for value in trained for _ in range(3 if sam is None else 4)]
    try:
        batch = to_device(batch, module.network.mean.device, codecs)
        if teacher is not None:
            batch = batch._replace(signals=teacher(batch.images))
        output = engine.computed(module, batch.images, engine.DTYPES[precision])
        engine.with_gradient(objective(output, batch, 0.0)[0]).backward()
        return any(value.requires_grad and value.grad is None for value in module.parameters())
    finally:
        ballast.clear()
        module.zero_grad(set_to_none=True)
        kept.restore()


def build_optimizer(module: Student, stage: Stage) -> torch.optim.Optimizer:
    """AdamW or SGD; biases and norm parameters (one dimension) are not decayed.

    A block at distance d from the head learns with `backbone_lr * layer_decay**d`, the head (d = 0) and the projections
    with 1, times `lr`: groups of their own, whose `lr_scale` the engine heeds. The latter is layer-wise decay as BEiT
    (Bao et al., ICLR 2022, 2106.08254) fine-tunes with.
    """
    parts: dict[float, list[nn.Parameter]] = {}
    depth = depths(module.network)
    for value in (value for value in module.parameters() if value.requires_grad):
        distance = depth.get(value, 0)
        scale = (stage.backbone_lr if distance else 1.0) * stage.layer_decay**distance
        parts.setdefault(scale, []).append(value)
    groups = [
        {"params": [value for value in part if (value.ndim > 1) == decayed], "weight_decay": decay}
        | ({} if scale == 1 else {"lr_scale": scale})
        for scale, part in sorted(parts.items(), key=lambda one: one[0] == 1)  # the head's last
        for decayed, decay in ((True, stage.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed drops an empty one by itself
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.lr, momentum=stage.momentum)
    return torch.optim.AdamW(groups, lr=stage.lr)


def cached_teacher_metrics(
    recipe: Recipe, split: str, accelerator: Accelerator, teachers: Sequence[str]
) -> dict[str, float]:
    """The metrics of the teachers' cached signals, of several those of their mean: what a student is compared with,
    without a teacher."""
    rank, world = accelerator.process_index, accelerator.num_processes
    corridor = assemble.evaluation_corridor(recipe, split, rank, world, cached=True, teachers=teachers)
    device, task = accelerator.device, assemble.task(recipe)
    with split_batches(corridor, recipe.data.workers, device) as stream:
        return evaluate(lambda batch: spread_out(batch.signals.logits, task.classes), stream, task, device)
