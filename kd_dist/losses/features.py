"""Losses on features: named intermediate maps of the student against the teacher's of the same name.

Each takes one pair of features, (B, C, *grid) float: maps (B, C, h, w), tokens (B, C, N) or vectors (B, C). Where the
grids differ, the student's is brought to the teacher's (`grid.on_grid`); tokens of different number cannot be. All but
the relational ones, SP and RKD, return (B,) float32, one value an example. All are 0 where both features are the same,
and none depends on the scale of a feature or on its resolution. Teacher features are finite constants: no gradient is
meant for them. Every one raises a ModelError where the rows, or the positions, of the two do not fit.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dist.errors import ModelError
from kd_dist.losses.grid import check_rows, matched, on_grid, positions
from kd_dist.losses.table import Loss

_LEAST = 1e-6  # a vector that is shorter has no direction
_NEAR = 1e-5  # rows whose squared distance is a smaller part of their squared size are one: float32 tells no more


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over positions of 1 - cos(f_s, f_t), the cosine taken over the channels of a position.

    student (B, C, *grid) already projected to the teacher's C channels, teacher (B, C, *grid'); returns (B,) float32 in
    [0, 2]. Every position counts alike. Source: the usual feature cosine of self-supervised distillation, without
    options; a weight of 0.3 is common. Deviation: computed as |u_s - u_t|^2 / 2 of the unit vectors u, which is exactly
    0 for a match; a vector of zeros has u = 0 and no gradient, so that one beside a real vector costs 1/2.
    ModelError: a single channel, as saliency() and attention() read, has no direction that a gradient could turn.
    """
    student, teacher = matched(student, teacher)
    if teacher.shape[1] == 1:
        raise ModelError("has one channel, whose cosine is a sign; name others in `features`, or use saliency or hint")
    return (_unit(student, 1) - _unit(teacher, 1)).square().sum(dim=1).mean(dim=1) / 2


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over channels and positions of (f_s / rms(f_s) - f_t / rms(f_t))^2; rms is over an example's whole map.

    student (B, C, *grid) already projected to the teacher's C channels, teacher (B, C, *grid'); returns (B,) float32 in
    [0, 4]. Unlike in `cosine`, strong positions count more than weak ones. Source: Romero et al., FitNets, ICLR 2015
    (1412.6550), section 2.2. Deviations: the norm of an example's map is taken off, which makes the weight independent
    of the teacher's scale; the mean is over the elements, where they have half the sum.
    """
    student, teacher = matched(student, teacher)
    # Unit vectors have an rms of 1 / sqrt(elements): the sum of their squared differences is the mean asked for.
    return (_unit(student.flatten(1), 1) - _unit(teacher.flatten(1), 1)).square().sum(dim=1)


def at(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions of (A_s - A_t)^2, where A = e / |e|_2 and e is a position's mean of f^2 over the channels.

    student (B, C, *grid), teacher (B, C', *grid'), not vectors; returns (B,) float32 in [0, 2]. Source: Zagoruyko and
    Komodakis, ICLR 2017 (1612.03928), section 3.1. Deviations: their code has the mean over the positions, which falls
    as the map grows, with weight 1000; here that is weight 1000 / (h w). The map e is resized, not the feature.
    """
    student, teacher = _energies(student, teacher)
    return (_unit(student, 1, _LEAST**2) - _unit(teacher, 1, _LEAST**2)).square().sum(dim=1)


def saliency(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_t || p_s) of distributions over positions, p being proportional to e, the mean of f^2 over the channels.

    student (B, C, *grid), teacher (B, C', *grid'), not vectors; returns (B,) float32 in nats. Source: our own, so that
    a ViT, a MobileViT and a CNN can be compared by where they look. No softmax, hence no temperature. A thousandth of
    the mean of e is added to each position, which bounds the logarithm; a map of zeros is uniform.
    """
    log_q, log_p = (_log_share(energies) for energies in _energies(student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the B^2 entries of (S_s - S_t)^2, S being the (B, B) matrix F F^T with rows of unit length.

    student (B, C, *grid), teacher (B, C', *grid'), flattened to the rows of F; returns () float32. Any two grids and
    channels go together. Source: Tung and Mori, ICCV 2019 (1907.09682), section 3; weight 3000. It compares the rows
    of a batch, so its value depends on the batch: it falls about as 1/B. Under DDP see `gather` in Objective.
    """
    check_rows(student, teacher)
    similar_s, similar_t = (_unit(f @ f.T, 1, _LEAST**2) for f in (_rows(student), _rows(teacher)))
    return (similar_s - similar_t).square().mean()


