"""What the benchmarks share: clocks, contenders that take turns, ratios with their spread, and figures with a goal.

A ratio is taken within a turn, so that a busy machine hurts both sides of it; its value is the median over the turns.
"""

import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Clock = Callable[[], float]  # seconds

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}  # the latter of all this one's threads
RELATIONS = {"<=": operator.le, ">=": operator.ge}


class Ratio(NamedTuple):
    """A ratio over several turns."""

    value: float  # the median
    low: float
    high: float


class Figure(NamedTuple):
    """A line of the table that `tools/bench` prints."""

    what: str
    value: float
    low: float
    high: float
    goal: str  # such as "<= 1.02"; empty for a figure that stands beside another
    unit: str = ""  # empty: a ratio
    note: str = ""  # what it was measured on, in a few words

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if not self.goal:
            return None
        relation, wanted = self.goal.split()
        return RELATIONS[relation](self.value, float(wanted))


def in_turns(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender by turn: all take one turn after the other, `rounds` times, after `warm_up` rounds that
    are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        for name, run in contenders.items():
            began = clock()
            run()
            taken = clock() - began
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> Ratio:
    """`over` / `under` within each turn: the median, the lowest and the highest."""
    found = [one / other for one, other in zip(over, under, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))


def figure(what: str, found: Ratio, goal: str, note: str = "") -> Figure:
    """A ratio as a figure."""
    return Figure(what, *found, goal, note=note)


def as_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Figures as a benchmark prints them under "figures" with `--json`."""
    return [one._asdict() | {"met": one.met} for one in figures]
