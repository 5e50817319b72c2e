"""Class folders: `root/<class>/*.jpg`, or `root/<split>/<class>/*.jpg` when `root/train` exists."""

from collections.abc import Iterator
from pathlib import Path

from kd_dist.errors import DataError
from kd_dist.sources import Item, Listing

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm"}


def image_folder(root: str) -> Listing:
    """List class folders; classes are the sorted folder names, the same in every split.

    Raises DataError when the folder is missing, has no class folder, or a split has other classes than `train`.
    """
    top = Path(root)
    if not top.is_dir():
        raise DataError(f"data.root: {root}: no such folder; set data.root to the folder that holds the class folders")
    splits = _folders(top) if (top / "train").is_dir() else [None]
    per_split = {split: tuple(folder.name for folder in _folders(split or top)) for split in splits}
    first = splits[0] if splits[0] is None else top / "train"
    classes = per_split[first]
    if not classes:
        raise DataError(f"data.root: {first or top}: holds no class folder; expected {root}/<class>/*.jpg")
    for split, names in per_split.items():
        extra = sorted(set(names) - set(classes))
        if extra:
            raise DataError(f"{split / extra[0]}: class '{extra[0]}' is not among the classes of {first}; remove it")
    return Listing(classes, _items(top, splits, classes))


def _items(top: Path, splits: list[Path | None], classes: tuple[str, ...]) -> Iterator[Item]:
    for split in splits:
        for label, name in enumerate(classes):
            for path in sorted(((split or top) / name).rglob("*")):
                if path.suffix.lower() in EXTENSIONS and path.is_file():
                    relative = path.relative_to(split or top).as_posix()
                    yield Item(relative, split and split.name, path.suffix[1:].lower(), label, path.read_bytes)


def _folders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
