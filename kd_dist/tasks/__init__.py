"""Tasks. One file a task: how an example is encoded, decoded and checked, its metrics, what its teacher's signals say.

A task is a value, which holds the kind of its input.
"""

import math
from typing import Any

from kd_dist.tasks import binary, classification, regression, segmentation
from kd_dist.tasks.classification import Classification
from kd_dist.tasks.regression import Regression
from kd_dist.tasks.segmentation import Segmentation

Task = Classification | Segmentation | Regression
TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "regression": Regression,
}
METRICS = {  # metric: whether higher is better
    **classification.HIGHER_IS_BETTER,
    **binary.HIGHER_IS_BETTER,
    **segmentation.HIGHER_IS_BETTER,
    **regression.HIGHER_IS_BETTER,
}


def metrics_of(task: str, classes: int | None) -> tuple[str, ...]:
    """The metrics of a task with so many classes, the one that it is judged by first."""
    known = TASKS[task].metrics_known
    return known if classes == 2 else tuple(metric for metric in known if metric not in binary.HIGHER_IS_BETTER)


def undefined(metric: str, where: object) -> str:
    """What to say, and what to do, where a metric has no value on a split."""
    remedy = "give it examples of both classes" if metric in binary.HIGHER_IS_BETTER else "label its examples"
    if metric == "video_auc":
        remedy = "give it videos of both classes, named by its source"
    return f"{where}: {metric} is undefined there; {remedy}, or choose another"


def packed_for(task: Task) -> dict[str, Any]:
    """What a manifest says of the task that examples were packed for; images are as they came."""
    about = {"task": task.name, "classes": task.classes}
    if isinstance(task, Regression):
        about |= {"outputs": list(task.outputs), "range": list(task.range)}
    described = task.input.described()
    return {**about, "input": described} if described else about


def is_better(metric: str, value: float, best: float | None) -> bool:
    """Whether `value` beats `best`. Anything beats no value and NaN; NaN beats no number."""
    if best is None or math.isnan(best):
        return True
    return value > best if METRICS[metric] else value < best


def retention(metric: str, student: float, teacher: float) -> float | None:
    """The share of the teacher's metric that the student keeps (1.0 = all); None where that is undefined, as beside a
    teacher who makes no error at all."""
    kept, reference = (student, teacher) if METRICS[metric] else (teacher, student)
    return kept / reference if teacher > 0 and reference > 0 else None
