"""Losses on class logits: cross-entropy with the label, and distillation from the teacher's logits.

Each but DIST returns (B,) float32, one value an example, whatever precision comes in. Adding a constant to a row of
logits, the student's or the teacher's, changes nothing: a cache knows the teacher's up to a constant. Teacher logits
are finite constants: no gradient is meant for them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dist.batch import IGNORED, TopLogits
from kd_dist.errors import ModelError
from kd_dist.losses import truncated
from kd_dist.losses.grid import on_grid
from kd_dist.losses.table import Loss

TEMPERATURE = (0.1, 100.0)  # colder, the teacher is one-hot; hotter, rounding (1e-6 T^2 nats) drowns the value
_FLAT = 1e-6  # added to the variance of a row of logits: 0.001 squared, below which it has no shape to be compared
_SAME = 1e-6  # the part of its mean square that is added to the variance of probabilities: 0.1 % of spread is none


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


def kd(student: Tensor, teacher: Tensor | TopLogits, *, temperature: float = 4.0) -> Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)), T being `temperature`.

    student, teacher (B, C) float; returns (B,) float32 in nats, 0 where both say the same. ModelError: shapes differ.
    Source: Hinton, Vinyals and Dean 2015 (1503.02531), section 2. They use the cross-entropy; the teacher's entropy is
    taken off here, which changes no gradient and makes a perfect match read 0. T^2 keeps the size of the gradient
    nearly independent of T. Default: T = 4, as usual on CIFAR, there with weight 0.9 beside 0.1 for the label. Of
    TopLogits, at T from 1 to 8, it is the KL with all other classes as one, see `truncated`.
    """
    if isinstance(teacher, TopLogits):
        return divergence(*truncated.merged(student, teacher, temperature), temperature, dim=1)
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


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the classes of (d_c - mean d)^2, where d = s - t: the squared error of the centred logits.

    student, teacher (B, C) float; returns (B,) float32. ModelError: shapes differ. Source: Ba and Caruana, NeurIPS 2014
    (1312.6184), section 2; `kd` tends to half of it as T grows. Deviation: both rows are centred, as the logits of a
    cached teacher are known only up to a constant, which no softmax sees either.
    """
    student, teacher = _float_pair(student, teacher)
    difference = student - teacher
    return (difference - difference.mean(dim=1, keepdim=True)).square().mean(dim=1)


def hard_label(student: Tensor, teacher: Tensor | TopLogits) -> Tensor:
    """-log softmax(student)_k, k being the teacher's top class, the first of equal ones.

    student, teacher (B, C) float; returns (B,) float32 in nats. ModelError: shapes differ. Source: Touvron et al.,
    DeiT, ICML 2021 (2012.12877), section 4, there in equal parts with the label's; nothing is smoothed.
    Exact with TopLogits too.
    """
    if isinstance(teacher, TopLogits):
        return truncated.hard_label(student, teacher)
    student, teacher = _float_pair(student, teacher)
    return F.cross_entropy(student, teacher.argmax(dim=1), reduction="none")


def logit_std(student: Tensor, teacher: Tensor, *, temperature: float = 2.0) -> Tensor:
    """`kd` of standardised logits, (z - mean z) / sqrt(var z + 1e-6) over the classes of a row, at this `temperature`.

    student, teacher (B, C) float, C at least 3: two classes standardise to signs; returns (B,) float32 in nats. The
    student's scale is left free. Source: Sun et al., CVPR 2024 (2403.01427), section 4.2, T = 2, weight 9.
    Deviations: the variance is over C, as in the paper, where the public code has C - 1; and the 1e-6, where that adds
    1e-7 to the deviation, keeps the gradient of a row of equal logits below 1000 T. ModelError: shapes differ.
    """
    student, teacher = map(_standardised, _float_pair(student, teacher))
    return divergence(student, teacher, temperature, dim=1)


def dkd(
    student: Tensor,
    targets: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """T^2 [`alpha` KL(b_t || b_s) + `beta` KL(n_t || n_s)] of tempered logits z/T: b is (p_y, 1 - p_y), y being the
    label, and n the softmax over the other classes.

    student, teacher (B, C) float, C at least 3: with two, n is (1); targets (B,) int64; returns (B,) float32 in nats.
    With `alpha` 1 and 1 - p_y of the teacher in the place of `beta` it is `kd`. Source: Zhao et al., CVPR 2022
    (2203.08679), section 3, alpha = 1, beta = 1 to 8, T = 4 on CIFAR, and there a warm-up of 20 epochs, in a recipe
    `weight: {linear: {start: 0, end: 1, over: 20}}`. Deviation: the public code takes n by subtracting 1000 from the
    label's logit; here it is left out. ModelError: shapes differ.
    """
    student, teacher = (_decoupled(logits / temperature, targets) for logits in _float_pair(student, teacher))
    (log_q, log_m), (log_p, log_n) = student, teacher
    target = _weighed(log_p.exp(), log_p - log_q).sum(dim=1)
    others = _weighed(log_n.exp(), log_n - log_m).sum(dim=1)
    return temperature**2 * (alpha * target + beta * others)


def dist(
    student: Tensor, teacher: Tensor, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """T^2 [`beta` mean over rows of (1 - r) + `gamma` mean over columns of (1 - r)], r being Pearson's correlation of
    softmax(student/T) and softmax(teacher/T): of a row over the classes, of a column over the rows of the batch.

    student, teacher (B, C) float, C at least 3: the r of two classes is a sign; returns () float32. Source: Huang et
    al., NeurIPS 2022 (2205.10536), section 3; beta = gamma = T = 1 on ImageNet, 2, 2 and 4 on CIFAR. The columns
    compare the rows of a batch: under DDP see `gather` in Objective. Deviation: 1 - r is |u_s - u_t|^2 / 2 of the unit
    vectors u = (x - mean x) / sqrt(var x + 1e-6 mean x^2), exactly 0 for a match; the 1e-6 bounds the gradient where
    nothing varies. ModelError: shapes differ.
    """
    q, p = (torch.softmax(logits / temperature, dim=1) for logits in _float_pair(student, teacher))
    rows, columns = (((_unit(q, dim) - _unit(p, dim)).square().sum(dim=dim) / 2).mean() for dim in (1, 0))
    return temperature**2 * (beta * rows + gamma * columns)


def divergence(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """T^2 KL(softmax(teacher/T) || softmax(student/T)) over `dim`, which is gone from the result; both float32."""
    log_q = torch.log_softmax(student / temperature, dim=dim)
    log_p = torch.log_softmax(teacher / temperature, dim=dim)
    return temperature**2 * _weighed(log_p.exp(), log_p - log_q).sum(dim=dim)


def _weighed(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio, and 0 where p has underflowed: a student that says -inf there would make it 0 * inf = NaN."""
    return torch.where(p > 0, p * log_ratio, 0.0)


