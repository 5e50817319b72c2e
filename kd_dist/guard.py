"""What must not pass in silence: processes that do not know of each other, and non-finite steps (agree, skip, say what
it was, stop when it does not pass)."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_dist.errors import TrainingError
from kd_dist.meter import Share

LIMIT = 10  # non-finite steps in a row before the run stops


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


def is_finite(grad_norm: Tensor) -> bool:
    """Whether the step may be taken, the same on every rank: the averaged gradient's norm is non-finite on all of them
    when a loss, a signal or a gradient is non-finite on any one."""
    return bool(torch.isfinite(grad_norm))


def diagnose(step: int, rank: int, shares: Sequence[Share]) -> list[str]:
    """A sentence for each of this rank's micro-batches that holds a cause; on rank 0 one sentence in any case."""
    found = []
    for share in shares:
        bad = [name for name, value in share.terms.items() if not torch.isfinite(value)]
        if bad:
            keys = ", ".join(share.keys[:8]) + (" ..." if len(share.keys) > 8 else "")
            found.append(f"step {step} is skipped: {', '.join(bad)} not finite on rank {rank}; keys: {keys}")
    if not found and rank == 0:
        found.append(f"step {step} is skipped: the gradient is not finite, though every loss term of rank 0 is")
    return found


def check_streak(step: int, streak: int) -> None:
    """Raise a TrainingError when too many steps in a row were not finite."""
    if streak >= LIMIT:
        raise TrainingError(
            f"step {step}: {streak} steps in a row had a non-finite gradient; lower the learning rate, clip harder or "
            f"train in fp32 or bf16; the last checkpoint is untouched"
        )
