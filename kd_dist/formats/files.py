"""What every format does alike: a file that appears whole or not at all, in silence, or fails with one sentence."""

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kd_dist.disk import published
from kd_dist.errors import ExportError, cause, is_out_of_memory


@contextlib.contextmanager
def writing(name: str, path: Path) -> Iterator[BinaryIO]:
    """The file that a format is written to. What its libraries say below an error is not shown.

    Raises an ExportError when the model cannot be written in the format; no memory and no disk stay what they are.
    """
    try:
        with published(path) as file, _quiet():
            yield file
    except Exception as error:  # every exporter has exceptions of its own for what it does not know
        reason = _first(error)
        if isinstance(reason, (ExportError, OSError)) or is_out_of_memory(reason):
            raise
        raise ExportError(
            f"{path}: this model cannot be written as {name} ({cause(reason)}); leave {name} out of export.formats, or "
            f"change the model"
        ) from error


@contextlib.contextmanager
def opening(name: str, path: Path) -> Iterator[None]:
    """Raises an ExportError when a file is not one of this format, or not whole."""
    if not path.is_file():
        raise ExportError(f"{path}: no such file; run `kd-dist export` again")
    said = io.BytesIO()
    try:
        with _quiet(), _no_lines_of_c(said):
            yield
    except Exception as error:  # every reader has its own exception for a damaged file
        reason = _first(error)
        if isinstance(reason, ExportError) or is_out_of_memory(reason):
            raise
        lines = said.getvalue().decode(errors="replace").splitlines()
        reason = RuntimeError(lines[-1]) if lines else reason
        raise ExportError(
            f"{path}: cannot be opened as {name} ({cause(reason)}); copy it or run `kd-dist export` again"
        ) from error


def _first(error: BaseException) -> BaseException:
    """The error from which an exporter has made its own, which says where in the exporter it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings, nor log lines below an error, nor prints of Python code."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _no_lines_of_c(said: BinaryIO) -> Iterator[None]:
    """What C++ code writes to stderr goes to `said`: of a damaged file it alone tells the reason."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                file.seek(0)
                said.write(file.read())
    finally:
        os.close(kept)
