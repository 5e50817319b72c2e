"""What a command says when it cannot go on."""

import errno
import os
import re
import signal
from datetime import timedelta

import numpy as np
import pytest
import torch
from processes import sentence, start_ranks
from torch import distributed

from kd_dist.errors import (
    INTERRUPTED,
    ContactError,
    DataError,
    cause,
    is_lost_contact,
    is_out_of_memory,
    one_sentence,
)


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
    said = "interrupted; the same command goes on from the last checkpoint or finished shard\n"
    assert capsys.readouterr().err == said


def test_a_disk_that_breaks_is_a_sentence():
    said = ended_by(OSError(errno.EIO, "Input/output error", "shards/a.tar")).code
    assert said.startswith("error: shards/a.tar: Input/output error; check the disk, then run the same command again:")


@pytest.mark.parametrize(
    "error", [OSError(errno.EINVAL, "odd"), ZeroDivisionError("ours"), RuntimeError("ours"), ValueError("no memory")]
)
def test_what_is_no_user_error_keeps_its_traceback(error):
    with pytest.raises(type(error)), one_sentence():
        raise error


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "allocate, words",
    [
        (lambda: torch.empty(2**50), "DefaultCPUAllocator: can't allocate memory: you tried to allocate "),
        (lambda: bytearray(2**60), "MemoryError"),
        (lambda: np.empty(2**55), "Unable to allocate 256. PiB for an array"),
    ],
)
def test_too_little_memory_is_a_sentence(allocate, words):
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        allocate()
    assert is_out_of_memory(raised.value) and not is_lost_contact(raised.value)
    said = ended_by(raised.value).code
    assert said.startswith("error: out of memory (") and words in said and "\n" not in said
    assert said.endswith("; take a smaller batch, image or model, or run the same command where there is more")


def test_the_memory_of_a_gpu_is_known_by_its_class():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


# ---------------------------------------------------------------------------------------------- contact


def meet(arguments: list[str]) -> None:
    """A process of two, of which the second dies before they meet, or keeps the first waiting."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=5))
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL if arguments == ["dies"] else signal.SIGSTOP)
    distributed.barrier()


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, words", [("dies", r"\(.*Connection (closed|reset) by peer"), ("hangs", r"\(Timed out waiting \d+ms for ")]
)
def test_a_process_that_is_gone_is_a_sentence_to_the_others(tmp_path, what, words):
    (tmp_path / "home").mkdir()
    both = start_ranks(meet, [[what], [what]], tmp_path / "home")
    said = sentence(both[0].wait())
    assert both[1].kill().status == -signal.SIGKILL
    assert re.match("lost contact with the other processes " + words, said), said
    assert said.isascii() and said.endswith(
        "); one of them has died or hangs: look for its message; the same command goes on from the last checkpoint or "
        "finished shards"
    )


def test_what_torch_distributed_raises_is_lost_contact(monkeypatch):
    """A store that nobody serves, and a key that nobody sets."""
    monkeypatch.setenv("RANK", "1")
    short, found = timedelta(seconds=0.2), []
    with pytest.raises(distributed.DistNetworkError) as raised:
        distributed.TCPStore("127.0.0.1", 1, is_master=False, timeout=short)
    found.append(raised.value)
    with pytest.raises(distributed.DistStoreError) as raised:
        distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=short).get("never")
    found.append(raised.value)
    for error in (*found, distributed.DistBackendError("NCCL error in: /pytorch/x.cpp:94, remote process exited")):
        assert is_lost_contact(error) and not is_out_of_memory(error)
        said = ended_by(error).code
        assert said.startswith("error (rank 1): lost contact with the other processes (") and "\n" not in said


def test_a_cause_is_one_line():
    text = "[/a/gloo/b.cc:1] Connection closed by peer [127.0.0.1]:7. This is typically\nException raised from x"
    assert cause(RuntimeError(text)) == "Connection closed by peer [127.0.0.1]:7"
    assert cause(MemoryError()) == "MemoryError" and len(cause(RuntimeError("word " * 1000))) <= 300
    assert str(ContactError("late")).startswith("lost contact with the other processes (late); one of them has died")
