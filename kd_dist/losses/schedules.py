"""How the weight of a loss changes over a run: pure functions of the epoch.

A recipe writes a weight as a number, which is constant, or as a mapping of one schedule's name to its options:
`weight: {step: {values: [0.95, 0.85, 0.75, 0.65, 0.5], every: 5}}`.
`epoch` is a float that counts from 0 and grows within an epoch; `epochs` is the length of the run, at least 1.
"""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from kd_dist.choose import check_options, entry, fits
from kd_dist.errors import RecipeError


def constant(epoch: float, epochs: int, *, value: float) -> float:
    """`value`, always."""
    return value


def linear(epoch: float, epochs: int, *, start: float, end: float, over: float | None = None) -> float:
    """A straight line from `start` at epoch 0 to `end` after `over` epochs (null: the whole run), where it stays."""
    return start + (end - start) * _done(epoch, epochs if over is None else over)


def cosine(epoch: float, epochs: int, *, start: float, end: float, over: float | None = None) -> float:
    """Half a cosine wave from `start` at epoch 0 to `end` after `over` epochs (null: the whole run), flat at both ends;
    `end` stays."""
    return end + (start - end) * (1 + math.cos(math.pi * _done(epoch, epochs if over is None else over))) / 2


def step(epoch: float, epochs: int, *, values: list[float], every: float) -> float:
    """A staircase: the next of `values` after each `every` epochs; the last one holds. RecipeError: no steps."""
    if not values or every <= 0:
        raise RecipeError(f"step needs at least one value, and 'every' above 0, not values {values} and every {every}")
    # An epoch is a quotient of steps, so 0.3 / 0.1 may fall a rounding short of the third stair.
    return values[min(int(epoch / every + 1e-9), len(values) - 1)]


def _done(epoch: float, over: float) -> float:
    """The part of `over` epochs that is done, in [0, 1]. RecipeError: there is none."""
    if over <= 0:
        raise RecipeError(f"'over' must be above 0, not {over}; leave it out for the whole run")
    return min(epoch / over, 1.0)


SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step,
}


def check_weight(weight: Any) -> None:
    """Raise a RecipeError unless `weight` is what a recipe may write: finite, not negative, at every epoch."""
    name, options = _schedule(weight)
    try:
        check_options(entry(SCHEDULES, "schedule", name), options, given=("epoch", "epochs"))
        for option, value in options.items():
            for number in value if isinstance(value, (list, tuple)) else [value]:
                if number is not None and not 0 <= number <= sys.float_info.max:
                    raise RecipeError(f"'{option}' must be finite and not negative, not {value}")
        weight_at(weight, epoch=0.0, epochs=1)
    except RecipeError as error:
        raise RecipeError(f"weight: {error}") from error


def weight_at(weight: Any, epoch: float, epochs: int) -> float:
    """The value of a weight, as a recipe writes it, at `epoch` of a run of `epochs`."""
    name, options = _schedule(weight)
    return SCHEDULES[name](epoch, epochs, **options)


def _schedule(weight: Any) -> tuple[str, Mapping[str, Any]]:
    """The schedule's name and options that a weight stands for."""
    if fits(weight, float):
        return "constant", {"value": weight}
    if isinstance(weight, Mapping) and len(weight) == 1:
        [(name, options)] = weight.items()
        if isinstance(options, Mapping):
            return name, options
    raise RecipeError(
        "weight: must be a number or one schedule with its options, "
        f"such as {{linear: {{start: 1.0, end: 0.5}}}}, not {weight!r}"
    )
