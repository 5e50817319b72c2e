"""What one step is made of: forward and backward passes, the step itself or what is done in its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from kd_dist import checkpoint, guard
from kd_dist.batch import Batch, StudentOutput, valid_rows
from kd_dist.checkpoint import Progress
from kd_dist.errors import TrainingError, is_lost_contact, is_out_of_memory
from kd_dist.guard import Cause, Verdict
from kd_dist.loader import to_device
from kd_dist.meter import Share
from kd_dist.models.blocks import freeze
from kd_dist.plan import mix
from kd_dist.stage import Run


def seed_step(run: Run, step: int) -> None:
    """What is random in a step is a function of seed, step and rank: it is the same after a resume, and in a replay."""
    torch.manual_seed(int(mix(run.seed, step, run.accelerator.process_index) >> 1))


def thaw(run: Run, step: int) -> None:
    """Let the blocks learn that `unfreeze` names for the epoch of a step, and rest all others."""
    if run.stage.unfreeze:
        freeze(run.student.network, run.stage.learning(step // run.train.plan.steps_per_epoch))


class Stepped(NamedTuple):
    """What a step came to."""

    shares: list[Share]  # of its micro-batches
    verdict: Verdict  # of all ranks
    taken: bool


def run_step(run: Run, progress: Progress, stream: Iterator[tuple[Batch, float]], stopping: bool) -> Stepped:
    """A whole step: its micro-batches from the `stream`, what the ranks think of it, and the step itself, or what is
    done in its place. `stopping` is what this rank wants, for all to know."""
    stage, micros, epoch = run.stage, run.train.plan.accumulate, progress.step / run.train.plan.steps_per_epoch
    seed_step(run, progress.step)
    run.student.train()
    run.kept.store()
    shares, held = [], []
    for micro in range(micros):
        batch, waited = next(stream)
        if stage.sam is not None:
            batch = with_teacher(run, batch)  # which speaks once for both passes
            held.append(batch)
        with run.engine.accumulating(last=micro + 1 == micros):
            shares.append(learn(run, batch, waited, epoch, progress.scale))
    clip = stage.clip if stage.sam is None else None  # with SAM this gradient only shows the way up
    verdict = guard.judge(run.engine, shares, batch.total, clip, progress.scale, stopping)
    if stage.sam is not None and verdict.finite:
        shares, verdict = learn_uphill(run, progress, held, shares, verdict)
    taken = take_step(run, progress, shares, verdict, empty=verdict.failed >= batch.total)
    progress.step += 1
    return Stepped(shares, verdict, taken)


def learn(run: Run, batch: Batch, waited: float, epoch: float, scale: float) -> Share:
    """Forward and backward pass of one micro-batch, its loss scaled; returns what it left beside its gradient."""
    output, loss, terms = forward(run, batch, epoch)
    if run.once is not None:  # what runs again finds the modes of the first time, and counts once
        run.once.store()
    run.engine.backward(loss, scale)
    if run.once is not None:
        run.once.restore()
    run.student.train()  # what a forward pass has put into evaluation mode too: see Student
    peaks = output.logits.detach().abs().flatten(1).amax(1)
    keys = tuple(filter(None, batch.keys))  # a filler row has none
    return Share({"loss": loss.detach(), **terms}, peaks, keys, waited, batch.failed)


def learn_uphill(
    run: Run, progress: Progress, batches: list[Batch], first: list[Share], verdict: Verdict
) -> tuple[list[Share], Verdict]:
    """SAM (Foret et al., ICLR 2021, 2010.01412): the gradient `stage.sam` up the slope that the first pass has found
    takes its place, for the same micro-batches and the same randomness. Every rank calls it.

    Loss and BatchNorm statistics stay those of the first pass. Returns its shares, or those of the second pass when
    that is not finite, and what the ranks have agreed on.
    """
    after, second = guard.Keep(run.student), []
    run.kept.restore()
    seed_step(run, progress.step)
    epoch = progress.step / run.train.plan.steps_per_epoch
    with run.engine.uphill(run.stage.sam):
        for batch, share in zip(batches, first, strict=True):
            with run.engine.accumulating(last=batch is batches[-1]):
                second.append(learn(run, batch, share.waited, epoch, progress.scale))
    after.restore()
    found = guard.judge(run.engine, second, batches[-1].total, run.stage.clip, progress.scale, verdict.stop)
    return (first if found.finite else second), found._replace(loss=verdict.loss)


def forward(run: Run, batch: Batch, epoch: float) -> tuple[StudentOutput, Tensor, dict[str, Tensor]]:
    """Student and objective on one micro-batch; an online teacher speaks first, on the same pixels."""
    batch = with_teacher(run, batch)
    # The filler row of an empty share must not enter BatchNorm; statistics of all ranks wait for every rank.
    if len(batch.valid) == 1 and not batch.valid.item() and not run.stage.sync_bn:
        run.student.eval()
    output = run.engine.forward(batch.images)
    loss, terms = run.objective(output, batch, epoch)
    return output, loss, terms


def take_step(run: Run, progress: Progress, shares: list[Share], verdict: Verdict, empty: bool) -> bool:
    """Step, or skip on every rank; returns which. A skipped step leaves nothing behind but that it was counted.

    One that is `empty` has no example that could be read.
    """
    if verdict.failed:
        report_failed(run, progress, shares, verdict)
    spike = verdict.finite and guard.is_spike(verdict.loss, progress.recent, run.stage.spike)
    if verdict.finite and not spike and not empty:
        run.engine.step()
        if run.average is not None:
            run.average.follow(progress.step + 1 - progress.skipped)
        guard.taken(progress, verdict, run.fp16, run.stage.spike)
        return True
    run.engine.clear()
    run.kept.restore()
    if empty:
        progress.skipped += 1
        return False
    if spike:
        median = guard.median(progress.recent)
        run.warn(f"step {progress.step} is skipped: its loss {verdict.loss:.4g} is a spike, the median is {median:.4g}")
        causes = gather_object([Cause(run.accelerator.process_index, "a spike", share.keys) for share in shares])
    else:
        causes = explain(run, progress, shares)
        for cause in causes:
            run.warn(guard.sentence(progress.step, cause))
    note(run, progress.step, causes)
    if guard.skipped(progress, verdict.finite, run.fp16, bool(causes)):
        run.warn(f"step {progress.step} is skipped: the loss scale falls to {progress.scale:g}")
    reaction = guard.react(progress)
    if reaction == "slow down":
        progress.lr_factor /= 2
        run.warn(
            f"step {progress.step}: {progress.streak} steps in a row were skipped; the learning rate is halved; if "
            f"that is not enough, lower `lr` or `clip`"
        )
    if reaction == "go back":
        go_back(run, progress)
    return False


def explain(run: Run, progress: Progress, shares: list[Share]) -> list[Cause]:
    """Why a step is not finite, from all ranks: what was read, then terms of the loss, then, when these are finite,
    gradients, for which the step is done once more, with SAM both passes. Every rank calls it."""
    rank, first = run.accelerator.process_index, progress.step * run.train.plan.accumulate
    again = [valid_rows(run.train[first + micro]) for micro in range(len(shares))]
    again = [to_device(batch, run.accelerator.device, run.codecs) for batch in again]
    own = [cause for batch in again for cause in guard.wrong_data(with_teacher(run, batch), rank)]
    causes = gather_object(own + guard.wrong_terms(shares, rank))
    if causes or (run.fp16 and progress.scale > 1):  # a scale that is too high needs no explanation
        return causes
    found = gather_object(watch(run, progress, again))
    if run.stage.sam is not None and not found:
        run.engine.gradients(progress.scale)
        run.kept.restore()
        with run.engine.uphill(run.stage.sam):
            found = gather_object(watch(run, progress, again))
    run.engine.clear()
    run.kept.restore()
    return found or gather_object(guard.wrong_norm(shares, rank))


def watch(run: Run, progress: Progress, batches: list[Batch]) -> list[Cause]:
    """The gradients of one pass over a step's micro-batches that are not finite, on this rank."""
    seed_step(run, progress.step)
    found = []
    for batch in batches:
        with guard.watched(run.student) as wrong, run.engine.accumulating(last=batch is batches[-1]):
            learn(run, batch, 0.0, progress.step / run.train.plan.steps_per_epoch, progress.scale)
        found += guard.wrong_gradients(wrong, batch.keys, run.accelerator.process_index)
    return found


