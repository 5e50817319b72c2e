"""What a codec does to logits: sums over rows, which add up over batches and shards, and a report of them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

LARGEST = ("max_abs", "largest_error", "tail_error")  # entries of sums that are no sums
PIECE = 2**15  # logits whose error is measured at a time
MEASURED = 256  # logits of a row that are measured on average: of more classes, not every row is
MEASURED_MAP = 2**13  # the same of a map, whose places are much alike
TEMPERATURES = (1, 2, 4, 8)  # at which gradients are compared


def add_sums(one: Any, other: Any) -> Any:
    """Two nested structures of numbers added entry by entry, but of LARGEST the larger kept; None counts as zero. An
    entry that only one has is left out: what another version did not measure has no sum."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, dict):
        return {
            name: max(one[name], other[name]) if name in LARGEST else add_sums(one[name], other[name])
            for name in one
            if name in other
        }
    if isinstance(one, list):
        pairs = zip(one, other, strict=True)
        if one and isinstance(one[0], (int, float)):  # a number for each of many classes: a call for each takes long
            return [left + right for left, right in pairs]
        return [add_sums(left, right) for left, right in pairs]
    return one + other


def measured_error(logits: np.ndarray, decoded: np.ndarray) -> dict[str, Any]:
    """What a codec did to finite logits (B, C, *grid): figures that `merge_errors` can add up over batches and shards.

    Every place of the grid counts as a row: `count` rows, `max_abs` difference of z - max(z), `agreement`, the rows
    whose top class is the same, the sums over rows of KL(exact || decoded) in nats at temperatures 1 and 4, and at each
    of TEMPERATURES those of `gradient_sums`.
    """
    found = merge_errors([])
    # In pieces, whose float64 copies stay in the processor's cache: twice as fast for 22,000 classes.
    step = max(1, PIECE * len(logits) // max(logits.size, 1))
    for start in range(0, len(logits), step):
        exact, stored = (below_maximum(one[start : start + step]) for one in (logits, decoded))
        top, (was, now) = exact.argmax(axis=1), map(softened, (exact, stored))
        p, kept = ([one[T] / one[T].sum(axis=1, keepdims=True) for T in TEMPERATURES] for one in (was, now))
        one = {
            "count": top.size,
            "max_abs": float(np.abs(exact - stored).max(initial=0)),
            "agreement": int((top == stored.argmax(axis=1)).sum()),
            "kl_t1": _kl_sum(exact - stored, was[1], now[1]),
            "kl_t4": _kl_sum((exact - stored) / 4, was[4], now[4]),
            **gradient_sums(p, kept),
        }
        found = merge_errors([found, one])
    return found


def measured_every(classes: int, grid: tuple[int, int] | None = None) -> int:
    """Of how many rows of a batch one is measured while a cache is made: measuring 22,000 classes, or a map of 4,225
    places, takes longer than storing them."""
    return -(-classes // MEASURED) if grid is None else -(-classes * math.prod(grid) // MEASURED_MAP)


def every_words(every: int) -> str:
    """The end of a sentence on a report that is one of a sample."""
    return f"; as measured on one row in {every}" if every > 1 else ""


def gradient_sums(exact: Iterable[np.ndarray], stored: Iterable[np.ndarray]) -> dict[str, list[float]]:
    """Probabilities (B, C, ...) at each of TEMPERATURES -> by temperature the sums over rows of |stored - exact|^2 and
    of |exact - 1/C|^2, `gap` and `size`.

    T (q - p) is the gradient of `kd` by the student's logits, so these are the squared error of the gradient and the
    squared gradient itself, where the student says nothing yet, but for a factor that they share.
    """
    gap, size = [], []
    for p, kept in zip(exact, stored, strict=True):
        gap.append(float(((kept - p) ** 2).sum()))
        size.append(float(((p - 1 / p.shape[1]) ** 2).sum()))
    return {"gap": gap, "size": size}


def merge_errors(errors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of several `measured_error` as those of one; of none, zeros."""
    none = [0.0] * len(TEMPERATURES)
    merged: dict[str, Any] = {"count": 0, "max_abs": 0.0, "agreement": 0, "kl_t1": 0.0, "kl_t4": 0.0}
    merged |= {"gap": none, "size": none}
    for one in errors:
        merged = add_sums(merged, one)
    return merged


def error_report(merged: Mapping[str, Any]) -> dict[str, Any]:
    """For a manifest: `count`, `max_abs`, `top_class_agreement`, the share of rows whose top class is the same, the
    mean KL a row in nats, `mean_kl_t1` and `mean_kl_t4`, and `gradient_error` by temperature: the root of `gap` over
    `size`."""
    rows = max(merged["count"], 1)
    means = {f"mean_{name}": merged[name] / rows for name in ("kl_t1", "kl_t4")}
    kept = {name: merged[name] for name in ("count", "max_abs")}
    report = {**kept, "top_class_agreement": merged["agreement"] / rows, **means}
    if "gap" in merged:  # older shards did not measure it
        pairs = zip(TEMPERATURES, merged["gap"], merged["size"], strict=True)
        report["gradient_error"] = {str(T): (gap / size) ** 0.5 if gap and size else 0.0 for T, gap, size in pairs}
    return report


def gradient_words(report: Mapping[str, Any]) -> str:
    """The end of a sentence on a report: how far gradients are off."""
    measured = report.get("gradient_error", {})
    errors = ", ".join(f"{error:.1e} at T = {temperature}" for temperature, error in measured.items())
    return f"; gradients off by {errors}" if errors else ""


def softened(below: np.ndarray) -> dict[int, np.ndarray]:
    """exp(z / T) at each of TEMPERATURES, of z (B, C, *grid) float64 with a maximum of 0; one exponential for all."""
    found = {TEMPERATURES[-1]: np.exp(below / TEMPERATURES[-1])}
    for colder, hotter in zip(TEMPERATURES[-2::-1], TEMPERATURES[::-1], strict=False):
        found[colder] = found[hotter] ** 2  # each is half the one before
    return found


def below_maximum(logits: np.ndarray) -> np.ndarray:
    """z - max(z) of each place, in float64."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    return exact


def _kl_sum(apart: np.ndarray, exact: np.ndarray, stored: np.ndarray) -> float:
    """The sum over places of the KL between two distributions that are not normalised yet: `exact` and `stored`, whose
    logarithms are `apart`."""
    total, other = exact.sum(axis=1), stored.sum(axis=1)
    return float(((exact * apart).sum(axis=1) / total - np.log(total / other)).sum())
