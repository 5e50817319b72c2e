"""Metrics over a whole split, exact on any number of processes."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd_dist.batch import Batch
from kd_dist.data import Corridor
from kd_dist.errors import DataError
from kd_dist.loader import to_device
from kd_dist.tasks import Task


def evaluate(
    predict: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    task: Task,
    device: torch.device,
    error_limit: int | None = None,
) -> dict[str, float]:
    """Metrics of `predict(batch) -> (B, C) or (B, C, h, w) logits` over every valid row, once each: see `judge`."""
    return numbers(judge(predict, batches, task, device, error_limit))


def numbers(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Those of the metrics that are numbers. `name/part` is left out where it is undefined, as the IoU of a class that
    nobody saw."""
    values = {name: float(value) for name, value in found.items() if value.dim() == 0}
    return {name: value for name, value in values.items() if not ("/" in name and math.isnan(value))}


@torch.no_grad()  # not inference mode: under ZeRO 3 weights that are gathered in it could not be trained again
def judge(
    predict: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    task: Task,
    device: torch.device,
    error_limit: int | None = None,
) -> dict[str, Tensor]:
    """As `evaluate`, with curves: all that the task's metrics come to.

    The metrics hold sums, or every score; in a distributed run `compute` puts those of the ranks together, so no row is
    padded or repeated. Failed examples are left out, with a warning on stderr; more of them over all ranks than
    `error_limit` are a DataError on each.
    """
    metrics = task.metrics().to(device)
    failed, first = 0, ""
    for batch in batches:
        if batch.failed:
            failed, first = failed + len(batch.failed), first or batch.failed[0]
        empty = not batch.valid.any()
        batch = to_device(batch, device)
        logits = predict(batch)
        if not empty:  # torchmetrics refuses zero rows
            sizes = batch.sizes if batch.sizes is None else batch.sizes[batch.valid]
            groups = batch.groups if batch.groups is None else batch.groups[batch.valid]
            task.update(metrics, logits[batch.valid].float(), batch.targets[batch.valid], sizes, groups)
    failed, first, speaks = _of_all_ranks(failed, first)
    if error_limit is not None and failed > error_limit:
        raise DataError(f"{failed} examples failed, data.error_limit allows {error_limit}; the first: {first}")
    if failed and speaks:
        print(f"warning: the metrics leave out {failed} examples; the first: {first}", file=sys.stderr, flush=True)
    return metrics.compute()


def _of_all_ranks(failed: int, first: str) -> tuple[int, str, bool]:
    """How many examples failed on all ranks, the first of their sentences, and whether this rank is to say so."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return failed, first, True
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (failed, first))
    counts, sentences = zip(*everyone, strict=True)
    return sum(counts), next(filter(None, sentences), ""), torch.distributed.get_rank() == 0


def first_examples(corridor: Corridor) -> Batch:
    """As many examples of a split as its task shows in a picture."""
    return replace(corridor, plan=replace(corridor.plan, batch_size=corridor.task.shown, world=1), rank=0)[0]


def picture(task: Task, batch: Batch, predictions: dict[str, Tensor]) -> np.ndarray | None:
    """The examples of a batch beside what each of `predictions`, logits (B, C, ...) by name, makes of them:
    (height, width, 3) uint8, or None where the task has nothing to draw."""
    targets = list(batch.targets.cpu().numpy())
    if batch.sizes is not None:
        targets = [mask[:height, :width] for mask, (height, width) in zip(targets, batch.sizes.tolist(), strict=True)]
    columns = {name: list(logits.float().cpu().numpy()) for name, logits in predictions.items()}
    return task.picture(batch.images.permute(0, 2, 3, 1).cpu().numpy(), targets, columns)


def agree_on_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Give every rank rank 0's buffers: BatchNorm statistics drift apart between DDP's broadcasts, and the ranks would
    otherwise evaluate different models."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)
