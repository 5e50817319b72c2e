"""What long work shows: lines in a file, a bar on a terminal, nothing from the other processes."""

import contextlib
import os
import re

import pytest

from kd_dist import progress as module
from kd_dist.progress import progress


def test_the_other_processes_show_nothing(capsys):
    with progress("pack", 10, "examples", shown=False) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_lines_when_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(module, "PLAIN_LINE_SECONDS", 0.0)
    with progress("pack", 3000, "examples") as advance:
        for _ in range(3):
            advance(1000)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3  # the last step is the summary's
    assert re.fullmatch(r"pack: 1,000/3,000 examples, [\d,]+/s, \d+ s left", lines[0])
    assert re.fullmatch(r"pack: 2,000/3,000 examples, [\d,]+/s, \d+ s left", lines[1])
    assert re.fullmatch(r"pack: 3,000 examples in \d+\.\d s", lines[2])


def test_lines_are_rare(capsys):
    with progress("pack", 100, "examples") as advance:
        for _ in range(100):
            advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_work_that_fails_reports_no_end(capsys):
    with pytest.raises(KeyError), progress("pack", 2, "examples") as advance:
        advance(1)
        raise KeyError
    assert capsys.readouterr().err == ""


def received(terminal: int) -> str:
    """All that a terminal was sent, once its other end is closed; Linux reports the end as an I/O error."""
    data = b""
    with os.fdopen(terminal, "rb", buffering=0) as read, contextlib.suppress(OSError):
        while part := read.read(65536):
            data += part
    return data.decode()


def test_a_bar_on_a_terminal(monkeypatch):
    terminal, end = os.openpty()
    with os.fdopen(end, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        with progress("cache train", 1500, "examples") as advance:
            advance(500)
            advance(1000)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", received(terminal))
    assert "cache train" in shown
    assert "1500/1500" in shown
    assert re.search(r"[\d,]+ examples/s", shown)
