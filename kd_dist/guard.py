"""What must not pass in silence: processes that do not know of each other, and steps that must not be taken.

A step is judged once, by all ranks together, between its backward pass and the optimiser. One that is not finite, or
whose loss is a spike, is not taken: every rank skips it and says what it was.
"""

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from kd_dist.batch import Batch, TopLogits
from kd_dist.checkpoint import Progress
from kd_dist.engine import FIRST_SCALE, SCALE_GROWS_AFTER, Engine
from kd_dist.errors import TrainingError
from kd_dist.meter import Share

LIMIT = 10  # steps in a row that are not finite: then the learning rate falls; again, weights go back; again, the end
WINDOW = 64  # steps taken last, whose median loss a spike is measured by
FIRST_JUDGED = 16  # of them before there is a median worth the name
SHOWN = 8  # keys of a micro-batch in a sentence
SUSPECTS = "suspects.jsonl"  # in a stage's folder: one line for each cause of a skipped step


class Verdict(NamedTuple):
    """What the ranks have agreed on for one step; equal on all of them."""

    loss: float  # the step's mean
    norm: float  # of the gradient
    finite: bool  # loss, terms and gradient
    failed: int  # examples that could not be read
    stop: bool  # some rank was asked to stop


class Cause(NamedTuple):
    """Why a step was skipped, in one micro-batch of one rank."""

    rank: int
    what: str  # completes "... not finite"
    keys: tuple[str, ...]  # the examples that it can lie in


def check_world(processes: int) -> None:
    """Raise a TrainingError unless the launcher started as many processes as `processes`, which know of each other.

    Without a GPU Accelerate takes each of several processes for the only one: all would write the same files.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise TrainingError(
            f"the launcher started {started} processes, of which this one knows {processes}; to use several without a "
            "GPU, set ACCELERATE_USE_CPU=true and launch with --multi_gpu"
        )


def judge(engine: Engine, shares: Sequence[Share], total: int, clip: float | None, scale: float, stop: bool) -> Verdict:
    """Agree on a step of `total` examples after its backward pass. Its gradient is then unscaled, rescaled to the
    examples that could be read, and clipped to the norm `clip`: ready for `engine.step`.

    One collective call, of five numbers; one copy to the host.
    """
    gradients, device = engine.gradients(scale), engine.accelerator.device
    norm = get_total_norm(gradients).to(device) if gradients else torch.zeros((), device=device)
    terms = torch.stack([value.to(device, torch.float32) for share in shares for value in share.terms.values()])
    own = terms.isfinite().all() if engine.sharded else terms.isfinite().all() & norm.isfinite()
    loss = torch.stack([share.terms["loss"].to(device, torch.float32) for share in shares]).sum()
    here = [loss, (~own).float(), norm.square() if engine.sharded else norm.new_zeros(())]
    # Filled there: a copy of host memory that is not pinned would wait for the device.
    here += [norm.new_full((), sum(len(share.failed) for share in shares)), norm.new_full((), stop)]
    agreed = engine.accelerator.reduce(torch.stack(here), "sum")
    if engine.sharded:
        norm = agreed[2].sqrt()
    norm_value, loss_value, bad, _, failed, stopped = torch.cat([norm.view(1), agreed]).tolist()
    finite = not bad and math.isfinite(norm_value) and math.isfinite(loss_value)
    if finite and gradients:
        rescale = total / max(total - failed, 1)  # the objective has divided by all that should have been read
        norm_value, norm = norm_value * rescale, norm * rescale
        factor = torch.clamp((clip or math.inf) / (norm + 1e-6), max=1.0) * rescale
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))
    return Verdict(loss_value, norm_value, finite, int(failed), bool(stopped))


def is_spike(loss: float, recent: Sequence[float], spike: float | None) -> bool:
    """Whether a step's loss is above `spike` times the median of the steps taken last."""
    return spike is not None and len(recent) >= FIRST_JUDGED and loss > spike * median(recent)


def median(recent: Sequence[float]) -> float:
    return statistics.median(recent)


def taken(progress: Progress, verdict: Verdict, fp16: bool, spike: float | None) -> None:
    """Count a step that was taken."""
    progress.streak = 0
    if spike is not None:
        progress.recent = [*progress.recent, verdict.loss][-WINDOW:]
    if fp16:
        progress.calm += 1
        if progress.calm % SCALE_GROWS_AFTER == 0:
            progress.scale *= 2


def skipped(progress: Progress, finite: bool, fp16: bool, explained: bool) -> bool:
    """Count a step that was skipped. With fp16 a gradient beyond its range is how the loss scale is found: such a step,
    in which nothing else is wrong (not `explained`), is no sign of trouble until the scale is spent. Returns whether it
    is one."""
    progress.skipped += 1
    finding = fp16 and not finite and not explained and progress.scale > 1
    if fp16 and not finite:
        progress.scale, progress.calm = max(progress.scale / 2, 2.0**-24), 0
    if not finding:
        progress.streak += 1
    return finding


