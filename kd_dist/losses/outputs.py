"""Losses on the outputs of a regression: with the label, with the teacher's outputs, and with both.

student, targets and teacher are (B, D) float, D real numbers for each example, in any unit but where a
spread far below 0.001 matters, which `ccc` and `kd_ccc` do not see. All but these two, the relational ones, return (B,)
float32, one value an example, whatever precision comes in. A row whose targets hold a NaN is unlabelled: what reads
targets is exactly 0 there, with a gradient of exactly 0, and a relational loss leaves the row out. Teacher outputs are
finite constants: no gradient is meant for them. Every loss raises a ModelError where shapes differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dist.errors import ModelError
from kd_dist.losses.table import Loss

_LEAST = 1e-6  # added to the spread in CCC: 0.001 squared, which is the step of a half-precision output near 1
_PERFECT = 1e-12  # the largest error of a teacher that makes none


def labelled(targets: Tensor) -> Tensor:
    """Targets (B, D) float -> (B,) bool: the rows without a NaN."""
    return ~targets.isnan().any(dim=1)


def huber(student: Tensor, targets: Tensor, *, delta: float = 1.0) -> Tensor:
    """Mean over the outputs of h(s - y), h(d) = d^2/2 where |d| <= `delta`, otherwise `delta` (|d| - `delta`/2).

    student, targets (B, D) float; returns (B,) float32. Source: Huber 1964, Annals of Mathematical Statistics 35.
    Default: 1, as in Girshick, Fast R-CNN (1504.08083), section 2.3. Outputs in [-1, 1] are seldom further apart, so
    that it is half the squared error there; against outliers `delta` is to be near the deviation of sound labels.
    """
    return _huber(_errors(student, targets), delta)


def mse(student: Tensor, targets: Tensor) -> Tensor:
    """Mean over the outputs of (s - y)^2; student, targets (B, D) float; returns (B,) float32. Least squares."""
    return _errors(student, targets).square().mean(dim=1)


def ccc(student: Tensor, targets: Tensor) -> Tensor:
    """1 - CCC, mean over the outputs; CCC = 2 cov(s, y) / (var(s) + var(y) + (mean(s) - mean(y))^2), over the rows.

    student, targets (B, D) float; returns () float32 in [0, 2]; fewer than 2 labelled rows: 0, with a gradient of 0.
    Source: Lin 1989, Biometrics 45, the concordance correlation coefficient, with its moments over n, not n - 1.
    Computed as mean((s - y)^2) / (the denominator + 1e-6), which is the same but for the 1e-6 and exactly 0 for a
    match: two constants that are equal are one, and near them no gradient exceeds 3420 / sqrt(n). It compares the rows
    of a batch and is biased on few of them, hence `gather` unless told otherwise, see Objective.
    """
    student, targets = _pair(student, targets, "targets")
    known = labelled(targets)
    return _discordance(student[known], targets[known])


def kd_huber(student: Tensor, teacher: Tensor, *, delta: float = 1.0) -> Tensor:
    """`huber` with the teacher's outputs in place of the label; student, teacher (B, D) float; returns (B,) float32."""
    student, teacher = _pair(student, teacher, "teacher's")
    return _huber(student - teacher, delta)


def kd_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """`mse` with the teacher's outputs in place of the label; student, teacher (B, D) float; returns (B,) float32.

    Beside `mse` it is the squared error to a blend of label and teacher, w y + (1 - w) t, but for a constant. Source:
    Ba and Caruana, NeurIPS 2014 (1312.6184), section 2, there on logits.
    """
    student, teacher = _pair(student, teacher, "teacher's")
    return (student - teacher).square().mean(dim=1)


def kd_ccc(student: Tensor, teacher: Tensor) -> Tensor:
    """`ccc` with the teacher's outputs in place of the label; student, teacher (B, D) float; returns () float32.

    Unlabelled rows count: the teacher has something to say about them.
    """
    return _discordance(*_pair(student, teacher, "teacher's"))


def teacher_bounded(student: Tensor, targets: Tensor, teacher: Tensor, *, margin: float = 0.0) -> Tensor:
    """e_s where e_s > e_t + `margin`, otherwise 0; e_s, e_t are the `mse` of the student and of the teacher.

    student, targets, teacher (B, D) float; returns (B,) float32. A student that errs no more than the teacher, up to
    the margin, is left alone. Source: Chen et al., NeurIPS 2017, section 3.3, with weight 0.5 beside a loss on the
    label; m = 0. Deviations: errors are means over the outputs, where they have sums; and the margin is what the
    student may be worse by, where theirs, e_s + m > e_t, is what it must be better by: that is `margin` = -m here.
    """
    student, teacher = _pair(student, teacher, "teacher's")
    own, bound = mse(student, targets), mse(teacher, targets)
    return torch.where(own <= bound + margin, 0.0, own)  # this way round a NaN stays one


