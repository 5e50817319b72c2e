"""Labels in a CSV file, read strictly: every fault is one sentence with file and line."""

import csv
from collections.abc import Iterable
from pathlib import Path

from kd_dist.errors import DataError


def read_labels(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header: the fields by column, both without the spaces around them; a field that a
    row lacks is empty. Raises DataError unless the file can be read and has all of `columns`, each once.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; set data.root, or data.options, so that it is found") from None
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no CSV file in UTF-8 ({error}); save it as one") from error
    header = [name.strip() for name in table[0]] if table else []
    for name in columns:
        if header.count(name) != 1:
            shown = ", ".join(header[:30]) or "none"
            raise DataError(f"{path}: needs one column '{name}', found {shown}; correct the header, or name another")
    rows = []
    for number, row in enumerate(table[1:], 2):
        if len(row) > len(header):
            raise DataError(f"{path}: row {number} has {len(row)} fields, the header {len(header)}; correct it")
        fields = [field.strip() for field in row] + [""] * (len(header) - len(row))
        rows.append(dict(zip(header, fields, strict=True)))
    return rows


def number(row: dict[str, str], column: str, path: Path) -> float:
    """A field as a number; NaN when it is empty. Raises DataError for another text."""
    try:
        return float(row[column] or "nan")
    except ValueError:
        raise DataError(f"{path}: '{row[column]}' in column '{column}' is no number; correct it, or empty it") from None
