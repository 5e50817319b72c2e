"""Tasks. One file a task: how an example is encoded, decoded and checked, its metrics, what its teacher's signals say.

A task is a value: `TASKS[name](classes)`.
"""

import math

from kd_dist.tasks import classification, segmentation
from kd_dist.tasks.classification import Classification
from kd_dist.tasks.segmentation import Segmentation

Task = Classification | Segmentation
TASKS: dict[str, type[Task]] = {"classification": Classification, "segmentation": Segmentation}
METRICS = {**classification.HIGHER_IS_BETTER, **segmentation.HIGHER_IS_BETTER}  # metric: whether higher is better


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` beats `best`. Anything beats no value and NaN; NaN beats no number."""
    if best is None or math.isnan(best):
        return True
    return value > best if METRICS[metric] else value < best


def retention(metric: str, student: float, teacher: float) -> float | None:
    """The share of the teacher's metric that the student keeps (1.0 = all); None where that is undefined."""
    kept, reference = (student, teacher) if METRICS[metric] else (teacher, student)
    return kept / reference if reference > 0 else None
