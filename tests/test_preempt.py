"""A signal of the scheduler is noted, by the process that it is meant for."""

import os
import re
import signal

import pytest

from kd_dist.errors import STOPPED, Preempted, one_sentence
from kd_dist.preempt import SIGNALS, noticed, stoppable


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_ends_nothing(number):
    before = signal.getsignal(number)
    with noticed() as notice:
        assert notice.name is None
        os.kill(os.getpid(), number)
        assert notice.name == signal.Signals(number).name
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_can_be_stopped_anywhere_says_so(number):
    before = signal.getsignal(number)
    with (
        pytest.raises(Preempted, match=f"^kd-dist: stopped by {signal.Signals(number).name}; the same"),
        stoppable("kd-dist", goes_on=True),
    ):
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_has_nothing_to_go_on_from_has_failed(capsys, number):
    with pytest.raises(SystemExit) as end, one_sentence(), stoppable("kd-dist verify", goes_on=False):
        os.kill(os.getpid(), number)
    assert end.value.code == 128 + number
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"kd-dist verify: stopped by {name} before it had a result; run it again\n"


def test_being_preempted_is_no_failure_and_a_job_script_learns_of_it(capsys, tmp_path, monkeypatch):
    for path in (None, tmp_path / "stopped"):
        if path is not None:
            monkeypatch.setenv(STOPPED, str(path))
        with pytest.raises(SystemExit) as end, one_sentence():
            raise Preempted("saved at step 3; the same command goes on")
        assert end.value.code == 0
        assert capsys.readouterr().err == "saved at step 3; the same command goes on\n"
        assert list(tmp_path.iterdir()) == ([] if path is None else [path])
    (tmp_path / "absent").mkdir()
    monkeypatch.setenv(STOPPED, str(tmp_path / "absent" / "stopped"))
    with pytest.raises(SystemExit) as end, one_sentence():
        (tmp_path / "absent").rmdir()
        raise Preempted
    assert end.value.code.endswith("absent/stopped: No such file or directory; name a file that can be written")


@pytest.mark.parametrize("place", ["absent/stopped", "file/stopped", "/proc/stopped"])
def test_a_mark_that_could_not_be_made_is_found_before_anything_is_begun(tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    path, begun = str(tmp_path / place), []
    monkeypatch.setenv(STOPPED, path)
    with pytest.raises(SystemExit) as end, one_sentence():
        begun.append(True)
    assert re.fullmatch(rf"error: {STOPPED}={path}: [\w ]+; name a file that can be written", end.value.code)
    assert not begun and [one.name for one in tmp_path.iterdir()] == ["file"]
