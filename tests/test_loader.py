"""Loader processes: what ends them, and what the training process says when one has ended."""

import json
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from processes import Started, run, sentence, start, wait_until
from torch.utils.data import Dataset

from kd_dist import assemble
from kd_dist.batch import Batch
from kd_dist.config import load
from kd_dist.epoch import run_evaluation
from kd_dist.loader import batches, worthwhile
from kd_dist.preempt import noticed
from kd_dist.stage import prepare

pytestmark = [pytest.mark.slow]
BATCHES = 3 * 60  # in as many epochs that the loaders have work to the end


def read(mark: str) -> None:
    """Read a training run's batches, slowly; what was read is the length of the file `mark`."""
    corridor = assemble.training_corridor(load("tiny.yaml", ["train.epochs=60"], "distill"), "distill", 0, 1)
    with noticed(), open(mark, "ab", buffering=0) as file:
        for batch in batches(corridor, 0, len(corridor), 2, pin=False):
            assert batch.images.any()
            file.write(b".")
            time.sleep(0.01)


def reading(lab: Path, mark: Path) -> tuple[Started, list[psutil.Process]]:
    """A process that has begun to read, and its loaders."""
    child = start(read, str(mark), folder=lab)
    begun = lambda: mark.exists() and mark.stat().st_size >= 3  # noqa: E731
    wait_until(lambda: begun() or not child.process.is_alive(), "three batches")
    assert begun(), child.wait()
    loaders = psutil.Process(child.process.pid).children()
    assert len(loaders) == 2
    return child, loaders


def wait_for_the_end(loaders: list[psutil.Process]) -> None:
    wait_until(lambda: not any(one.is_running() and one.status() != "zombie" for one in loaders), "the loaders' end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_that_is_sent_to_all_ends_no_loader(lab, tmp_path, number):
    child, loaders = reading(lab, tmp_path / "read")
    for one in loaders:
        one.send_signal(number)
    ended = child.wait()
    assert (ended.status, ended.output) == (0, "") and (tmp_path / "read").stat().st_size == BATCHES
    wait_for_the_end(loaders)


def test_no_loader_outlives_a_training_process_that_is_killed(lab, tmp_path):
    child, loaders = reading(lab, tmp_path / "read")
    os.kill(child.process.pid, signal.SIGKILL)
    assert child.wait().status == -signal.SIGKILL
    wait_for_the_end(loaders)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_a_loader_that_is_killed_is_a_sentence_and_keeps_nobody(lab, tmp_path, number):
    child, loaders = reading(lab, tmp_path / "read")
    loaders[0].send_signal(number)
    ended = child.wait()
    *before, said = ended.stderr.splitlines()
    assert ended.status == 1 and len(before) == (number == signal.SIGBUS)  # torch speaks of it, with a NUL
    assert said.lstrip("\0 ").startswith("error: a loader process has died (")
    assert "; lower data.workers (0 needs neither), or run the same command where there is more: " in said
    wait_for_the_end(loaders)


class Hanging(Dataset):
    """Two batches, and no third."""

    def __getitem__(self, cursor: int) -> Batch:
        if cursor > 1:
            time.sleep(120)
        rows = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
        return Batch(("one",), rows, torch.zeros(1, dtype=torch.long), None, torch.ones(1, dtype=torch.bool), 1, None)


def leave_hanging(mark: str) -> None:
    """Write to the file `mark` how many seconds it takes to let go of a loader that hangs."""
    stream = batches(Hanging(), 0, 9, 1, pin=False)
    _ = next(stream), next(stream)
    time.sleep(1)  # until the thread waits for the third
    began = time.monotonic()
    stream.close()
    Path(mark).write_text(f"{time.monotonic() - began}")


def test_a_loader_that_hangs_keeps_nobody_from_stopping(lab, tmp_path):
    child = start(leave_hanging, str(tmp_path / "seconds"), folder=lab)
    wait_until(lambda: (tmp_path / "seconds").exists() or not child.process.is_alive(), "the loader's end")
    ended = child.wait()
    assert (ended.status, ended.output) == (0, "") and float((tmp_path / "seconds").read_text()) < 30


def read_without_room(mark: str) -> None:
    """Read as a training process whose shared memory takes no more than a kilobyte: a batch has one and a half."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    read(mark)


def test_a_batch_that_cannot_be_handed_over_is_a_sentence_and_keeps_nobody(lab, tmp_path):
    ended = run(read_without_room, str(tmp_path / "read"), folder=lab)
    assert sentence(ended).startswith("a loader process has died (")
    *causes, _ = ended.stderr.splitlines()
    assert 1 <= len(causes) <= 2  # of two loaders
    for said in causes:
        assert said.startswith("a loader process could not hand over a batch: unable to ") and "File too large" in said
    assert (tmp_path / "read").stat().st_size == 0


def judge(runs: str, workers: int) -> None:
    """Judge a student one example at a time; write its metrics, and the most loader processes that there were."""
    whole = prepare(load("tiny.yaml", [f"runs={runs}", f"data.workers={workers}"], "pretrain"), "pretrain")
    singly, there = replace(whole.validation, plan=replace(whole.validation.plan, batch_size=1)), []
    whole.student.register_forward_hook(lambda *_: there.append(len(psutil.Process().children())))
    metrics = run_evaluation(replace(whole, validation=singly))
    left = len(psutil.Process().children())
    Path(f"{runs}-{workers}.json").write_text(json.dumps([metrics, len(there), max(there), left]))


def test_processes_read_for_the_evaluation_too_and_change_nothing(lab, tmp_path):
    found = {}
    for workers in (0, 2):
        ended = run(judge, str(tmp_path / "runs"), workers, folder=lab)
        assert (ended.status, ended.stderr) == (0, "")
        found[workers] = json.loads((tmp_path / f"runs-{workers}.json").read_text())
    alone, beside = found[0], found[2]
    assert alone[0] == beside[0] and {"accuracy", "nll"} <= set(alone[0])
    assert alone[1:] == [9, 0, 0] and beside[1:] == [9, 2, 0]


def test_few_batches_are_worth_no_process():
    assert [worthwhile(2, count) for count in (0, 3, 4, 7, 8, 1000)] == [0, 0, 1, 1, 2, 2]
    assert worthwhile(0, 1000) == 0
