"""Someone's own webdataset: tars that are used as they are. `kd_dist.link` makes indexes for them."""

import glob
import os
from pathlib import Path
from typing import NamedTuple

from kd_dist.errors import DataError
from kd_dist.foreign import Members
from kd_dist.inputs.images import IMAGE_EXTENSIONS
from kd_dist.tars import is_pickled


class Tars(NamedTuple):
    """A webdataset, not yet read."""

    splits: dict[str, list[Path]]  # the tars of each, absolute, in order
    members: Members
    classes: tuple[str, ...] | None  # class names in index order; None: their numbers


def webdataset(
    root: str,
    image: str = "jpg;jpeg;png;webp",
    label: str = "cls",
    class_names: list[str] | None = None,
    **splits: str | list[str],
) -> Tars:
    """List the tars of each split, by patterns from `root` on: braces as in `{000000..000009}`, then `*`, `?`, `[]`.

    `image` gives the extensions of images, the first that an example has being taken; `label` that of an ASCII integer,
    or `json:field`. Raises DataError for a URL, a pattern without a tar, a tar that stands twice, or an option that
    names no image or label.
    """
    extension, colon, field = label.partition(":")
    label = f"{extension.lower()}{colon}{field}"
    images, label_extension = tuple(image.lower().split(";")), extension.lower()
    for extension in images:
        if extension.rpartition(".")[2] not in IMAGE_EXTENSIONS:
            known = ", ".join(IMAGE_EXTENSIONS)
            raise DataError(f"data.options.image: '{extension}' is none of {known}; name the members that hold images")
    if is_pickled(label_extension):
        raise DataError(f"data.options.label: '{label_extension}' is a pickle, which is never read; write integers")
    if label_extension in ("", "json") and not label.partition(":")[2]:
        raise DataError(f"data.options.label: '{label}' does not name the label; write cls, or json:field")
    if not splits:
        raise DataError("data.options: names no tars; give every split some, as in train: 'train-{000..009}.tar'")
    found = {split: _tars(root, split, pattern) for split, pattern in splits.items()}
    places: dict[Path, str] = {}
    for split, tars in found.items():
        for tar in tars:
            first = places.setdefault(tar.resolve(), split)
            if first != split or tars.count(tar) > 1:
                raise DataError(f"{tar}: stands twice in data.options, in '{first}' and '{split}'; a tar has one place")
    members = Members(images, label if ":" in label else label.lower())
    return Tars(found, members, None if class_names is None else tuple(class_names))


def _tars(root: str, split: str, pattern: str | list[str]) -> list[Path]:
    from braceexpand import UnbalancedBracesError, braceexpand  # webdataset's own

    where, found = f"data.options.{split}", []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        if not isinstance(one, str):
            raise DataError(f"{where}: must be a pattern of tars, or a list of them, not {pattern!r}")
        if "://" in root + one or one.startswith("pipe:"):
            raise DataError(
                f"{where}: '{one}' in '{root}' is no local file; index a local copy of the tars, then copy the folder "
                f"in shards/ to the store, links followed, and set data.shards to it"
            )
        try:
            names = list(braceexpand(one))
        except UnbalancedBracesError as error:
            raise DataError(f"{where}: '{one}' has unbalanced braces; close them") from error
        for name in names:
            matches = [name]
            if glob.has_magic(name):
                matches = sorted(glob.glob(name, root_dir=root))
            paths = [Path(os.path.abspath(Path(root) / match)) for match in matches]
            if not paths or not all(path.is_file() for path in paths):
                raise DataError(f"{where}: no file {Path(root) / name}; correct data.root or the pattern")
            found += paths
    return found