def with_teacher(run: Run, batch: Batch) -> Batch:
    """The batch with what an online teacher says of it, unless it has spoken."""
    if run.teacher is None or batch.signals is not None:
        return batch
    return batch._replace(signals=run.teacher(batch.images))


def note(run: Run, step: int, causes: list[Cause]) -> None:
    """Add the suspects of a step to the stage's file."""
    if run.accelerator.is_main_process and causes:
        with open(run.folder / guard.SUSPECTS, "a") as file:
            file.writelines(json.dumps(guard.record(step, cause)) + "\n" for cause in causes)


def report_failed(run: Run, progress: Progress, shares: list[Share], verdict: Verdict) -> None:
    """Name the examples that could not be read; too many are an error. Every rank calls it."""
    said = gather_object([sentence for share in shares for sentence in share.failed])
    for sentence in said:
        run.warn(f"step {progress.step} goes without an example: {sentence}")
    progress.failed += verdict.failed
    progress.failed_now += verdict.failed
    if progress.failed_now > run.error_limit:
        raise TrainingError(
            f"{progress.failed_now} examples of an epoch could not be read, more than data.error_limit "
            f"{run.error_limit}; the last: {said[-1]}"
        )


def go_back(run: Run, progress: Progress) -> None:
    """Weights and moments of the last checkpoint; the cursor goes on, past what led here."""
    last = checkpoint.latest(run.folder)
    if last is None:
        raise TrainingError(
            f"step {progress.step}: {progress.streak} steps in a row were skipped, and there is no checkpoint yet to "
            f"go back to; lower the learning rate, or look at the examples in {run.folder / guard.SUSPECTS}"
        )
    take_over(run, last)
    run.warn(f"step {progress.step}: {progress.streak} steps in a row were skipped; weights go back to {last}")


def take_over(run: Run, last: Path) -> Progress:
    """Weights and moments of a checkpoint for the engine; returns its progress. Raises TrainingError when it is damaged
    or of another model."""
    weights, moments, progress = checkpoint.load(last, run.identity)
    try:
        if run.average is not None:
            weights = run.average.load(weights)
        run.engine.load(weights, moments)
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error) or is_lost_contact(error):
            raise
        raise TrainingError(
            f"{last}: its weights are of another model than the recipe builds now ({' '.join(str(error).split())}); "
            f"restore the model's code, go on with the kd_dist that began it, or delete the folder"
        ) from error
    return progress
