"""What a command says when it cannot go on."""

import errno

import pytest

from kd_dist.errors import INTERRUPTED, DataError, one_sentence


def ended_by(error: BaseException) -> SystemExit:
    with pytest.raises(SystemExit) as ended, one_sentence():
        raise error
    return ended.value


def test_a_mendable_error_is_its_sentence(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert ended_by(DataError("a.jpg: is empty; remove it")).code == "error: a.jpg: is empty; remove it"
    monkeypatch.setenv("RANK", "0")
    assert ended_by(DataError("a.jpg: is empty; remove it")).code == "error: a.jpg: is empty; remove it"
    monkeypatch.setenv("RANK", "3")
    assert ended_by(DataError("a.jpg: is empty; remove it")).code == "error (rank 3): a.jpg: is empty; remove it"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_nothing_is_a_sentence(number):
    said = ended_by(OSError(number, "the disk says no", "shards/a.tar")).code
    assert said.startswith("error: shards/a.tar: the disk says no; make room or choose another folder")


def test_an_interruption_is_no_error(capsys):
    assert ended_by(KeyboardInterrupt()).code == INTERRUPTED == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on where it was\n"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ZeroDivisionError("ours")])
def test_what_is_no_user_error_keeps_its_traceback(error):
    with pytest.raises(type(error)), one_sentence():
        raise error
