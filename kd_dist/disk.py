"""Files and folders that appear under their names whole and on disk, or not at all; folders in which one process writes
alone."""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kd_dist.errors import KdError

LOCK = ".lock"  # in a folder that a command writes to; holds the host and the process, and is locked while that lives
MAPPINGS = 2**15  # that `mapped` makes; Linux gives a process 65,530 of all kinds
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # what a file system without it says
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)  # of file systems that know none

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value  # what mmap gives where it cannot


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
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` at once, and durably, when the block ends well; else it
    is removed. What a killed process has left of one is removed too: the caller is alone here.

    Where the file system cannot exchange two names, a kill in the moment between two renames leaves no `folder`.
    Raises a KdError where `folder` is a file or a link, which no folder takes the place of.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise KdError(f"{folder}: is not a folder of its own; move it away, then run the same command again")
    for left in folder.parent.glob(f"{folder.name}.{'[0-9a-f]' * 8}.tmp"):
        shutil.rmtree(left)
    fresh = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            sync(path)
        if folder.exists():
            exchange(fresh, folder)
        else:
            os.rename(fresh, folder)
        sync(folder.parent)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


def exchange(one: Path, other: Path) -> None:
    """Let two folders have each other's name, at once where the file system can."""
    names = os.fsencode(one), os.fsencode(other)
    if _LIBC.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number not in _NO_EXCHANGE:
        raise OSError(number, os.strerror(number), str(other))
    exchange_in_turn(one, other)


def exchange_in_turn(one: Path, other: Path) -> None:
    """The same by three renames; after the first there is no `other`."""
    aside = one.with_name(f"{other.name}.{secrets.token_hex(4)}.tmp")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


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


class _Mapping:
    """Memory that shows a file, as NumPy asks for it; given back when the last array of it is gone."""

    live = 0

    def __init__(self, address: int, size: int):
        self.__array_interface__ = {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}
        _Mapping.live += 1

    def __del__(self):
        _LIBC.munmap(self.__array_interface__["data"][0], *self.__array_interface__["shape"])
        _Mapping.live -= 1


def mapped(path: Path) -> tuple[bytes, bytes | memoryview]:
    """The bytes of a file, read; and the same to keep, as a mapping that all processes of a machine share. A file that
    is renamed over it later changes neither.

    Unlike Python's `mmap` before 3.13 it keeps no descriptor. Beyond `MAPPINGS`, or where the file system knows none,
    what is to be kept is what was read. Only for a file that is never written in place: what is written so is believed,
    and a page that cannot be had when it is looked at kills the process (SIGBUS). Raises OSError when the file cannot
    be read.
    """
    with open(path, "rb", buffering=0) as file:
        data = file.readall()
        if not data or _Mapping.live >= MAPPINGS:
            return data, data
        address = _LIBC.mmap(None, len(data), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    return data, data if address == _FAILED else memoryview(np.asarray(_Mapping(address, len(data))))


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a folder, durable: fsync of a file does not cover its rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
