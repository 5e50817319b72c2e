"""`manifest.json`: what a folder of shards is, so that nobody trains from the wrong one. See `shards/FORMAT.md`."""

import hashlib
import importlib.metadata
import json
import operator
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kd_dist
from kd_dist.disk import published
from kd_dist.errors import ShardError
from kd_dist.remote import Remote, at_once, location, read_whole, remedy
from kd_dist.shards import Shard, is_committed

FORMAT = "kd_dist"
FORMAT_VERSION = 2  # 1 knew neither tasks nor features
FILE_NAME = "manifest.json"
GENERATED = "generated"  # the folder, beside those of the splits, of examples that no source lists
GENERATOR = "generator"  # the folder, beside those of the stages, of what makes them
ABSENT = "(absent)"  # what `first_difference` shows for a value that one side does not have

# What readers rely on in the manifest of a finished folder, by its kind; a tuple: one of several types.
_BOTH = {"shards": [{"name": str, "sha256": str, "examples": int}], "quarantined": [{"key": str}], "versions": {}}
_CONTENT = {
    "examples": {**_BOTH, "split": str, "task": str, "classes": int, "class_names": [str]},
    "signals": {
        **_BOTH,
        "examples_fingerprint": str,
        "teacher": {"name": str, "weights_sha256": str},
        "task": str,
        "classes": int,
        "views": {"count": int},
        "row_dtype": [],
        "codec": {"logits": (str, type(None)), "features": {}},
    },
}
_MEMBERS = {"image": [str], "label": str}  # of a folder whose tars others wrote
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.tar")  # of a shard: nothing that leaves its folder
_LIBRARIES = ("numpy", "pillow", "torch", "webdataset")  # of every folder


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
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: the manifest is damaged ({error}); delete it and {again}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ShardError(f"{path}: this is not a manifest of {FORMAT}; point to another folder, or {again}")
    version = content.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ShardError(
            f"{path}: the manifest has version {version!r} and this kd_dist reads version {FORMAT_VERSION}; install "
            f"the kd_dist that wrote it, or {again} into another folder"
        )
    refuse_senseless(folder, content)
    return content


def refuse_senseless(folder: str | os.PathLike | Remote, content: Mapping[str, Any]) -> None:
    """Raise a ShardError when readers could not use what the manifest of a finished folder says."""
    problem = _problem(content)
    if problem is not None:
        path = location(folder) / FILE_NAME
        again = remedy(path, "run kd-dist pack (examples) or kd-dist cache-teacher (signals)")
        raise ShardError(f"{path}: the manifest makes no sense: {problem}; delete it and {again}")


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


def _problem(content: Mapping[str, Any]) -> str | None:
    """What readers could not use in a manifest: a value of a wrong type, or a shard outside the folder."""
    if content.get("complete") is not True:  # what it lists may still be missing, and nobody reads by it
        return None
    if content.get("kind") not in _CONTENT:
        return f"kind is neither {' nor '.join(_CONTENT)}"
    foreign = {"members": _MEMBERS} if "members" in content else {}
    problem = _misfit(content, {**_CONTENT[content["kind"]], **foreign}, "")
    named = _NAME.fullmatch
    for row in [] if problem else content["shards"]:
        if not named(row["name"]) or not 0 <= row["examples"] < 2**32:
            problem = f"no folder has a shard {row['name']!r} of {row['examples']} examples"
    return problem


def _misfit(value: Any, wanted: Any, where: str) -> str | None:
    """Where a value is first of another type than `wanted`: a type, or several; a list or dict of what it holds; None:
    nowhere."""
    if isinstance(wanted, tuple):
        return None if type(value) in wanted else _misfit(value, wanted[0], where)
    kind = wanted if isinstance(wanted, type) else type(wanted)
    if type(value) is not kind:
        return f"{where.lstrip('.')} is no {kind.__name__}"
    inner: list[tuple[Any, Any, Any]] = []
    if isinstance(wanted, dict):
        inner = [(name, value.get(name), one) for name, one in wanted.items()]
    elif isinstance(wanted, list) and not (wanted and _alike(value, wanted[0])):
        inner = [(number, held, wanted[0]) for number, held in enumerate(value) if wanted]
    found = (_misfit(held, one, f"{where}.{name}") for name, held, one in inner)
    return next((one for one in found if one is not None), None)


def _alike(values: list[Any], wanted: Any) -> bool:
    """Whether all are dicts with fields of these plain types: quickly, since a large set has 10,000s of shards."""
    if not (isinstance(wanted, dict) and all(isinstance(kind, type) for kind in wanted.values())):
        return False
    try:
        return {dict} >= {*map(type, values)} and all(
            {kind} >= {*map(type, map(operator.itemgetter(name), values))} for name, kind in wanted.items()
        )
    except KeyError:
        return False


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
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


def versions(*more: str) -> dict[str, str]:
    """The versions that can change what is written: Python, the libraries that decode and compute, `more` of them, and
    our own."""
    libraries = {name: importlib.metadata.version(name) for name in (*_LIBRARIES, *more)}
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
