"""Metrics over a whole split, exact on any number of processes."""

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd_dist.batch import Batch
from kd_dist.data import to_device
from kd_dist.tasks import classification as task


@torch.inference_mode()
def evaluate(
    predict: Callable[[Batch], Tensor], batches: Iterable[Batch], classes: int, device: torch.device
) -> dict[str, float]:
    """Metrics of `predict(batch) -> (B, C) logits` over every valid row, once each.

    The metrics hold sums; in a distributed run `compute` adds them over the ranks, so no row is padded or repeated.
    """
    metrics = task.metrics(classes).to(device)
    for batch in batches:
        empty = not batch.valid.any()
        batch = to_device(batch, device)
        logits = predict(batch)
        if not empty:  # torchmetrics refuses zero rows
            metrics.update(logits[batch.valid].float(), batch.targets[batch.valid])
    return {name: float(value) for name, value in metrics.compute().items()}


def agree_on_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Give every rank rank 0's buffers: BatchNorm statistics drift apart between DDP's broadcasts, and the ranks would
    otherwise evaluate different models."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)
