"""A signal of the scheduler is noted, by the process that it is meant for."""

import os
import signal
import time

import pytest

from kd_dist.errors import Preempted, one_sentence
from kd_dist.preempt import SIGNALS, noticed, stoppable


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_ends_nothing(number):
    before = signal.getsignal(number)
    with noticed() as notice:
        assert notice.name is None
        os.kill(os.getpid(), number)
        assert notice.name == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_forked_process_outlives_it_for_a_while():
    with noticed() as notice:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the test's own time limit uses it
            time.sleep(30)
            os._exit(7)
        for number in SIGNALS:
            os.kill(child, number)
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0) and notice.name is None
        os.kill(child, signal.SIGALRM)  # what ends it after a minute, had it not ended by itself
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGALRM


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_can_be_stopped_anywhere_says_so(number):
    before = signal.getsignal(number)
    with (
        pytest.raises(Preempted, match=f"^kd-dist: stopped by {signal.Signals(number).name}; the same"),
        stoppable("kd-dist"),
    ):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_being_preempted_is_no_failure(capsys):
    with pytest.raises(SystemExit) as end, one_sentence():
        raise Preempted("saved at step 3; the same command goes on")
    assert end.value.code == 0
    assert capsys.readouterr().err == "saved at step 3; the same command goes on\n"
