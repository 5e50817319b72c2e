"""What can go wrong, each as one clear sentence: where, what, and what to do about it."""

import errno
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INTERRUPTED = 130  # exit status of what Ctrl-C ended
STOPPED = "KD_DIST_STOPPED"  # in the environment: the file that a command makes when a signal has stopped it
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


class KdError(Exception):
    """Base of every error that a user can mend. The command line prints the sentence and exits with 1."""


class RecipeError(KdError):
    """A recipe, or an override on the command line, that cannot be what was meant."""


class DataError(KdError):
    """Raw data, or an example in a shard, that cannot be read or does not fit the task."""


class ShardError(KdError):
    """A shard, index or manifest that is damaged, incomplete or not ours."""


class MismatchError(KdError):
    """Two things that must belong together do not: a cache and a recipe, a checkpoint and a recipe, two ranks."""


class ModelError(KdError):
    """A model that cannot be built, weights that do not fit it, or an output of the wrong kind."""


class ExportError(KdError):
    """A model that cannot be written in a format, or a file of one that cannot be run."""


class TrainingError(KdError):
    """A training run that cannot go on."""


class ContactError(KdError):
    """The other processes of a distributed run do not answer: one of them has died or hangs."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"lost contact with the other processes ({cause}); one of them has died or hangs: look for its message; "
            f"the same command goes on from the last checkpoint or finished shards"
        )


class LoaderError(KdError):
    """One of the processes that read ahead has died."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"a loader process has died ({cause}), most often for lack of memory, or of room in /dev/shm; lower "
            f"data.workers (0 needs neither), or run the same command where there is more: it goes on from the last "
            f"checkpoint"
        )


class Preempted(Exception):
    """Not an error: a signal asked the command to stop. Its exit status is 0 where all that it had done is saved and
    the same command goes on, else what a shell gives for the signal."""

    def __init__(self, said: str = "", status: int = 0) -> None:
        super().__init__(said)
        self.status = status


def check_mark() -> None:
    """Raise a KdError when `mark_stopped` could not make its file, and not only when the signal has come."""
    path = os.environ.get(STOPPED)
    if path:
        try:
            tempfile.TemporaryFile(dir=Path(path).parent).close()
        except OSError as error:
            raise KdError(f"{STOPPED}={path}: {error.strerror}; name a file that can be written") from error


def mark_stopped() -> None:
    """Make the file by which a job script learns that its command was stopped: the exit status does not say it."""
    path = os.environ.get(STOPPED)
    if path:
        try:
            Path(path).touch()
        except OSError as error:
            sys.exit(f"error: {STOPPED}={path}: {error.strerror}; name a file that can be written")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, torch's allocator for the CPU or Python had too little memory."""
    # By name: a command that needs no torch should not load it for its errors.
    if isinstance(error, MemoryError) or "OutOfMemoryError" in _names(error):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        words in text for words in ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    )


def is_lost_contact(error: BaseException) -> bool:
    """Whether torch.distributed failed: by an error of its own, or a RuntimeError that names the sources of gloo."""
    return "DistError" in _names(error) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def is_lost_worker(error: BaseException) -> bool:
    """Whether torch has found one of this process's loader processes dead."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def cause(error: BaseException) -> str:
    """What a library's error says, in one line, without the place in its sources, its stack and its advice."""
    text = re.split(r"Exception raised from|This is typically", str(error))[0]
    return textwrap.shorten(re.sub(r"^\[[^]]*\]", "", text), 300).rstrip(".") or type(error).__name__


def _names(error: BaseException) -> set[str]:
    return {one.__name__ for one in type(error).__mro__ if one.__module__.partition(".")[0] == "torch"}


@contextmanager
def one_sentence() -> Iterator[None]:
    """For the commands: an error that a user can mend becomes one sentence on stderr and exit status 1.

    Of several processes, all but the first say which one they are: often they fail for the same reason.
    """
    rank = os.environ.get("RANK", "0")
    label = "error" if rank == "0" else f"error (rank {rank})"
    try:
        check_mark()
        yield
    except KeyboardInterrupt:
        if rank == "0":  # a terminal interrupts all
            print("interrupted; the same command goes on from the last checkpoint or finished shard", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Preempted as stop:
        if str(stop):  # of ranks that stop together, the first alone speaks
            print(stop, file=sys.stderr, flush=True)
        mark_stopped()
        sys.exit(stop.status)
    except KdError as error:
        sys.exit(f"{label}: {error}")
    except OSError as error:
        if error.errno not in (*NO_ROOM, errno.EIO):
            raise
        mend = "make room or choose another folder" if error.errno in NO_ROOM else "check the disk"
        sys.exit(
            f"{label}: {error.filename or 'writing'}: {error.strerror}; {mend}, then run the same command again: "
            f"finished shards and checkpoints are kept"
        )
    except Exception as error:
        if is_out_of_memory(error):
            sys.exit(
                f"{label}: out of memory ({cause(error)}); take a smaller batch, image or model, or run the same "
                f"command where there is more"
            )
        if is_lost_contact(error):
            sys.exit(f"{label}: {ContactError(cause(error))}")
        if is_lost_worker(error):
            sys.exit(f"{label}: {LoaderError(cause(error))}")
        raise
