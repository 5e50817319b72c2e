"""The scheduler wants the machine back: SIGTERM or SIGUSR1 is noted, and work stops where nothing is lost."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from kd_dist.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Notice:
    """Which signal has come, if one has."""

    name: str | None = None


@contextmanager
def noticed() -> Iterator[Notice]:
    """Within the block SIGTERM and SIGUSR1 end nothing: the notice that it yields has the name of the last to come."""
    notice = Notice()

    def note(number: int, frame: FrameType | None) -> None:
        notice.name = signal.Signals(number).name

    with _handled(note):
        yield notice


@contextmanager
def stoppable(who: str, goes_on: bool) -> Iterator[None]:
    """Within it SIGTERM and SIGUSR1 raise Preempted. A command that `goes_on` where it was has not failed; of another
    nothing is left."""

    def stop(number: int, frame: FrameType | None) -> None:
        said = f"{who}: stopped by {signal.Signals(number).name}"
        if goes_on:
            raise Preempted(f"{said}; the same command goes on")
        raise Preempted(f"{said} before it had a result; run it again", 128 + number)

    with _handled(stop):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within it SIGNALS go to this handler, afterwards to those of before."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
