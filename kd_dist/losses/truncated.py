"""Losses against a teacher of whose logits the cache keeps the largest K: none of the others is made up.

The K classes are compared one by one and the rest as one class: its mass is known for the teacher (`signals.topk`) and
summed for the student, in the logarithm, so that it may be as small as float32 can tell. That is the KL of both
distributions after the same merging, so it is at most the KL of all classes, and both are least where the student says
what the teacher does. Its gradient is that of all classes with the teacher's tail spread as the student's own; how
far that is off is measured when the cache is made (`gradient_error` in its manifest).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dist.batch import TopLogits
from kd_dist.errors import ModelError
from kd_dist.signals.topk import tail_at


def merged(student: Tensor, teacher: TopLogits, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits (B, C) float and a teacher's K of them -> both as (B, K + 1) float32 logits at `temperature`, the last one
    that of all other classes together. ModelError: rows differ, or there are not more than K classes."""
    ids, kept, tail = teacher
    check(student, teacher)
    scaled = student.float() / temperature
    rest = scaled.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    own = torch.cat([scaled.gather(1, ids), rest], dim=1)
    return own * temperature, torch.cat([kept, temperature * tail_at(tail, temperature)[:, None]], dim=1)


def hard_label(student: Tensor, teacher: TopLogits) -> Tensor:
    """`logits.hard_label`, exactly: the first class of a row is the teacher's top one."""
    check(student, teacher)
    return F.cross_entropy(student.float(), teacher.ids[:, 0], reduction="none")


def check(student: Tensor, teacher: TopLogits) -> None:
    """ModelError unless the student has a row of more than K logits for each of the teacher's."""
    rows, kept = teacher.ids.shape
    if student.ndim != 2 or len(student) != rows or student.shape[1] <= kept:
        raise ModelError(
            f"the student's logits have shape {tuple(student.shape)} and the teacher's {rows} rows of the {kept} "
            "largest; the student must have one logit for each class of the task"
        )
