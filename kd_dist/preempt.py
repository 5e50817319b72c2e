"""The scheduler wants the machine back: SIGTERM or SIGUSR1 is noted, and work stops where nothing is lost."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from kd_dist.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GRACE = 60  # seconds that a loader process outlives SIGTERM, for the process that reads from it to end its step


class Notice:
    """Which signal has come, if one has."""

    name: str | None = None


@contextmanager
def noticed() -> Iterator[Notice]:
    """Within the block SIGTERM and SIGUSR1 end nothing: the notice that it yields holds the name of the last to come.

    Processes forked within the block share the handler. A scheduler may signal all of them at once: they live on for
    `GRACE` seconds, since a loader that died would take down the step that waits for it.
    """
    notice, owner = Notice(), os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            notice.name = signal.Signals(number).name
        elif number == signal.SIGTERM:
            signal.alarm(GRACE)

    with _handled(note):
        yield notice


@contextmanager
def stoppable(who: str) -> Iterator[None]:
    """Within it SIGTERM and SIGUSR1 raise Preempted: for commands that go on where they were."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Preempted(f"{who}: stopped by {signal.Signals(number).name}; the same command goes on")

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
