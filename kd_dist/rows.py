"""A teacher's rows of a split: one verified `pread` a row and folder; and several folders as one."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kd_dist import manifest
from kd_dist.compress import FeatureCodec, load_bases
from kd_dist.errors import MismatchError, ShardError
from kd_dist.folders import OnError, Shards
from kd_dist.remote import Remote, each, read_whole
from kd_dist.signals import Codec, are_sound, codec_of, dtype_from_json, from_row_bytes, npy_header_size, row_dtype
from kd_dist.views import VIEW_DTYPES

BASES = "bases.safetensors"  # beside the manifest: the principal components of the features that have them
AGAIN = "delete the folder and run `kd-dist cache-teacher`"
LOGITS = "logits"  # what is stored beside the features
BETTER = ("top_class_agreement", "count")  # of what is measured, what is better for being larger


class Signals(Protocol):
    """Whatever serves a teacher's rows to the corridor."""

    manifest: Mapping[str, Any]  # of all that it serves: who the teacher is, what it reports, versions
    folder: Path | Remote  # the first that it reads
    codec: Codec  # of the logits
    features: Mapping[str, FeatureCodec]  # by name, as they are in a row
    views: int  # of each example that it serves
    dtype: np.dtype  # of a row
    quarantined: np.ndarray  # example ids without sound signals

    @property
    def fingerprint(self) -> str:
        """One digest of every byte that it may read."""

    def rows(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Example ids and view numbers, both (B,) -> structured rows (B,)."""


class SignalShards(Shards):
    """A teacher's rows in one folder, for a folder of example shards; for the first of its shards where these are the
    first alone. `about` is the manifest, where it has been read."""

    def __init__(
        self,
        folder: Path | Remote,
        examples: Shards,
        on_error: OnError = "raise",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(folder, on_error, examples.limit, about)
        about = self.manifest
        if about["examples_fingerprint"] != examples.whole_fingerprint:
            raise MismatchError(
                f"{folder}: was made from examples {about['examples_fingerprint'][:12]}, {examples.folder} now holds "
                f"{examples.whole_fingerprint[:12]}; delete {folder} and run `kd-dist cache-teacher`"
            )
        self.examples = examples
        self.teacher: str = about["teacher"]["name"]
        self.first, self.count = span(about)
        self.views = self.first + self.count  # beyond the last that it has
        self.dtype = dtype_from_json(about["row_dtype"])
        try:
            grid, stored = about["codec"]["grid"], about["codec"]["logits"]
            self.codec = codec_of(about["task"], stored, about["classes"], grid and tuple(grid))
            self.features = feature_codecs(folder, about["codec"])
            fields = [field for codec in (self.codec, *self.features.values()) for field in codec.fields()]
            fits = self.dtype == row_dtype(VIEW_DTYPES[about["views"].get("kind", "image")], fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{folder}: the manifest describes no codecs ({error!r}); {AGAIN}") from error
        if not fits:
            raise ShardError(f"{folder}: the manifest's row_dtype is not that of its codecs; {AGAIN}")
        if type(self.first) is not int or self.first < 0:
            raise ShardError(f"{folder}: the manifest says that its views begin with {self.first!r}; {AGAIN}")
        self.header = npy_header_size(self.dtype, self.count)
        self._offsets: dict[int, np.ndarray | None] = {}  # by shard, of each example's signals
        self.quarantined = np.array(self._ids_of(about["quarantined"]), dtype=np.int64)

    def _ids_of(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """The quarantined examples: where the manifest says that they are, or, of an older one, by their keys."""
        ids, keys, sizes = [], {row["key"] for row in rows if "place" not in row}, np.diff(self.starts).tolist()
        for row in rows:
            match row:
                case {"shard": int(at), "place": int(place)} if 0 <= at < len(sizes) and 0 <= place < sizes[at]:
                    ids.append(int(self.starts[at]) + place)
                case {"place": _}:
                    raise ShardError(f"{self.folder}: the manifest says where no example is ({dict(row)}); {AGAIN}")
        for number in range(len(sizes) if keys else 0):
            try:
                held = self.shard(number).keys
            except ShardError:
                if self.on_error == "raise":
                    raise
                continue  # every example of this shard fails when it is read
            ids += [int(self.starts[number]) + place for place, key in enumerate(held) if key in keys]
        return ids

    @property
    def parts(self) -> "list[SignalShards]":
        """The folders that are read."""
        return [self]

    def rows(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Example ids and view numbers, both (B,) -> structured rows (B,), each checked against its CRC.

        Views of an example that follow each other here as they do in the tar are one read.
        """
        rows, stride = np.empty(len(ids), self.dtype), self.dtype.itemsize
        first = np.flatnonzero((np.diff(ids, prepend=-1) != 0) | (np.diff(views, prepend=-1) != 1))
        whole, edges = memoryview(rows.view(np.uint8)), (np.append(first, len(ids)) * stride).tolist()
        parts = [whole[start:end] for start, end in itertools.pairwise(edges)]
        numbers, places = self.locate(ids[first])
        each(self.folder, self._read, numbers.tolist(), places.tolist(), views[first].tolist(), parts)
        return rows

    def _read(self, number: int, place: int, view: int, into: memoryview) -> None:
        """Fill `into` with the rows of an example from this view on."""
        shard = self.shard(number)
        offset = self._offset(number, place) + self.header + (view - self.first) * self.dtype.itemsize
        shard.pread_into(into, offset, self._sound)
        if not self._sound(into):
            from_row_bytes(into, self.dtype, f"{shard.path}: '{shard.key(place)}' view {view}")  # says why

    def _sound(self, rows: bytes | memoryview) -> bool:
        return are_sound(rows, self.dtype.itemsize)

    def _offset(self, number: int, place: int) -> int:
        """Where in its tar the signals of an example begin. A shard is compared with that of its examples as a whole,
        once; one that has something wrong, example by example."""
        if number not in self._offsets:
            shard, size = self.shard(number), self.header + self.count * self.dtype.itemsize
            alike = shard.same_keys(self.examples.shard(number))
            self._offsets[number] = shard.offsets(f"{self.teacher}.npy", size) if alike else None
        offsets = self._offsets[number]
        return self._checked_offset(number, place) if offsets is None else int(offsets[place])

    def _checked_offset(self, number: int, place: int) -> int:
        shard, twin = self.shard(number), self.examples.shard(number)
        key = shard.key(place)
        if key != twin.key(place):
            raise MismatchError(
                f"{shard.path}: example {place} is '{key}', in {twin.path} it is '{twin.key(place)}'; "
                f"delete {self.folder} and run `kd-dist cache-teacher`"
            )
        offset, size = shard.member(place, f"{self.teacher}.npy")
        if size != self.header + self.count * self.dtype.itemsize:
            raise ShardError(
                f"{shard.path}: '{key}' has {size} bytes, not {self.count} rows; delete it and cache again"
            )
        return offset


class LayeredSignals:
    """A teacher's rows that lie in several folders: of the same examples, in other views or with other features.

    Serves the logits and the named features of views 0 to `views` - 1, which must all be there. `row_crc` is 0: each
    folder's own was checked. Raises MismatchError for folders that store the same thing differently.
    """

    def __init__(self, parts: Sequence[SignalShards], views: int, features: Collection[str]) -> None:
        self.parts, self.views, self.folder = parts, views, parts[0].folder
        self.codec = next(part.codec for part in parts if part.codec.fields())
        held = {name: codec for part in reversed(parts) for name, codec in part.features.items()}
        self.features = {name: held[name] for name in sorted(features)}
        for part in parts:
            refuse_other_teacher(parts[0], part)
            refuse_other_codecs(self, part)
        fields = [field for codec in (self.codec, *self.features.values()) for field in codec.fields()]
        self.dtype = row_dtype(parts[0].dtype["view"], fields)
        self.quarantined = np.unique(np.concatenate([part.quarantined for part in parts]))
        self.manifest = {**parts[0].manifest, **worst_reports([part.manifest for part in parts])}

    @property
    def fingerprint(self) -> str:
        """One digest of everything in all folders."""
        return manifest.digest([part.fingerprint for part in self.parts])

    def rows(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Example ids and view numbers, both (B,) -> structured rows (B,): one read of each folder that has something
        of a view. Raises MismatchError when two folders saw other pixels in it."""
        found, owners = np.zeros(len(ids), self.dtype), np.full(len(ids), -1)
        for number, part in enumerate(self.parts):
            here = np.flatnonzero((views >= part.first) & (views < part.first + part.count))
            if not len(here):
                continue
            read = part.rows(ids[here], views[here])
            other = np.flatnonzero((owners[here] >= 0) & (found["input_crc"][here] != read["input_crc"]))
            if len(other):
                row = here[other[0]]
                self._refuse(self.parts[owners[row]], part, int(ids[row]), int(views[row]))
            for name in set(self.dtype.names[1:]) & set(read.dtype.names):
                found[name][here] = read[name]
            owners[here] = number
        return found

    def _refuse(self, one: SignalShards, other: SignalShards, example: int, view: int) -> None:
        [number], [place] = (values.tolist() for values in one.locate(np.array([example])))
        raise MismatchError(
            f"{other.paths[number]}: saw other pixels in view {view} of '{one.shard(number).key(place)}' than "
            f"{one.paths[number]} did; delete {other.folder} and run `kd-dist cache-teacher`"
        )


def span(about: Mapping[str, Any]) -> tuple[int, int]:
    """From which view of each example on a folder has rows, and of how many."""
    return about["views"].get("first", 0), about["views"]["count"]


def described(codec: FeatureCodec) -> dict[str, Any]:
    """How a feature is stored, to compare."""
    basis = codec.basis and _sha256(b"".join(one.numpy().tobytes() for one in codec.basis))
    return {name: getattr(codec, name) for name in ("shape", "store", "pool", "dither")} | {"basis": basis}


def refuse_other_teacher(one: Signals, other: Signals) -> None:
    """Raise a MismatchError when two folders hold what different teachers said."""
    _refuse_unlike(one, other, {"teacher": one.manifest["teacher"]}, {"teacher": other.manifest["teacher"]})


def refuse_other_codecs(one: Signals, other: Signals) -> None:
    """Raise a MismatchError when two folders, or what they serve, store logits or a feature that both have
    differently."""
    both = one.features.keys() & other.features.keys()
    ours, theirs = ({"features": {name: described(held.features[name]) for name in both}} for held in (one, other))
    if one.codec.fields() and other.codec.fields():
        ours[LOGITS], theirs[LOGITS] = vars(one.codec), vars(other.codec)
    _refuse_unlike(one, other, ours, theirs)


def _refuse_unlike(one: Signals, other: Signals, ours: Any, theirs: Any) -> None:
    difference = manifest.first_difference(ours, theirs)
    if difference is not None:
        place, wanted, there = difference
        raise MismatchError(
            f"{other.folder}: has {place} = {there!r}, {one.folder} has {wanted!r}, so they cannot be trained on "
            f"together; {AGAIN}"
        )


def worst_reports(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What losses rely on, for all folders that hold logits: of each error that was measured the largest."""
    errors = [one["codec_error"][LOGITS] for one in manifests if one.get("codec_error")]
    reports = [one["teacher_report"] for one in manifests if one.get("teacher_report")]
    found: dict[str, Any] = {"codec_error": {LOGITS: _worst(errors)}} if errors else {}
    if reports and all("largest_error" in one for one in reports):
        largest = max(one["largest_error"] for one in reports)
        found["teacher_report"] = {**reports[0], "largest_error": largest}
    return found


def _worst(reports: Sequence[Any], worst: Callable[[Sequence[Any]], Any] = max) -> Any:
    """Of nested numbers each the worst; an entry that one lacks is left out."""
    if not isinstance(reports[0], Mapping):
        return worst(reports)
    common = [name for name in reports[0] if all(name in one for one in reports)]
    return {name: _worst([one[name] for one in reports], min if name in BETTER else max) for name in common}


def feature_codecs(folder: Path | Remote, described: Mapping[str, Any]) -> dict[str, FeatureCodec]:
    """The codecs that a manifest describes, by feature. Raises ShardError unless their bases are those it names."""
    expected, bases, path = described["bases_sha256"], {}, folder / BASES
    if expected is not None:
        payload = read_whole(path, lambda data: _sha256(data) == expected) if path.is_file() else b""
        if _sha256(payload) != expected:
            raise ShardError(
                f"{path}: is missing or not the file that the features were reduced with; delete {folder} and run "
                f"`kd-dist cache-teacher`"
            )
        bases = load_bases(path, payload)
    return {
        name: FeatureCodec(name, tuple(one["shape"]), one["store"], one["pool"], bases.get(name), one["dither"])
        for name, one in sorted(described["features"].items())  # as in a row
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