def rkd(student: Tensor, teacher: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """`distance` * mean_ij h(d_s / mean d_s, d_t / mean d_t) + `angle` * mean_ijk h(cos_s, cos_t), h being Huber's.

    student (B, C, *grid), teacher (B, C', *grid'), flattened to points; d_ij is the distance of two points, its mean
    over the pairs that are apart, cos_ijk that of the angle at i between j and k; 0 for points that coincide. Returns
    () float32. Any two grids and channels go together. Source: Park et al., CVPR 2019 (1904.05068), section 3.2, with
    the weights of their classification; the means are over all B^2 pairs and B^3 triples, as in their code. It holds
    some six tensors of B^3 numbers (0.4 GB at B = 256): where that is too many, `angle: 0` leaves the angles out.
    It compares the rows of a batch. Under DDP see `gather` in Objective.
    """
    check_rows(student, teacher)
    (gram_s, d_s), (gram_t, d_t) = (_distances(_rows(f)) for f in (student, teacher))
    value = distance * F.smooth_l1_loss(_over_mean(d_s), _over_mean(d_t))
    if angle:
        value = value + angle * F.smooth_l1_loss(_cosines(gram_s, d_s), _cosines(gram_t, d_t))
    return value


def _unit(tensor: Tensor, dim: int, least: float = _LEAST) -> Tensor:
    """Divided by its L2 norm over `dim`; where that is below `least`, 0 with a gradient of 0."""
    norm = torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)
    return tensor / torch.where(norm >= least, norm, torch.inf)


def _energies(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of squares over the channels of each position, the student's on the teacher's grid; (B, P) float32."""
    check_rows(student, teacher)
    if teacher.ndim == 2:
        raise ModelError(
            "vectors have no positions to compare; tap maps in both models, or use cosine, hint, sp or rkd"
        )
    student, teacher = (f.float().square().mean(dim=1, keepdim=True) for f in (student, teacher))
    return positions(on_grid(student, teacher.shape[2:]))[:, 0], positions(teacher)[:, 0]


def _log_share(energies: Tensor) -> Tensor:
    """The logarithm of each position's share of an example's energy; (B, P)."""
    lifted = energies + 1e-3 * energies.mean(dim=1, keepdim=True) + _LEAST**2
    return lifted.log() - lifted.sum(dim=1, keepdim=True).log()


def _rows(features: Tensor) -> Tensor:
    return features.float().flatten(1)


def _distances(points: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix of the centred points, and their distances; (B, B) each. Never (B, B, features) numbers."""
    points = points - points.mean(dim=0)  # what all points share would drown their differences
    gram = points @ points.T
    size = gram.diagonal()[:, None] + gram.diagonal()
    squared = size - 2 * gram
    apart = squared > _NEAR * size
    return gram, torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


def _over_mean(distances: Tensor) -> Tensor:
    """Distances in units of their mean over the pairs that are apart."""
    apart = (distances > 0).sum()
    return distances * torch.where(apart > 0, apart / distances.sum().clamp_min(_LEAST**2), 0.0)


def _cosines(gram: Tensor, distances: Tensor) -> Tensor:
    """cos of the angle at point i between points j and k, by [i, j, k]; 0 where j or k coincides with i."""
    apart = distances > 0
    inverse = torch.where(apart, 1 / torch.where(apart, distances, 1.0), 0.0)
    corner = gram.diagonal()[:, None, None]
    product = gram - gram[:, :, None] - gram[:, None, :] + corner  # (x_j - x_i) . (x_k - x_i)
    return product * inverse[:, :, None] * inverse[:, None, :]


_TASKS = ("classification", "segmentation", "regression")


def _row(function: Callable[..., Tensor], student: str, **options: Any) -> Loss:
    """All of them see channels through norms and inner products alone."""
    about = {"against": "features", "tasks": _TASKS, "classes": (1, None), "isometric": True}
    return Loss(function, student, **{"ranges": {}, **about, **options})


LOSSES = {
    "cosine": _row(cosine, "projected"),
    "hint": _row(hint, "projected"),
    "at": _row(at, "features"),
    "saliency": _row(saliency, "features"),
    "sp": _row(sp, "features", relational=True),
    "rkd": _row(rkd, "features", relational=True, ranges={"distance": (0.0, 1000.0), "angle": (0.0, 1000.0)}),
}
