"""One row of the losses table. It stands apart so that every family of losses can import it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """A loss function, what it reads, and where it makes sense.

    The function takes the student's tensor, then what it is compared with, then its options by keyword. It returns
    (B,) float32: one value an example, averaged over everything else, not yet averaged over the batch.
    """

    function: Callable[..., Tensor]
    student: str  # the StudentOutput field it reads
    against: str  # "targets" (of the Batch), or the TeacherSignal field it reads
    tasks: tuple[str, ...]  # names of the tasks it makes sense for
    classes: tuple[int, int | None]  # fewest and most classes; None: no upper limit
    ranges: dict[str, tuple[float, float]]  # numeric option -> smallest and largest value, both allowed
