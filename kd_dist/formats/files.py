"""What every format does alike: a file that appears whole or not at all, in silence, or fails with one sentence."""

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kd_dist.disk import published
from kd_dist.errors import ExportError, Preempted, cause, is_out_of_memory


@contextlib.contextmanager
def writing(name: str, path: Path) -> Iterator[BinaryIO]:
    """The file that a format is written to. What its libraries print meanwhile is not shown.

    Raises an ExportError when the model cannot be written in the format; too little memory or disk stays what it is.
    """
    try:
        with published(path) as file, _quiet():
            yield file
    except Exception as error:  # every exporter has exceptions of its own for what it does not know
        first = _first(error)
        if isinstance(first, Preempted):  # a signal, and no fault of the model's
            raise first from None
        if isinstance(first, (ExportError, OSError)) or is_out_of_memory(first):
            raise
        raise ExportError(
            f"{path}: this model cannot be written as {name} ({_line(first)}); leave {name} out of export.formats, or "
            f"change the model"
        ) from error


@contextlib.contextmanager
def opening(name: str, path: Path) -> Iterator[None]:
    """Raises an ExportError when a file is not one of this format, or not whole."""
    if not path.is_file():
        raise ExportError(f"{path}: no such file; run `kd-dist export` again")
    said: list[str] = []
    try:
        with _quiet(), _lines_of_c(said):
            yield
    except Exception as error:  # every reader has its own exception for a damaged file
        first = _first(error)
        if isinstance(first, Preempted):
            raise first from None
        if is_out_of_memory(error):
            raise
        raise ExportError(
            f"{path}: cannot be opened as {name} ({said[-1] if said else _line(error)}); copy the file again, or run "
            f"`kd-dist export` again"
        ) from error


def _first(error: BaseException) -> BaseException:
    """The error from which an exporter has made its own, which says where in the exporter it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    """The first line of what an error says; below it are stacks and advice to those who program."""
    return cause(Exception(next(filter(str.strip, str(error).splitlines()), type(error).__name__)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, no log lines below an error, nothing that Python code prints. An exception is an exception."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _lines_of_c(said: list[str]) -> Iterator[None]:
    """What C++ code writes to stderr becomes lines of `said`: of a damaged file they alone may tell the reason."""
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                file.seek(0)
                said += file.read().decode(errors="replace").splitlines()
    finally:
        os.close(kept)