def first_scale(fp16: bool) -> float:
    """The loss scale that a run starts with."""
    return FIRST_SCALE if fp16 else 1.0


def react(progress: Progress) -> Literal["slow down", "go back"] | None:
    """What is to be done after a skipped step: something every `LIMIT` in a row. Raises a TrainingError when neither
    half the learning rate nor the weights of the last checkpoint have helped."""
    turn, odd = divmod(progress.streak, LIMIT)
    if odd or not turn:
        return None
    if turn > 2:
        raise TrainingError(
            f"step {progress.step}: {progress.streak} steps in a row were skipped, also at half the learning rate and "
            f"from the last checkpoint; lower the learning rate, clip harder or train in fp32 or bf16, for which the "
            f"stage's folder must go, or look at the examples in its {SUSPECTS}; the last checkpoint is untouched"
        )
    return "slow down" if turn == 1 else "go back"


class Keep:
    """The buffers of a module (BatchNorm statistics) as they were before a step."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [one for one in module.buffers() if one.numel()]
        self.copies = [one.clone() for one in self.buffers]

    @torch.no_grad()
    def store(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)

    @torch.no_grad()
    def restore(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)


def wrong_terms(shares: Sequence[Share], rank: int) -> list[Cause]:
    """This rank's micro-batches in which a term is not finite; their keys, or those whose logits are not finite."""
    found = []
    for share in shares:
        bad = [name for name, value in share.terms.items() if not torch.isfinite(value)]
        if bad:
            rows = (~torch.isfinite(share.peaks)).tolist()
            keys = tuple(key for key, wrong in zip(share.keys, rows, strict=False) if wrong) or share.keys
            found.append(Cause(rank, ", ".join(bad), keys))
    return found


def wrong_data(batch: Batch, rank: int) -> list[Cause]:
    """What of a batch, as the objective gets it, is not finite: inputs, targets, the teacher's logits and features."""
    parts: dict[str, Tensor] = {"images": batch.images, "targets": batch.targets}
    if batch.signals is not None:
        logits = batch.signals.logits
        parts["teacher's logits"] = torch.cat(logits[1:], dim=1) if isinstance(logits, TopLogits) else logits
        parts |= {f"teacher's feature '{name}'": value for name, value in batch.signals.features.items()}
    found = []
    for name, value in parts.items():
        wrong = ~torch.isfinite(value.flatten(1) if value.ndim > 1 else value[:, None])
        if name == "targets" and value.ndim == 2:  # numbers: a row that has none at all has no label
            wrong &= ~wrong.all(dim=1, keepdim=True)
        rows = wrong.any(1).tolist()
        keys = tuple(key for key, wrong in zip(batch.keys, rows, strict=True) if wrong)
        if keys:
            found.append(Cause(rank, name, keys))
    return found


@contextmanager
def watched(module: nn.Module) -> Iterator[list[str]]:
    """The names of the parameters that get a non-finite gradient in a backward pass within the block, on this rank."""
    wrong: list[str] = []

    def look(name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all() and name not in wrong:
            wrong.append(name)

    handles = [
        value.register_hook(lambda gradient, name=name: look(name, gradient))
        for name, value in module.named_parameters()
        if value.requires_grad
    ]
    try:
        yield wrong
    finally:
        for handle in handles:
            handle.remove()


def wrong_gradients(names: Sequence[str], keys: tuple[str, ...], rank: int) -> list[Cause]:
    """What `watched` has found for one micro-batch."""
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [Cause(rank, f"the gradient of {names[-1]}{more}", keys)]


def wrong_norm(shares: Sequence[Share], rank: int) -> list[Cause]:
    """When nothing else is found: gradients so large that their norm is not finite, or a fault that did not repeat."""
    return [Cause(rank, "the gradient's norm", share.keys) for share in shares if share.keys]


def sentence(step: int, cause: Cause) -> str:
    """A cause as the console shows it."""
    once = list(dict.fromkeys(cause.keys))  # several views of an example may stand side by side
    keys = ", ".join(once[:SHOWN]) + (" ..." if len(once) > SHOWN else "")
    return f"step {step} is skipped: {cause.what} not finite on rank {cause.rank}; keys: {keys}"


def record(step: int, cause: Cause) -> Mapping[str, object]:
    """A cause as the file of suspects has it."""
    return {"step": step, "rank": cause.rank, "what": cause.what, "keys": list(dict.fromkeys(cause.keys))}
