"""Progress of long work: a bar with rate and ETA on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PLAIN_LINE_SECONDS = 10.0


class Advance(Protocol):
    def __call__(self, count: int) -> None: ...


@contextmanager
def progress(label: str, total: int, unit: str, shown: bool = True) -> Iterator[Advance]:
    """Yield `advance(count)`. `shown=False` is for the other processes of a distributed run."""
    if not shown:
        yield lambda count: None
    elif sys.stderr.isatty():
        yield from _bar(label, total, unit)
    else:
        yield from _lines(label, total, unit)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} {self.unit}/s")


def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def _lines(label: str, total: int, unit: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= PLAIN_LINE_SECONDS and done < total:
            last = now
            rate = done / (now - start)
            left = (total - done) / rate
            print(f"{label}: {done:,}/{total:,} {unit}, {rate:,.0f}/s, {left:,.0f} s left", file=sys.stderr, flush=True)

    yield advance
    seconds = time.monotonic() - start
    print(f"{label}: {done:,} {unit} in {seconds:.1f} s", file=sys.stderr, flush=True)
