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
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict

from accelerate.utils import gather_object

from kd_dist import checkpoint, guard, places
from kd_dist.batch import Batch, valid_rows
from kd_dist.checkpoint import Progress
from kd_dist.config import load
from kd_dist.disk import make_folder
from kd_dist.epoch import end_epoch
from kd_dist.errors import Preempted, TrainingError, cause, is_out_of_memory, one_sentence
from kd_dist.loader import batches, to_device
from kd_dist.meter import Meter
from kd_dist.preempt import Notice, noticed
from kd_dist.recipe import Recipe, Stage
from kd_dist.stage import Run, prepare
from kd_dist.step import run_step, take_over, thaw


def train(run: Run, progress: Progress, notice: Notice) -> None:
    """Train from `progress` to the end of the stage, evaluating and saving after each epoch, or until a signal is
    noticed: then save and raise Preempted."""
    plan, stage = run.train.plan, run.stage
    stream = read_ahead(run, progress.step * plan.accumulate)
    names = ["loss", *stage.losses]
    recent, epoch_meter = Meter(names), Meter(names, progress.so_far)
    thaw(run, progress.step)
    while progress.step < run.steps and not out_of_patience(progress, stage.patience):
        step, epoch = progress.step, progress.step / plan.steps_per_epoch
        lr = learning_rate(step - progress.skipped, stage, plan.steps_per_epoch) * progress.lr_factor
        run.engine.set_lr(lr)
        shares, verdict, taken = run_step(run, progress, stream, notice.name is not None)
        for meter in (recent, epoch_meter):
            meter.add(shares, plan.total(step), taken)
        if due(progress.step, stage.log_every):
            scalars = {**recent.report(run.accelerator), "lr": lr, "grad_norm": verdict.norm}
            log_step(run, progress, scalars, epoch)
            recent = Meter(names)
        whole = due(progress.step, plan.steps_per_epoch)  # else `max_steps` may cut the epoch, and be raised later
        if whole or progress.step == run.steps:
            end_epoch(run, progress, epoch_meter.report(run.accelerator) | {"lr": lr, "grad_norm": verdict.norm})
            thaw(run, progress.step)
            recent = Meter(names)
        if whole or progress.step == run.steps or due(progress.step, stage.checkpoint_every) or verdict.stop:
            progress.so_far = None if whole else epoch_meter.state(run.accelerator)
            epoch_meter = Meter(names) if whole else epoch_meter
            progress.failed_now = 0 if whole else progress.failed_now
            saved = save(run, progress)
        if verdict.stop and progress.step < run.steps:
            name = notice.name or "a signal to another process"
            what = "which is saved" if saved else "which could not be saved"
            done = f"{run.name}: stopped by {name} after step {progress.step}, {what}; the same command goes on"
            run.accelerator.end_training()
            raise Preempted(done if run.accelerator.is_main_process else "")


def due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is due after `step` steps."""
    return every is not None and step % every == 0


def learning_rate(step: int, stage: Stage, steps_per_epoch: int) -> float:
    """Linear warm-up over `warmup_epochs` to `lr`, then a cosine that ends in `min_lr` one step after the last.

    With `cycle_epochs` the cosine ends there after so many epochs and begins again at `lr`, each time `cycle_factor`
    times as long: SGDR (Loshchilov and Hutter, ICLR 2017, 1608.03983), with T_0 and T_mult.
    """
    warmup, total = stage.warmup_epochs * steps_per_epoch, stage.epochs * steps_per_epoch
    if step < warmup:
        return stage.lr * min((step + 1) / warmup, 1.0)
    since, length = step - warmup, max(total - warmup, 1)
    if stage.cycle_epochs is not None:
        length = stage.cycle_epochs * steps_per_epoch
        while since >= length:
            since, length = since - length, length * stage.cycle_factor
    share = since / length
    return stage.min_lr + (stage.lr - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def out_of_patience(progress: Progress, patience: int | None) -> bool:
    return patience is not None and len(progress.history) - 1 - progress.best_epoch >= patience > 0


def read_ahead(run: Run, cursor: int) -> Iterator[tuple[Batch, float]]:
    """Batches on the device from micro-batch `cursor` on, each with the seconds that the loop waited for it."""
    device = run.accelerator.device
    stream = batches(run.train, cursor, len(run.train), run.workers, pin=device.type == "cuda")
    while True:
        began = time.perf_counter()
        batch = next(stream, None)
        if batch is None:
            return
        waited = time.perf_counter() - began
        yield to_device(valid_rows(batch), device, run.codecs), waited


def log_step(run: Run, progress: Progress, scalars: dict[str, float], epoch: float) -> None:
    """Means since the last time, for TensorBoard."""
    more = {"skipped": progress.skipped, "failed": progress.failed}
    if run.fp16:
        more["loss_scale"] = progress.scale
    weights = {f"weight/{name}": weight for name, weight in run.objective.weights(epoch).items()}
    run.log("train", scalars | more | weights, progress.step)


def save(run: Run, progress: Progress) -> bool:
    """A checkpoint by the main process, unless the weights are not finite; returns whether. The other processes wait,
    so that none runs ahead of what is durable."""
    weights, moments = run.engine.weights(), run.engine.moments()
    if run.average is not None:
        weights = weights | run.average.weights()
    wrong = checkpoint.unsound(weights)
    if wrong is not None:
        run.warn(f"step {progress.step}: no checkpoint, since '{wrong}' is not finite; the last one is kept")
    elif run.accelerator.is_main_process:
        checkpoint.save(run.folder, weights, moments, progress, run.identity)
        checkpoint.settle_best(run.folder / places.BEST, progress.best_sha256)
    run.accelerator.wait_for_everyone()
    return wrong is None


def resume(run: Run) -> Progress:
    """The progress of the last checkpoint, whose weights and moments the engine then has; else the beginning's."""
    last = checkpoint.latest(run.folder)
    if last is None:
        return Progress(scale=guard.first_scale(run.fp16), precision=run.precision)
    progress = take_over(run, last)
    check_best(run, progress)
    if run.accelerator.is_main_process:
        checkpoint.keep_only(last)  # a run that was killed may have left an older one
    run.accelerator.print(f"{run.name}: goes on from {last}", flush=True)
    if progress.precision != run.precision:
        run.warn(f"warning: {run.name}: was trained in {progress.precision} so far and goes on in {run.precision}")
        progress.precision, progress.scale, progress.calm = run.precision, guard.first_scale(run.fp16), 0
    return progress


