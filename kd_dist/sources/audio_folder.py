"""Any folder of recordings and one CSV file that says what each of them is."""

import os
from pathlib import Path

from kd_dist.errors import DataError
from kd_dist.sources import Item, Listing
from kd_dist.sources.labels import number, read_labels


def audio_folder(
    root: str,
    label_columns: list[str],
    csv: str = "labels.csv",
    file_column: str = "file",
    split_column: str | None = None,
    group_column: str | None = None,
) -> Listing:
    """List the recordings that the rows of `root/csv` name, in their order.

    `file_column` holds paths from `root` on, `label_columns` the numbers that are wanted, which become the outputs. An
    empty label is NaN. `split_column` names the split of each, `group_column` what stays in one split, such as the song
    or the performer; an empty field is no group. Raises DataError for a missing column, a recording that is not there
    or stands twice, or a row without a file or a split.
    """
    top = Path(root)
    path = top / csv
    if not label_columns:
        raise DataError("data.options.label_columns: is empty; name the columns of the CSV file that hold the labels")
    chosen = [name for name in (split_column, group_column) if name is not None]
    items, seen = [], set()
    for row in read_labels(path, [file_column, *label_columns, *chosen]):
        name = row[file_column]
        file = os.path.normpath(name)
        if not name or file in seen:
            told = f"'{name}' stands twice" if name else f"a row has no '{file_column}'"
            raise DataError(f"{path}: {told}; every row is one recording")
        seen.add(file)
        if not (top / name).is_file():
            raise DataError(f"{path}: '{name}' is no file in {top}; correct or remove its row")
        if split_column is not None and not row[split_column]:
            raise DataError(f"{path}: '{name}' has no '{split_column}'; give it a split or remove its row")
        label = tuple(number(row, column, path) for column in label_columns)
        split = None if split_column is None else row[split_column]
        group = None if group_column is None else row[group_column] or None
        extension = Path(name).suffix[1:].lower()
        items.append(Item(name, split, extension, label, (top / name).read_bytes, group))
    if not items:
        raise DataError(f"{path}: has no row; every row is one recording")
    return Listing(tuple(label_columns), items)
