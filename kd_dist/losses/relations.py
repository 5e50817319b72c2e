"""What a relational loss adds to a step: the rows that it relates, on one process or on all."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def related(
    function: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    total: int,
    gather: bool,
) -> Tensor:
    """value * n / total, where `function` gives the value of n valid rows together; 0-d float32.

    student, teacher (B, ...) float; valid (B,) bool; total: the valid rows of the whole step. Without `gather` the n
    rows are this rank's. With it they are every rank's, in the order of ranks: each rank then returns its part of the
    value, the parts add up, and its gradient is the whole one by its own rows. All ranks must call it at the same time.
    Fewer than 2 rows have no relations: 0, with a gradient of 0.
    """
    if not valid.all():
        student, teacher = student[valid], teacher[valid]
    together = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    counts = _counts(student) if together else [len(student)]
    n, world = sum(counts), len(counts)
    if n < 2:
        return 0.0 * student.float().sum()
    if together:
        student, teacher = _everyone(student, counts), _everyone(teacher, counts)
    value = function(student, teacher)
    return (value - value.detach() * (1 - 1 / world)) * (n / total)  # the value in parts, the gradient whole


def _counts(rows: Tensor) -> list[int]:
    """How many rows each rank has."""
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return torch.cat(counts).tolist()


def _everyone(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all ranks, in their order; only this rank's carry a gradient."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
    parts[dist.get_rank()] = rows
    return torch.cat(parts)
