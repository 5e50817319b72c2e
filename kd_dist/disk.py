"""Files that appear under their names whole and on disk, or not at all; folders in which one process writes alone."""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kd_dist.errors import KdError

LOCK = ".lock"  # in a folder that a command writes to; holds the host and the process, and is locked while that lives
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)  # of file systems that know none


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless it is there. Raises a KdError when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KdError(f"{folder}: cannot be made a folder ({error.strerror}); choose another one") from error


@contextlib.contextmanager
def published(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears under `path` whole and on disk, or not at all. Makes the folder if need be.

    What a killed process has left of the same file is removed. Of two that write it at once the last to begin
    publishes it, and the other gets a KdError. An OSError has the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: under a common one another writer would publish what is half written.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        for other in path.parent.glob(f"{path.name}.{'[0-9a-f]' * 8}.tmp"):
            if other != temporary:
                other.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _still_there(temporary, path):
            os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):  # of a full disk, write() does not say which
            error.filename = error.filename or str(path)
        raise
    sync(path.parent)


@contextlib.contextmanager
def _still_there(temporary: Path, path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise KdError(
            f"{path}: {temporary.name} was taken away before it was whole, so another process writes here too; let one "
            f"of them end, then run the same command again"
        ) from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which the kernel takes back however this process ends. Raises a KdError when another
    process has it, or when there can be no such folder. Where the file system knows no locks there is a warning."""
    make_folder(folder)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise KdError(
                f"{folder}: {file.read() or 'another process'} is writing here; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"warning: {folder}: its file system has no locks ({error.strerror}), so nothing keeps a second "
                f"command from writing here; start none",
                file=sys.stderr,
                flush=True,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # not removed: another process may have it open


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable: fsync of a file does not cover its rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
