"""`manifest.json`: what a folder of shards is, so that nobody trains from the wrong one. See `shards/FORMAT.md`."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kd_dist
from kd_dist.errors import ShardError
from kd_dist.remote import Remote, at_once, location, read_whole, remedy
from kd_dist.shards import Shard, is_committed, published

FORMAT = "kd_dist"
FORMAT_VERSION = 2  # 1 knew neither tasks nor features
FILE_NAME = "manifest.json"
ABSENT = "(absent)"  # what `first_difference` shows for a value that one side does not have

_LIBRARIES = ("numpy", "pillow", "torch", "webdataset")


def write_manifest(folder: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write `content`, which must be JSON-able without NaN, with the format's name and version, whole or not at all."""
    marked = {**content, "format": FORMAT, "version": FORMAT_VERSION}
    text = json.dumps(marked, indent=1, sort_keys=True, allow_nan=False) + "\n"
    with published(Path(folder) / FILE_NAME) as file:
        file.write(text.encode("ascii"))


def read_manifest(folder: str | os.PathLike | Remote) -> dict[str, Any]:
    """The manifest of a folder of shards, `format` and `version` among its fields.

    Raises ShardError when it is missing, broken, of another program or of a version that this one does not read.
    """
    path = location(folder) / FILE_NAME
    again = remedy(path, "run kd-dist pack (examples) or kd-dist cache-teacher (signals)")
    try:
        content = json.loads(read_whole(path, _is_json))
    except FileNotFoundError as error:
        raise ShardError(f"{path}: there is no manifest, so these shards are not finished; {again}") from error
    except ValueError as error:
        raise ShardError(f"{path}: the manifest is damaged ({error}); delete it and {again}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ShardError(f"{path}: this is not a manifest of {FORMAT}; point to another folder, or {again}")
    version = content.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ShardError(
            f"{path}: the manifest has version {version!r} and this kd_dist reads version {FORMAT_VERSION}; install "
            f"the kd_dist that wrote it, or {again} into another folder"
        )
    return content


def finished(folder: str | os.PathLike | Remote) -> dict[str, Any] | None:
    """The manifest of a folder that was written to its end and still has every shard; None when it has to be made.

    Under a URL nothing can be made: raises ShardError for a shard that a finished folder there lacks.
    """
    path = location(folder)
    if not (path / FILE_NAME).is_file():
        return None
    content = read_manifest(path)
    if isinstance(path, Remote) and content.get("complete"):
        at_once(path, Shard, [path / row["name"] for row in content["shards"]])
        return content
    whole = content.get("complete") and all(is_committed(path / row["name"]) for row in content["shards"])
    return content if whole else None


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def first_difference(ours: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """Where two JSON values first differ, depth first in sorted key order: (dotted path, ours, theirs), or None.

    A list goes by positions, and a tuple counts as a list. 1 and 1.0 are equal, 1 and true are not. A value that one
    side lacks is shown as `ABSENT`.
    """
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
        same = ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool)
        return None if same else ("", ours, theirs)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            return str(name), ours.get(name, ABSENT), theirs.get(name, ABSENT)
        found = first_difference(ours[name], theirs[name])
        if found:
            path, left, right = found
            return f"{name}.{path}" if path else str(name), left, right
    return None


def versions() -> dict[str, str]:
    """The versions that can change what is written: Python, the libraries that decode and compute, and our own."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), "kd_dist": kd_dist.__version__, **libraries}


def plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples become lists, so that it compares with what a manifest holds."""
    return json.loads(json.dumps(value, allow_nan=False))


def digest(value: Any) -> str:
    """sha256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def shard_entry(shard: Shard) -> dict[str, Any]:
    """A shard as a manifest lists it."""
    return {"name": shard.path.name, "sha256": shard.sha256, "examples": len(shard)}


def fingerprint(content: Mapping[str, Any]) -> str:
    """One digest of all the bytes in a folder of shards: of the names, digests and counts that its manifest lists."""
    return digest(content["shards"])
