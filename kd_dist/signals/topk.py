"""Top-K logits: the K largest of C, and of the rest what tells its mass at every temperature from 1 to 8."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kd_dist.batch import TopLogits
from kd_dist.errors import RecipeError
from kd_dist.signals.fidelity import (
    PIECE,
    TEMPERATURES,
    add_sums,
    below_maximum,
    error_report,
    every_words,
    gradient_words,
    measured_every,
    merge_errors,
    softened,
)

NAME = re.compile(r"top([2-9]|[1-9][0-9]{1,4})")  # of one class the label may take the place
COLDEST, HOTTEST = 1.0, 8.0  # the temperatures at which the tail's mass is known
# At these b = 1/T the tail's log-sum-exp is stored: from 1 down to 1/8 as the extrema of a Chebyshev polynomial lie,
# where interpolation does not swing out at the ends.
NODES = tuple(9 / 16 + 7 / 16 * math.cos(math.pi * number / 15) for number in range(16))
ALONG = np.array([(1 - node) / (1 - 1 / 8) for node in NODES])  # how far along the chord from the first to the last
STEPS = 2**16 - 1
BETWEEN = (1.3, 2.7, 3.3, 4.2, 5.6)  # temperatures at which the interpolation is measured


def is_top(name: str) -> bool:
    """Whether a codec of logits is of this kind: `top` and how many, two at least."""
    return NAME.fullmatch(name) is not None


@lru_cache
def tail_weights(temperature: float) -> tuple[float, ...]:
    """Weights w with which sum_j w_j f(NODES_j) is f(1/T), f(b) being the log-sum-exp of b z over the tail: those of
    the polynomial through the nodes. Raises ValueError outside COLDEST..HOTTEST."""
    if not COLDEST <= temperature <= HOTTEST:
        raise ValueError(f"top-K logits know the tail at temperatures from 1 to 8, not at {temperature:g}")
    b = 1 / float(temperature)  # what is kept for an equal number must not depend on its type
    others = [[other for other in NODES if other != node] for node in NODES]
    return tuple(
        math.prod((b - other) / (node - other) for other in rest) for node, rest in zip(NODES, others, strict=True)
    )


@dataclass(frozen=True)
class TopCodec:
    """How the K largest of C logits are stored, the label among them, and what is left of the others, the tail.

    `logits` are z - max(z) of the classes `logits_ids`, the largest first, as fp16; a label that is not among the K
    largest takes the place of the last, a second one, of a view that shows two examples, that of the last that is no
    label. The largest is always first, so that of K = 2 a second label may be left out. Of f(b) =
    log sum exp(b (z - max z)) over the tail, `tail_ends` are the values at the first and the last of the NODES; f is
    convex, so that at the others it lies below the chord through these, by `tail_below` steps of `tail_step`.
    `logits_sum` and `logits_squares` are the sums of z - max z and of its square over all C: the mean and the spread of
    a row, which its largest logits do not tell.

    Bounds on the error: of a kept logit as for fp16, see LogitsCodec; of the tail's mass at any temperature in
    COLDEST..HOTTEST 2 %, tested on Gaussian, clustered and heavy-tailed logits. It has the methods of LogitsCodec.
    Raises RecipeError for two classes, for maps, or where no class would be left for the tail.
    """

    name: str  # `top` and K
    classes: int
    grid: None = None

    drift: ClassVar[str] = "mean_kl_t1"

    def __post_init__(self) -> None:
        if self.grid is not None:
            raise RecipeError(f"'{self.name}' is for images; maps store the logits of every class")
        if self.classes <= self.kept:
            raise RecipeError(f"'{self.name}' of {self.classes} classes leaves none out; use fp16")

    @property
    def kept(self) -> int:
        """K."""
        return int(NAME.fullmatch(self.name)[1])

    @property
    def every(self) -> int:
        """Of how many rows one is measured; see `measured_every`."""
        return measured_every(self.classes)

    @property
    def row_bytes(self) -> int:
        """What its fields take in a row."""
        return np.dtype(self.fields()).itemsize

    def fields(self) -> list[tuple]:
        """The fields that this codec adds to a row, as NumPy describes them."""
        tail = [("tail_ends", "<f4", (2,)), ("tail_step", "<f4"), ("tail_below", "<u2", (len(NODES) - 2,))]
        ids = ("logits_ids", "<u2" if self.classes <= 2**16 else "<u4", (self.kept,))
        return [*tail, ("logits_sum", "<f4"), ("logits_squares", "<f4"), ids, ("logits", "<f2", (self.kept,))]

    def encode(self, logits: np.ndarray, targets: np.ndarray | None = None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Logits (B, C) float32 and class indices, which are kept, (B,), or (B, 2) with the one that matters more first
        -> the fields, each (B, ...), and a mask (B,) bool of the rows that could be stored; another row holds zeros."""
        with np.errstate(over="ignore", invalid="ignore"):  # such rows are what the mask is for
            below = logits - logits.max(axis=1, keepdims=True)
        storable = np.isfinite(below).all(axis=1)
        below[~storable] = 0
        ids = self._chosen(below, targets)
        kept = np.take_along_axis(below, ids, axis=1)
        exact = below.astype(np.float64)
        fields = {
            **tail_fields(tail_lse(below, ids, NODES)),
            "logits_sum": exact.sum(axis=1),
            "logits_squares": np.square(exact).sum(axis=1),
        }
        largest = np.finfo(np.float32).max
        storable &= (kept >= -np.finfo(np.float16).max).all(axis=1) & (fields["logits_squares"] <= largest)
        with np.errstate(over="ignore"):
            stored = {**fields, "logits_ids": ids, "logits": kept}
            stored = {name: stored[name].astype(kind) for name, kind, *_ in self.fields()}
        for values in stored.values():
            values[~storable] = 0
        return stored, storable

    def _chosen(self, below: np.ndarray, targets: np.ndarray | None) -> np.ndarray:
        """The classes that are kept, (B, K): the largest first, of equal ones the first."""
        ids = np.sort(np.argpartition(-below, self.kept - 1, axis=1)[:, : self.kept], axis=1)
        order = np.argsort(-np.take_along_axis(below, ids, axis=1), axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        if targets is None:
            return ids
        first, second = (targets if targets.ndim == 2 else targets[:, None])[:, [0, -1]].T
        missing = (ids != first[:, None]).all(axis=1)
        ids[missing, -1] = first[missing]
        place = np.where(ids[:, -1] == first, self.kept - 2, self.kept - 1)
        missing = (ids != second[:, None]).all(axis=1) & (place > 0)
        ids[missing, place[missing]] = second[missing]
        return ids

    def decode(self, rows: np.ndarray) -> TopLogits:
        """Structured rows (B,) -> TopLogits of arrays."""
        return TopLogits(rows["logits_ids"].astype(np.int64), rows["logits"].astype(np.float32), tail_values(rows))

    def error(self, exact: np.ndarray, decoded: TopLogits) -> dict[str, Any]:
        """What storing finite logits (B, C) did to them: figures as of `measured_error`, where the KL takes the tail
        for one class and gradients have its mass in equal parts; and `tail_error`, the largest relative error of that
        mass, at the temperatures BETWEEN."""
        found, step = {**merge_errors([]), "tail_error": 0.0}, max(1, PIECE // self.classes)
        for start in range(0, len(exact), step):
            rows = slice(start, start + step)
            one = self._error(below_maximum(exact[rows]), TopLogits(*(values[rows] for values in decoded)))
            found = add_sums(found, one)
        return found

    def _error(self, below: np.ndarray, decoded: TopLogits) -> dict[str, Any]:
        """`error` of z - max z (B, C) float64, of which the tail is left, below its own maximum."""
        ids, rest, each = decoded.ids, self.classes - self.kept, 1 / self.classes
        agreement, exact = int((below.argmax(axis=1) == ids[:, 0]).sum()), np.take_along_axis(below, ids, axis=1)
        kept = decoded.logits.astype(np.float64)
        np.put_along_axis(below, ids, -np.inf, axis=1)
        highest = below.max(axis=1)
        below -= highest[:, None]
        off = [highest / T + np.log(np.exp(below / T).sum(axis=1)) - _tail_of(decoded, T) for T in BETWEEN]
        softer, gap, size, kl = softened(below), [], [], {}
        for T in TEMPERATURES:
            mass = softer[T].sum(axis=1)
            log_p = _log_softmax(np.column_stack([exact / T, highest / T + np.log(mass)]))
            log_q = _log_softmax(np.column_stack([kept / T, _tail_of(decoded, T)]))
            p, q = np.exp(log_p), np.exp(log_q)
            kl[T] = float((p * (log_p - log_q)).sum())
            # Of the tail's classes two sums tell all, of p and of p^2: a square that is summed is multiplied out.
            was, now = p[:, -1], q[:, -1]
            squares = np.einsum("bc,bc->b", softer[T], softer[T]) * (was / mass) ** 2
            for sums, other, stored in ((gap, q[:, :-1], now / rest), (size, each, each)):
                tail = np.maximum(squares - 2 * stored * was + rest * stored**2, 0)
                sums.append(float(((p[:, :-1] - other) ** 2).sum() + tail.sum()))
        return {
            "count": len(below),
            "max_abs": float(np.abs(exact - kept).max(initial=0)),
            "agreement": agreement,
            "kl_t1": kl[1],
            "kl_t4": kl[4],
            "gap": gap,
            "size": size,
            "tail_error": float(np.abs(np.expm1(off)).max(initial=0)),
        }

    def report(self, sums: Mapping[str, Any] | None) -> dict[str, Any]:
        """Errors that were added up, None for none, as a manifest states them."""
        sums = sums or {**merge_errors([]), "tail_error": 0.0}
        return {**error_report(sums), "tail_error": sums["tail_error"]}

    def words(self, report: Mapping[str, Any]) -> str:
        """A report in words."""
        return (
            f"{self.name} logits: largest error {report['max_abs']:.1e}, others' mass off by "
            f"{report['tail_error']:.1%}, top class equal in {report['top_class_agreement']:.2%}"
            f"{gradient_words(report)}{every_words(self.every)}"
        )


def tail_lse(below: np.ndarray, ids: np.ndarray, inverse: Sequence[float]) -> np.ndarray:
    """log sum exp(b z) over the classes of z (B, C), at most 0, that are not among `ids` (B, K): (B, len(inverse))
    float64, one for each b in `inverse`."""
    tail = below.copy()
    np.put_along_axis(tail, ids, -np.inf, axis=1)
    highest = tail.max(axis=1, keepdims=True)
    tail -= highest
    sums = [np.exp(tail * tail.dtype.type(b)).sum(axis=1, dtype=np.float64) for b in inverse]
    return highest.astype(np.float64) * np.array(inverse) + np.log(np.stack(sums, axis=1))


def chord(ends: np.ndarray) -> np.ndarray:
    """Values (B, n) at the NODES of the lines through `ends` (B, 2), in float64."""
    first, last = ends.astype(np.float64).T[..., None]
    return first + (last - first) * ALONG


def tail_fields(values: np.ndarray) -> dict[str, np.ndarray]:
    """Convex functions by their values (B, n) at the NODES, as they are stored."""
    ends = values[:, [0, -1]].astype(np.float32)
    gaps = np.maximum(chord(ends) - values, 0)[:, 1:-1]
    step = np.maximum(gaps.max(axis=1) / STEPS, np.finfo(np.float32).tiny).astype(np.float32)
    return {"tail_ends": ends, "tail_step": step, "tail_below": np.minimum(np.rint(gaps / step[:, None]), STEPS)}


def tail_values(rows: np.ndarray) -> np.ndarray:
    """The values (B, n) at the NODES, float32, that structured rows (B,) store."""
    values = chord(rows["tail_ends"])
    values[:, 1:-1] -= rows["tail_below"] * rows["tail_step"].astype(np.float64)[:, None]
    return values.astype(np.float32)


def spread_out(logits: Tensor | TopLogits, classes: int) -> Tensor:
    """Logits (B, C): as they are, or those of TopLogits with the mass that the tail has at T = 1 in equal parts. For
    metrics at T = 1: the probabilities of the kept classes are right, the label's among them."""
    if not isinstance(logits, TopLogits):
        return logits
    ids, kept, tail = logits
    each = tail[:, :1] - math.log(classes - ids.shape[1])  # the first node is b = 1
    return each.repeat(1, classes).scatter(1, ids, kept)


def tail_at(tail: Tensor, temperature: float) -> Tensor:
    """The tail's log-sum-exp of (z - max z)/T, (B,), from TopLogits' `tail`. No matrix product: autocast would round
    it."""
    weights = torch.tensor(tail_weights(temperature), dtype=tail.dtype, pin_memory=tail.is_cuda)
    return (tail * weights.to(tail.device, non_blocking=True)).sum(dim=1)


def _tail_of(decoded: TopLogits, temperature: float) -> np.ndarray:
    """`tail_at` of arrays, in float64."""
    return decoded.tail.astype(np.float64) @ np.array(tail_weights(temperature))


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))
