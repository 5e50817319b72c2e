"""Which losses a cache serves: exactly, well enough at a temperature, or not at all."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_dist.errors import MismatchError
from kd_dist.losses import LOSSES
from kd_dist.losses.table import Loss
from kd_dist.signals.topk import COLDEST, HOTTEST, is_top

MOST = 0.05  # of a gradient, as the cache was measured, that may be wrong
TAIL = 0.02  # of the mass of the classes that top-K logits leave out, that may be wrong
OTHER = 0.05  # of the rows, in which the largest logit may be another class's
# Losses with the gradient that is measured, or one like it.
KD = ("kd", "kd_binary", "kd_pixel", "dkd", "dist", "logit_std")


def reads_logits(row: Loss) -> bool:
    """Whether a loss reads the teacher's logits, or outputs."""
    return row.against == "logits" or row.with_teacher


def exactly(row: Loss, codec: str) -> bool:
    """Whether a loss on outputs has all it needs from logits stored by this codec."""
    return row.against != "features" and (not is_top(codec) or not reads_logits(row) or row.top == "exact")


def nearly(row: Loss, codec: str) -> bool:
    """Whether a loss can be computed from these logits, but not exactly."""
    return is_top(codec) and row.top == "near"


def codec_problem(row: Loss, written: Mapping[str, Any], codec: str) -> str | None:
    """Why a loss, as a recipe writes it, cannot be had from logits stored by this codec; None: it can."""
    if row.against == "features" or exactly(row, codec):
        return None
    if row.top is None:
        return (
            f"needs the logits of every class, and the cache keeps the {codec.removeprefix('top')} largest "
            f"(cache.logits: {codec}); store them as fp16, or use kd or hard_label"
        )
    temperature = temperature_of(row, written)
    if temperature is not None and not COLDEST <= temperature <= HOTTEST:
        return (
            f"at temperature {temperature:g} needs the logits of every class: those of cache.logits: {codec} are known "
            f"from {COLDEST:g} to {HOTTEST:g}"
        )
    return None


def refuse_unserved(losses: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any], where: str) -> None:
    """Raise a MismatchError for the first loss that signals with the manifest `about` do not serve: one that it does
    not list, or whose gradient at its temperature is off by more than MOST."""
    codec, measured = about["codec"]["logits"], about.get("codec_error", {}).get("logits", {}).get("gradient_error", {})
    for name, written in losses.items():
        row = LOSSES[name]
        if not reads_logits(row):
            continue
        problem = codec_problem(row, written, codec)
        listed = [*about.get("exact_losses", ()), *about.get("near_losses", ())]
        # The list of a cache that keeps all logits is no limit: it is from before there was a newer loss.
        if problem is None and is_top(codec) and name not in listed:
            problem = f"is not among the losses that this cache serves: {', '.join(listed)}"
        temperature = temperature_of(row, written)
        if problem is None and name in KD and temperature is not None and measured:
            error = error_at(measured, temperature)
            if error > MOST:
                problem = (
                    f"at temperature {temperature:g} the gradient from logits stored as {codec} is off by {error:.0%}, "
                    f"as measured when they were cached; {MOST:.0%} may be: {advice(measured)}"
                )
        problem = problem or measured_problem(name, codec, about.get("codec_error", {}).get("logits", {}))
        if problem is not None:
            raise MismatchError(f"{where}.{name}: {problem}")


def measured_problem(name: str, codec: str, error: Mapping[str, Any]) -> str | None:
    """Why a loss cannot rely on logits that are stored with this measured error, whatever its temperature."""
    others = 1 - error.get("top_class_agreement", 1.0)
    if name == "hard_label" and others > OTHER:
        return f"the largest logit, stored as {codec}, is another class's in {others:.0%} of the rows; take fp16"
    off = error.get("tail_error", 0.0)
    if name in KD and off > TAIL:
        return f"the mass of the classes that {codec} leaves out is off by {off:.1%}; store all of them, as fp16"
    return None


def temperature_of(row: Loss, written: Mapping[str, Any]) -> float | None:
    """The temperature of a loss, as a recipe writes it or by default; None where it has none."""
    known = inspect.signature(row.function).parameters.get("temperature")
    return None if known is None else float(written.get("temperature", known.default))


def error_at(measured: Mapping[str, float], temperature: float) -> float:
    """The gradient error at a temperature: on a straight line between the measured ones, beyond them the nearest."""
    points = sorted((float(one), error) for one, error in measured.items())
    return float(np.interp(temperature, *zip(*points, strict=True)))


def advice(measured: Mapping[str, float]) -> str:
    """What to do about a gradient that is off."""
    fine = [float(one) for one, error in measured.items() if error <= MOST]
    lower = f"take a temperature of {max(fine):g} or less, " if fine else ""
    return f"{lower}keep more of the logits, or store all of them as fp16"
