"""What can go wrong, each as one clear sentence: where, what, and what to do about it."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit status of what Ctrl-C ended


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


class TrainingError(KdError):
    """A training run that cannot go on."""


class Preempted(Exception):
    """Not an error: a signal asked the command to stop, and all that it had done is saved. Its exit status is 0."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """For the commands: an error that a user can mend becomes one sentence on stderr and exit status 1.

    Of several processes, all but the first say which one they are: often they fail for the same reason.
    """
    rank = os.environ.get("RANK", "0")
    label = "error" if rank == "0" else f"error (rank {rank})"
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        sys.exit(0)
    except KdError as error:
        sys.exit(f"{label}: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        sys.exit(
            f"{label}: {error.filename or 'writing'}: {error.strerror}; make room or choose another folder, then run "
            f"the same command again: finished shards and checkpoints are kept"
        )