def ail(student: Tensor, targets: Tensor, teacher: Tensor, *, eta: float | None = None) -> Tensor:
    """Attentive imitation: (1 - e_t / `eta`) times `kd_mse`, e_t being the teacher's `mse`; the factor is at least 0.

    student, targets, teacher (B, D) float; returns (B,) float32. `eta` is the largest e_t of the training set, which a
    cache knows exactly; None leaves it to the trainer, see `kd_dist.losses.filled`. ModelError: nobody has said it.
    Source: Saputra et al., ICCV 2019 (1908.00858), with weight 0.5 beside a loss on the label. Deviation: their eta is
    the largest less the smallest e_t, with which the factor of the worst example falls below 0.
    """
    if eta is None:
        raise ModelError(
            "loss 'ail': eta, the teacher's largest squared error on the training set, is not known; "
            "write it in the recipe, or train from a cache"
        )
    imitation = kd_mse(student, teacher)
    trust = (1 - mse(teacher, targets) / max(eta, _PERFECT)).clamp_min(0.0)
    return torch.where(labelled(targets), trust, 0.0) * imitation


def _pair(student: Tensor, other: Tensor, whose: str) -> tuple[Tensor, Tensor]:
    """Both in float32. Unequal shapes are refused: some would broadcast into a wrong loss without a word."""
    if student.ndim != 2 or student.shape != other.shape:
        raise ModelError(
            f"the student's outputs have shape {tuple(student.shape)} and the {whose} {tuple(other.shape)}; "
            "both must be (B, D), one number for each output of the task"
        )
    return student.float(), other.float()


def _errors(student: Tensor, targets: Tensor) -> Tensor:
    """student - targets, (B, D) float32; 0 with a gradient of 0 in unlabelled rows."""
    student, targets = _pair(student, targets, "targets")
    # Replaced before anything but a difference sees the NaN: a square that `where` left out would have 0 * NaN as its
    # gradient.
    return torch.where(labelled(targets)[:, None], student - targets, 0.0)


def _huber(difference: Tensor, delta: float) -> Tensor:
    """Mean over the outputs of Huber's function of (B, D) float32."""
    return F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=delta).mean(dim=1)


def _discordance(one: Tensor, other: Tensor) -> Tensor:
    """Mean over the outputs of 1 - CCC of two (n, D) float32; 0 with a gradient of 0 where n < 2."""
    if len(one) < 2:
        return 0.0 * one.sum()
    apart = one.mean(dim=0) - other.mean(dim=0)
    spread = one.var(dim=0, correction=0) + other.var(dim=0, correction=0) + apart.square()
    return ((one - other).square().mean(dim=0) / (spread + _LEAST)).mean()


_TASKS = ("regression",)
_DELTA = (0.01, 100.0)  # narrower, it is the absolute error times delta; wider, half the squared error

LOSSES = {
    "huber": Loss(
        huber, student="logits", against="targets", tasks=_TASKS, classes=(1, None), ranges={"delta": _DELTA}
    ),
    "mse": Loss(mse, student="logits", against="targets", tasks=_TASKS, classes=(1, None), ranges={}),
    "ccc": Loss(
        ccc,
        student="logits",
        against="targets",
        tasks=_TASKS,
        classes=(1, None),
        ranges={},
        relational=True,
        gather=True,
    ),
    "kd_huber": Loss(
        kd_huber, student="logits", against="logits", tasks=_TASKS, classes=(1, None), ranges={"delta": _DELTA}
    ),
    "kd_mse": Loss(kd_mse, student="logits", against="logits", tasks=_TASKS, classes=(1, None), ranges={}),
    "kd_ccc": Loss(
        kd_ccc,
        student="logits",
        against="logits",
        tasks=_TASKS,
        classes=(1, None),
        ranges={},
        relational=True,
        gather=True,
    ),
    "teacher_bounded": Loss(
        teacher_bounded,
        student="logits",
        against="targets",
        tasks=_TASKS,
        classes=(1, None),
        ranges={"margin": (-100.0, 100.0)},
        with_teacher=True,
    ),
    "ail": Loss(
        ail,
        student="logits",
        against="targets",
        tasks=_TASKS,
        classes=(1, None),
        ranges={"eta": (1e-6, 1e6)},
        with_teacher=True,
    ),
}
