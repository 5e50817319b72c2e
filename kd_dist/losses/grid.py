"""Two maps on one grid, whatever the strides of the two models.

A map is channels first, (B, C, *grid): (B, C, h, w), tokens (B, C, N), or vectors (B, C), which have no grid.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kd_dist.errors import ModelError


def on_grid(student: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, C, *own grid) float -> (B, C, *grid): bilinear where it grows, means of what a place covers where it shrinks.

    Adaptive average pooling and align_corners=False; each side by itself, and the same grid is left untouched.
    ModelError: grids differ, and are not both (h, w).
    """
    own, grid = tuple(student.shape[2:]), tuple(grid)
    if own == grid:
        return student
    if len(own) != 2 or len(grid) != 2:
        raise ModelError(
            f"the student's positions are {own} and the teacher's {grid}, and only maps of two sides can be resized; "
            "tap maps in both models, or outputs with the same number of tokens"
        )
    student = shrunk(student, grid)
    if tuple(student.shape[2:]) != grid:
        student = F.interpolate(student, grid, mode="bilinear", align_corners=False)
    return student


def shrunk(student: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, C, h, w) float -> what `on_grid` makes of it first: no side longer than in `grid`. But for rounding a 1x1
    convolution gives the same before this and after it, where it takes less."""
    meeting = tuple(map(min, student.shape[2:], grid))
    return student if tuple(student.shape[2:]) == meeting else F.adaptive_avg_pool2d(student, meeting)


def positions(tensor: Tensor) -> Tensor:
    """(B, C, *grid) -> (B, C, P), P being the number of positions: 1 for vectors."""
    return tensor.unsqueeze(-1).flatten(2)


def matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (B, C, P) float32, the student's on the teacher's grid. ModelError: they have other rows or channels."""
    check_rows(student, teacher)
    if student.shape[1] != teacher.shape[1]:
        raise ModelError(
            f"the student's tensor has {student.shape[1]} channels and the teacher's {teacher.shape[1]}; logits need "
            "one channel a class in both models, features a projection to the teacher's channels"
        )
    return positions(on_grid(student.float(), teacher.shape[2:])), positions(teacher.float())


def check_rows(student: Tensor, teacher: Tensor) -> None:
    """ModelError unless both are (B, C, *grid) with the same B."""
    if min(student.ndim, teacher.ndim) < 2 or len(student) != len(teacher):
        raise ModelError(
            f"the student's tensor has shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            "both must be (B, C, ...) with one row for each example"
        )
