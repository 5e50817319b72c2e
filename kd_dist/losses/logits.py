"""Losses on class logits: cross-entropy with the label, and distillation from the teacher's logits.

Each returns (B,) float32, one value an example, whatever precision comes in. Adding a constant to a row of logits,
the student's or the teacher's, changes nothing. Teacher logits are finite constants: no gradient is meant for them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dist.batch import IGNORED
from kd_dist.errors import ModelError
from kd_dist.losses.grid import on_grid
from kd_dist.losses.table import Loss

TEMPERATURE = (0.1, 100.0)  # colder, the teacher is one-hot; hotter, rounding (1e-6 T^2 nats) drowns the value


def cross_entropy(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """-sum_c y_c log softmax(logits)_c, where y = (1 - e) onehot(target) + e/C and e is `label_smoothing`.

    logits (B, C) float with targets (B,) int64 in [0, C); or logits (B, C, h, w) with masks (B, H, W) uint8 or int64,
    255 being ignored: the logits are brought to (H, W) first (`grid.on_grid`), and an example's value is the mean over
    its labelled pixels, 0 if it has none. Returns (B,) float32 in nats. ModelError: logits and targets do not fit.
    Source: smoothing is Szegedy et al., CVPR 2016 (1512.00567), section 7. Default: the plain log-loss.
    """
    if logits.ndim not in (2, 4) or targets.ndim != logits.ndim - 1 or len(logits) != len(targets):
        raise ModelError(
            f"the student's logits have shape {tuple(logits.shape)} and the targets {tuple(targets.shape)}; labels "
            "(B,) need logits (B, C) and masks (B, H, W) need logits (B, C, h, w)"
        )
    if logits.ndim == 2:
        return F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    values = F.cross_entropy(
        on_grid(logits.float(), targets.shape[1:]),
        targets.long(),
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    labelled = (targets != IGNORED).sum(dim=(1, 2))
    return values.sum(dim=(1, 2)) / labelled.clamp_min(1)


def kd(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)), T being `temperature`.

    student, teacher (B, C) float; returns (B,) float32 in nats, 0 where both say the same. ModelError: shapes differ.
    Source: Hinton, Vinyals and Dean 2015 (1503.02531), section 2. They use the cross-entropy; the teacher's entropy is
    taken off here, which changes no gradient and makes a perfect match read 0. T^2 keeps the size of the gradient
    nearly independent of T. Default: T = 4, as usual on CIFAR, there with weight 0.9 beside 0.1 for the label.
    """
    student, teacher = _float_pair(student, teacher)
    return divergence(student, teacher, temperature, dim=1)


def kd_binary(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    """T^2 [BCE(sigmoid(s/T), sigmoid(t/T)) - H(sigmoid(t/T))], where s and t are the margins z_1 - z_0.

    student, teacher (B, 2) float; returns (B,) float32 in nats, 0 where both say the same. ModelError: shapes differ,
    or there are not 2 classes. The two-class case of `kd` (1503.02531), equal to it at the same T; it tends to
    (s - t)^2 / 8 as T grows. Default: T = 2, as two classes leave less to soften than a hundred.
    """
    student, teacher = _float_pair(student, teacher)
    if student.shape[-1] != 2:
        raise ModelError(f"loss 'kd_binary': needs logits of 2 classes, not {student.shape[-1]}; use 'kd'")
    s, t = (student[:, 1] - student[:, 0]) / temperature, (teacher[:, 1] - teacher[:, 0]) / temperature
    class_1 = _weighed(torch.sigmoid(t), F.logsigmoid(t) - F.logsigmoid(s))
    class_0 = _weighed(torch.sigmoid(-t), F.logsigmoid(-t) - F.logsigmoid(-s))
    return temperature**2 * (class_1 + class_0)


def divergence(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)) over `dim`, which is gone from the result; both float32."""
    log_q = torch.log_softmax(student / temperature, dim=dim)
    log_p = torch.log_softmax(teacher / temperature, dim=dim)
    return temperature**2 * _weighed(log_p.exp(), log_p - log_q).sum(dim=dim)


def _weighed(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio, and 0 where p has underflowed: a student that says -inf there would make it 0 * inf = NaN."""
    return torch.where(p > 0, p * log_ratio, 0.0)


def _float_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32. Unequal shapes are refused: some would broadcast into a wrong loss without a word."""
    if student.shape != teacher.shape:
        raise ModelError(
            f"the student's logits have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; "
            "both models must have one logit for each class of the task"
        )
    return student.float(), teacher.float()


LOSSES = {
    "cross_entropy": Loss(
        cross_entropy,
        student="logits",
        against="targets",
        tasks=("classification", "segmentation"),
        classes=(2, None),
        ranges={"label_smoothing": (0.0, 0.9)},
    ),
    "kd": Loss(
        kd,
        student="logits",
        against="logits",
        tasks=("classification",),
        classes=(2, None),
        ranges={"temperature": TEMPERATURE},
    ),
    "kd_binary": Loss(
        kd_binary,
        student="logits",
        against="logits",
        tasks=("classification",),
        classes=(2, 2),
        ranges={"temperature": TEMPERATURE},
    ),
}
