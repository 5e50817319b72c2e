"""Pascal VOC's layout of semantic segmentation: `JPEGImages/`, `SegmentationClass/` and lists of ids by split."""

from pathlib import Path

from kd_dist.errors import DataError
from kd_dist.sources import Item, Listing

IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
JOINED = "trainval"  # a list that repeats what the others hold

VOC_CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


def voc(root: str, class_names: list[str] | None = None) -> Listing:
    """List `root/ImageSets/Segmentation/<split>.txt`, one id a line, except `trainval.txt`.

    An item is `JPEGImages/<id>.jpg` with the mask `SegmentationClass/<id>.png`, whose values are the classes and 255
    for ignored pixels. `class_names`, in the order of these values, defaults to the 21 of Pascal VOC 2012.
    Raises DataError when a folder or the lists are missing, or an id stands in two places.
    """
    top = Path(root)
    for name in ("", IMAGES, MASKS, LISTS):
        if not (top / name).is_dir():
            raise DataError(
                f"data.root: {top / name}: no such folder; set data.root to the folder that holds {IMAGES}, {MASKS} "
                f"and {LISTS}"
            )
    lists = sorted(path for path in (top / LISTS).glob("*.txt") if path.stem != JOINED)
    if not lists:
        raise DataError(f"data.root: {top / LISTS}: holds no list of a split; expected train.txt, val.txt or the like")
    items, listed = [], {}
    for path in lists:
        for name in _ids(path):
            if name in listed:
                raise DataError(
                    f"{path}: '{name}' is already in {listed[name]}; an example has one place: take it out of one, or "
                    f"give a list that is not to be used another ending than .txt"
                )
            listed[name] = path
            mask, image = top / MASKS / f"{name}.png", top / IMAGES / f"{name}.jpg"
            items.append(Item(name, path.stem, "jpg", mask.read_bytes, image.read_bytes))
    return Listing(tuple(VOC_CLASSES if class_names is None else class_names), items)


def _ids(path: Path) -> list[str]:
    """The ids of a list. Lines may end as on any system; not every id need be UTF-8, as not every file name is."""
    lines = path.read_text("utf-8", "surrogateescape").splitlines()
    return [line.strip() for line in lines if line.strip()]
