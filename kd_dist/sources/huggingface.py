"""A folder of Hugging Face `datasets`: of `save_to_disk`, or Parquet files named as on the hub. Never online."""

import functools
import re
from pathlib import Path
from typing import Any

from kd_dist.errors import DataError, KdError
from kd_dist.inputs.images import opened
from kd_dist.sources import Item, Listing, Raw

SAVED = ("dataset_dict.json", "state.json")  # written by `save_to_disk`: of several splits, of one
VALIDATION = ("validation", "valid", "dev")  # what the hub calls the split `val`
EXTENSIONS = {"JPEG": "jpg", "PPM": "ppm"}  # of formats that are not called so
_SPLIT = re.compile(r"([A-Za-z0-9_]+?)(-(?P<number>[0-9]{5})-of-(?P<total>[0-9]{5}).*)?\.parquet")
MOST_CLASSES = 2**20  # that a label without names may count to


def huggingface(root: str, image: str = "image", label: str = "label", splits: dict | None = None) -> Listing:
    """List the rows of `root`; their names are their numbers in the split.

    `image` and `label` name the columns. `splits` says which split of the folder becomes which of the recipe, as in
    `{train: train, val: test}`; without it they keep their names, `validation` being `val`, and where there is one
    alone, `data.splits` divides it. Raises KdError without the library, DataError when the folder or a column is
    missing, or a column is of another type.
    """
    try:
        import datasets
    except ImportError as error:
        raise KdError(
            f"data.source huggingface: needs the library datasets, which is not installed ({error}); pip install "
            f"'kd_dist[huggingface]'"
        ) from error
    held = _splits(Path(root), datasets)
    chosen: dict[str | None, Any] = {}
    if splits is not None:
        for mine, split in splits.items():
            if not isinstance(split, str) or split not in held:
                known = ", ".join(held)
                raise DataError(f"data.options.splits: {root} has no split {split!r}, only {known}; name one of these")
            twin = next(one for one in splits if splits[one] == split)
            if twin != mine:
                raise DataError(f"data.options.splits: '{split}' would be {twin} and {mine}; give each its own")
        chosen = {mine: held[split] for mine, split in splits.items()}
    elif len(held) == 1:
        [chosen[None]] = held.values()
    else:
        chosen = {"val" if split in VALIDATION else split: one for split, one in held.items()}
    classes, items = (), []
    for split, one in chosen.items():
        names, labels = _labels(root, one, image, label)
        if classes and names and names != classes:
            raise DataError(f"{root}: its splits have other classes, {names} and {classes}; cast them to the same")
        classes = classes or names
        images = one.select_columns([image])
        if isinstance(one.features[image], datasets.Image):
            images = images.cast_column(image, datasets.Image(decode=False))
        items += [
            Item(f"{row:08d}", split, "", number, functools.partial(_read, images, image, row))
            for row, number in enumerate(labels)
        ]
    return Listing(classes or _numbers(items), items, libraries=("datasets",))


def _splits(top: Path, datasets: Any) -> dict[str, Any]:
    """The data sets of a folder by the names of their splits; without a name, one that is called train."""
    if not top.is_dir():
        raise DataError(f"data.root: {top}: no such folder; set data.root to one of save_to_disk or of Parquet files")
    try:
        if any((top / name).is_file() for name in SAVED):
            loaded = datasets.load_from_disk(str(top))
            return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
        files: dict[str, list[str]] = {}
        numbers: dict[tuple[str, str], set[int]] = {}
        for path in sorted([*top.glob("*.parquet"), *top.glob("data/*.parquet")]):
            if (found := _SPLIT.fullmatch(path.name)) is None:
                raise DataError(f"{path}: is not named as on the hub, train-00000-of-00003.parquet; rename it")
            files.setdefault(found[1], []).append(str(path))
            if found["number"] is not None:
                numbers.setdefault((found[1], found["total"]), set()).add(int(found["number"]))
        for (split, total), there in numbers.items():
            lost = set(range(int(total))) - there
            if lost:
                raise DataError(f"{top}: lacks {split}-{min(lost):05d}-of-{total}.parquet; download it again")
        if files:
            return {split: datasets.Dataset.from_parquet(paths) for split, paths in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, datasets.exceptions.DatasetsError) as error:
        said = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"data.root: {top}: cannot be loaded ({said}); save or download it again") from error
    raise DataError(
        f"data.root: {top}: holds neither what save_to_disk writes nor Parquet files, here or in data/; set data.root "
        f"to the folder that does"
    )


def _labels(root: str, one: Any, image: str, label: str) -> tuple[tuple[str, ...], list[Any]]:
    """The class names, if the column has some, and the label of each row."""
    for option, column in (("image", image), ("label", label)):
        if column not in one.features:
            names = ", ".join(one.features)
            raise DataError(f"data.options.{option}: {root} has no column '{column}', only {names}; name one of these")
    kind = one.features[label]
    names = tuple(getattr(kind, "names", None) or ())
    if not names and not str(getattr(kind, "dtype", "")).startswith(("int", "uint")):
        raise DataError(
            f"data.options.label: column '{label}' of {root} holds no class indices ({kind}); name another, or use "
            f"class_encode_column and save it again"
        )
    return names, one.select_columns([label])[:][label]


def _numbers(items: list[Item]) -> tuple[str, ...]:
    """Names of classes that have none: their indices, up to the largest label. Raises DataError for what is none."""
    largest = max((item.label for item in items if item.label is not None), default=-1)
    if largest >= MOST_CLASSES:
        raise DataError(f"data.options.label: the column holds {largest:,}, which is no class index; name another")
    return tuple(map(str, range(1 + largest)))


def _read(images: Any, column: str, row: int) -> Raw:
    """One image as it is stored, and what it is encoded as. Raises DataError when the row has none of its own."""
    held = images[row][column]
    about, payload = {}, held
    if isinstance(held, dict):
        about, payload = {"file": Path(held["path"]).name} if held.get("path") else {}, held.get("bytes")
    if not isinstance(payload, bytes):
        raise DataError("the row holds no image, or only a path to one; embed the images and save it again")
    with opened(payload, "image") as image:
        return Raw(payload, about, EXTENSIONS.get(image.format, str(image.format).lower()))