def check_best(run: Run, progress: Progress) -> None:
    """Raise a TrainingError when the best weights are not those that the checkpoint tells of. Every rank calls it."""
    best, said = run.folder / places.BEST, None
    if run.accelerator.is_main_process:
        checkpoint.settle_best(best, progress.best_sha256)
        try:
            if progress.best is not None:
                checkpoint.best_digest(best, progress.best_sha256)
        except TrainingError as error:
            said = str(error)
    said = gather_object([said])[0]
    if said is not None:
        raise TrainingError(said)


def check_end(run: Run, progress: Progress) -> None:
    """Raise a TrainingError when what was trained is worth nothing, warn when it is worth little; on every rank."""
    wrong = checkpoint.unsound(run.engine.weights())
    if wrong is not None or progress.best is None or progress.skipped >= progress.step:
        why = f"'{wrong}' is not finite" if wrong else f"{progress.skipped} of {progress.step} steps were skipped"
        raise TrainingError(
            f"stages.{run.name}: ended with nothing to keep, since {why}; lower the learning rate, clip harder or "
            f"train in fp32 or bf16, look at {run.folder / guard.SUSPECTS}, then delete {run.folder} and train again"
        )
    if 2 * progress.skipped > progress.step:
        run.warn(
            f"warning: stages.{run.name}: {progress.skipped} of {progress.step} steps were skipped, so what was kept "
            f"has hardly been trained; look at {run.folder / guard.SUSPECTS}"
        )


def run_stage(recipe: Recipe, name: str) -> None:
    """Train a stage to its end, from its last checkpoint if there is one, and write `result.json`."""
    with noticed() as notice:
        run = prepare(recipe, name)
        make_folder(run.folder)
        accelerator, progress = run.accelerator, resume(run)
        if accelerator.is_main_process and progress.step < run.steps:  # `max_steps` was raised: it is not done any more
            (run.folder / places.RESULT).unlink(missing_ok=True)
        try:
            train(run, progress, notice)
            check_end(run, progress)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(out_of_memory(run, error)) from error
        if accelerator.is_main_process:
            result = {"identity": run.identity, "steps": run.steps, "metric": run.metric, **asdict(progress)}
            checkpoint.write_atomic(run.folder / places.RESULT, json.dumps(result, indent=1, sort_keys=True))
            run.writer.close()
        lost = f", {progress.skipped} of them skipped" if progress.skipped else ""
        lost += f", {progress.failed} times without an example that could not be read" if progress.failed else ""
        best = f"best {run.metric} {progress.best:.4f}"
        accelerator.print(f"{name}: done after {progress.step} steps{lost}, {best}", flush=True)
        accelerator.end_training()


def out_of_memory(run: Run, error: BaseException) -> str:
    """What to change, in one sentence."""
    plan, (height, width) = run.train.plan, run.train.policy.size
    find = "" if run.stage.find_batch_size else ", or let `find_batch_size: true` do it"
    return (
        f"stages.{run.name}: out of memory with {plan.rows} examples at a time ({cause(error)}): raise `accumulate`, "
        f"now {plan.accumulate}{find}; or make `batch_size` {plan.batch_size} or views.size {height}x{width} smaller; "
        f"the last checkpoint is untouched"
    )


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
