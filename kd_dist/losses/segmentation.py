"""Losses on maps: the teacher's logits at every pixel, and channel by channel, which serves features too.

Each returns (B,) float32, one value an example, whatever precision comes in. The student's map is brought to the
teacher's grid (`grid.on_grid`). All pixels count, labelled or not: the teacher has something to say where the label is
void too. Teacher maps are finite constants: no gradient is meant for them. ModelError: rows or channels differ.
"""

from torch import Tensor

from kd_dist.errors import ModelError
from kd_dist.losses.grid import matched
from kd_dist.losses.logits import TEMPERATURE, divergence
from kd_dist.losses.table import Loss


def kd_pixel(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean over pixels of T^2 KL(softmax(teacher/T) || softmax(student/T)) over the classes, T being `temperature`.

    student (B, C, h, w), teacher (B, C, h', w') logits; returns (B,) float32 in nats, 0 where both say the same. The
    pixels are those of the teacher's grid. Adding a constant to all logits of a pixel changes nothing. Source: Liu et
    al., CVPR 2019 (1903.04197), section 3.2, whose T is 1. Deviation: pixels with a void label count, as all do.
    """
    student, teacher = matched(student, teacher)
    return divergence(student, teacher, temperature, dim=1).mean(dim=1)


def cwd(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Mean over channels of T^2 KL(softmax(teacher_c/T) || softmax(student_c/T)), each softmax over the positions.

    student (B, C, h, w), teacher (B, C, h', w') logits; returns (B,) float32 in nats, 0 where both say the same.
    Source: Shu et al., ICCV 2021 (2011.13256), section 3.2, T = 4, with weight 3. Deviations: the mean of a pixel's
    logits is taken off first, in both, as the logits of a cached teacher are known only up to a constant at each
    pixel; pixels with a void label count, as all do.
    """
    student, teacher = matched(student, teacher)
    student, teacher = (logits - logits.mean(dim=1, keepdim=True) for logits in (student, teacher))
    return divergence(student, teacher, temperature, dim=2).mean(dim=1)


def cwd_features(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """`cwd` of features, as they are: mean over channels of T^2 KL(softmax(f_t/T) || softmax(f_s/T)), over positions.

    student (B, C, *grid) already projected to the teacher's C channels, teacher (B, C, *grid'), not vectors; returns
    (B,) float32 in nats. Source: Shu et al. (2011.13256), section 3.2, T = 4, with weight 50.
    """
    if teacher.ndim == 2:
        raise ModelError("vectors have no positions to compare; tap maps in both models, or use cosine or hint")
    student, teacher = matched(student, teacher)
    return divergence(student, teacher, temperature, dim=2).mean(dim=1)


LOSSES = {
    "kd_pixel": Loss(
        kd_pixel,
        student="logits",
        against="logits",
        tasks=("segmentation",),
        classes=(2, None),
        ranges={"temperature": TEMPERATURE},
    ),
    "cwd": Loss(
        cwd,
        student="logits",
        against="logits",
        tasks=("segmentation",),
        classes=(2, None),
        ranges={"temperature": TEMPERATURE},
    ),
    "cwd_features": Loss(
        cwd_features,
        student="projected",
        against="features",
        tasks=("classification", "segmentation", "regression"),
        classes=(1, None),
        ranges={"temperature": TEMPERATURE},
    ),
}