def _standardised(logits: Tensor) -> Tensor:
    """(z - mean z) / sqrt(var z + _FLAT) of each row."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + _FLAT).sqrt()


def _decoupled(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and labels (B,) -> the logarithms of (p_y, 1 - p_y), (B, 2), and of the softmax without y,
    (B, C - 1). The logarithm of the rest is that of its own sum: 1 - p_y would round to 0."""
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = logits.gather(1, others + (others >= targets[:, None]))  # a mask would have a GPU waited for
    rest = others.logsumexp(dim=1, keepdim=True)
    return torch.cat([logits.gather(1, targets[:, None]), rest], dim=1).log_softmax(dim=1), others - rest


def _unit(values: Tensor, dim: int) -> Tensor:
    """(x - mean x) / sqrt(sum (x - mean x)^2 + _SAME sum x^2) over `dim`, of what is not negative; 0 for zeros."""
    # Scaled first, that squares do not underflow. The result does not depend on the scale, so no gradient is lost.
    values = values / values.detach().amax(dim=dim, keepdim=True).clamp_min(1e-30)
    centred = values - values.mean(dim=dim, keepdim=True)
    size = centred.square().sum(dim=dim, keepdim=True) + _SAME * values.square().sum(dim=dim, keepdim=True)
    return centred / (size + _SAME**2).sqrt()


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
        top="near",
    ),
    "kd_binary": Loss(
        kd_binary,
        student="logits",
        against="logits",
        tasks=("classification",),
        classes=(2, 2),
        ranges={"temperature": TEMPERATURE},
    ),
    "logit_mse": Loss(
        logit_mse, student="logits", against="logits", tasks=("classification",), classes=(2, None), ranges={}
    ),
    "hard_label": Loss(
        hard_label,
        student="logits",
        against="logits",
        tasks=("classification",),
        classes=(2, None),
        ranges={},
        top="exact",
    ),
    "logit_std": Loss(
        logit_std,
        student="logits",
        against="logits",
        tasks=("classification",),
        classes=(3, None),
        ranges={"temperature": TEMPERATURE},
    ),
    "dkd": Loss(
        dkd,
        student="logits",
        against="targets",
        tasks=("classification",),
        classes=(3, None),
        ranges={"alpha": (0.01, 100.0), "beta": (0.01, 100.0), "temperature": TEMPERATURE},
        with_teacher=True,
    ),
    "dist": Loss(
        dist,
        student="logits",
        against="logits",
        tasks=("classification",),
        classes=(3, None),
        # Colder, the probabilities of whole columns underflow.
        ranges={"beta": (0.0, 100.0), "gamma": (0.0, 100.0), "temperature": (0.5, 100.0)},
        relational=True,
    ),
}
