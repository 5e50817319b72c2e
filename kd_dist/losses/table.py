"""One row of the losses table. It stands apart so that every family of losses can import it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """A loss function, what it reads, and where it makes sense.

    The function takes the student's tensor, then what it is compared with, then its options by keyword. It returns
    (B,) float32: one value an example, averaged over everything else, not yet averaged over the batch. A relational
    one returns a 0-d float32 instead, one value for all rows together, and sees valid rows only, at least 2.
    Where it compares features, it takes those of one name. One `with_teacher` takes (student, targets, teacher).
    """

    function: Callable[..., Tensor]
    student: str  # the StudentOutput field it reads: "logits", "features" or "projected"
    against: str  # "targets" (of the Batch), or the TeacherSignal field it reads: "logits" or "features"
    tasks: tuple[str, ...]  # names of the tasks it makes sense for
    classes: tuple[int, int | None]  # fewest and most classes; None: no upper limit
    ranges: dict[str, tuple[float, float]]  # numeric option -> smallest and largest value, both allowed
    relational: bool = False  # whether it compares the rows of a batch with each other
    gather: bool = False  # of a relational one: whether it compares those of all ranks where a recipe is silent
    # What becomes of it where the cache keeps the largest K logits: "exact", "near" (as `truncated` says), None: it
    # needs all. Its function then takes TopLogits as well.
    top: Literal["exact", "near"] | None = None
    # Of one on features: whether it sees the teacher's channels, and those of what is projected to them, through norms
    # and inner products alone, so that coordinates in any orthonormal frame give the same value.
    isometric: bool = False
    with_teacher: bool = False  # of one against targets, not relational: whether it reads the teacher's logits too
