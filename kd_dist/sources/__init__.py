"""Raw data sets. One file a layout; a source lists items and reads none of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from kd_dist import choose
from kd_dist.errors import DataError, RecipeError


class Raw(NamedTuple):
    """One raw example, read, of which more is known now than when it was listed."""

    payload: bytes  # the encoded image or recording
    about: Mapping[str, Any]  # more metadata, JSON values: the landmarks of a face that had to be found
    extension: str | None = None  # of what it is encoded as, where its item does not say


class Item(NamedTuple):
    """One raw example, not yet read."""

    name: str  # relative path or other name, unique in its split; the example's key is made from it
    split: str | None  # None: the recipe's split fractions decide
    extension: str  # of the encoded image or recording, without the dot: png, mp3; "": `read` says it
    # Class index; or a mask's encoded PNG, or a picklable function that returns it; or numbers. Checked when packed.
    label: Any
    read: Callable[[], bytes | Raw]  # the encoded image or recording; picklable
    group: str | None = None  # items of a group stay in one split, as the windows of a song; None: its own name
    span: tuple[float, float] | None = None  # the part of a recording that the item is, in seconds; None: all of it
    about: Mapping[str, Any] = {}  # metadata to be packed beside the name, JSON values: the video of a frame
    not_in: tuple[str, ...] = ()  # splits in which it has no place; it is left out where it would be in one of them


class Listing(NamedTuple):
    """What a source found."""

    classes: tuple[str, ...]  # class names in index order
    items: Iterable[Item]
    notes: tuple[str, ...] = ()  # what was left out, for the user
    libraries: tuple[str, ...] = ()  # that decide what is packed, beside those of every folder


# Where each source lives: its library loads only when it is chosen.
SOURCES = {
    "audio_folder": "kd_dist.sources.audio_folder:audio_folder",
    "deam": "kd_dist.sources.deam:deam",
    "digits": "kd_dist.sources.digits:digits",
    "face_frames": "kd_dist.sources.face_frames:face_frames",
    "huggingface": "kd_dist.sources.huggingface:huggingface",
    "image_folder": "kd_dist.sources.image_folder:image_folder",
    "voc": "kd_dist.sources.voc:voc",
    "webdataset": "kd_dist.sources.webdataset:webdataset",  # tars that are linked, not packed: kd_dist.link
}


def source_function(name: str) -> Callable[..., Listing]:
    """The function of a source's name, or of the user's own `package.module:factory`."""
    return choose.imported(name if ":" in name else choose.entry(SOURCES, "source", name))


def list_items(name: str, root: str | None, options: dict[str, Any]) -> Listing:
    """Call the source that `data:` names with its options; `root` is passed when the recipe gives one."""
    function = source_function(name)
    given = {**options, **({} if root is None else {"root": root})}
    try:
        choose.check_options(function, given)
    except RecipeError as error:
        raise RecipeError(f"data.options of {name}: {error}") from error
    listing = function(**given)
    if not isinstance(listing, Listing):
        raise DataError(f"data.source {name}: returned {type(listing).__name__}, not a kd_dist.sources.Listing")
    return listing
