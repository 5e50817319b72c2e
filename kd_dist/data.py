"""The corridor: which rows a rank needs (plan), read, verify, decode, replay, collate.

A map-style dataset indexed by the micro-batch's place in the whole run: workers are stateless, there is no worker
split to get wrong, the length is exact and resuming is one integer. Accelerate must not shard it again, so it is never
given to `prepare`: a rank's `Corridor` already holds that rank's share only.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from kd_dist import manifest
from kd_dist.batch import Batch, Example, TeacherSignal
from kd_dist.compress import FeatureCodec, load_bases
from kd_dist.errors import DataError, MismatchError, ShardError
from kd_dist.plan import Plan, mix, view_number
from kd_dist.remote import Remote, at_once, each, read_whole
from kd_dist.shards import Shard
from kd_dist.signals import codec_of, dtype_from_json, from_row_bytes, is_sound, npy_header_size, row_dtype
from kd_dist.tasks import Task
from kd_dist.views import VIEW_DTYPES, ViewPolicy, input_crc

OnError = Literal["raise", "replace_masked"]  # at an example that cannot be read: stop, or go on without it
Decode = Callable[[str, Mapping[str, bytes]], Example]
BASES = "bases.safetensors"  # beside the manifest: the principal components of the features that have them
AGAIN = "delete the folder and run `kd-dist cache-teacher`"
CHECK_ONE_IN = 16  # examples whose pixels are compared with the stored CRC, a different sixteenth each epoch


class Shards:
    """The shards of one finished folder as one sequence of examples, in manifest order. Opened on first use.

    With `on_error` "replace_masked" a shard that is missing is an error of its examples, not of the folder.
    """

    def __init__(self, folder: Path | Remote, on_error: OnError = "raise") -> None:
        self.folder, self.on_error = folder, on_error
        self.manifest = manifest.read_manifest(folder)
        if not self.manifest["complete"]:
            raise ShardError(
                f"{folder}: not finished; run the command that makes it once more, it goes on where it was"
            )
        rows = self.manifest["shards"]
        self.paths = [folder / row["name"] for row in rows]
        self.starts = np.concatenate([[0], np.cumsum([row["examples"] for row in rows], dtype=np.int64)])
        self._open: dict[int, Shard] = {}
        if isinstance(folder, Remote):  # now, that not each loader process has to fetch every index
            at_once(folder, self.shard, range(len(self.paths)))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Example ids -> (shard number, place in the shard)."""
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        return shards, ids - self.starts[shards]

    def shard(self, number: int) -> Shard:
        """The opened shard `number`. Raises ShardError when it is not the one that the manifest lists."""
        if number not in self._open:
            shard, row = Shard(self.paths[number]), self.manifest["shards"][number]
            if shard.sha256 != row["sha256"] or len(shard) != row["examples"]:
                raise ShardError(
                    f"{self.paths[number]}: its index holds {len(shard)} examples with sha256 {shard.sha256[:12]}, the "
                    f"manifest {row['examples']} with {row['sha256'][:12]}; delete the folder and make it again"
                )
            self._open[number] = shard
        return self._open[number]

    @cached_property
    def fingerprint(self) -> str:
        """One digest of everything in the folder: what a cache of it is bound to."""
        return manifest.fingerprint(self.manifest)

    def example_bytes(self) -> int:
        """Mean bytes of an example on disk, as it was packed: the order of a run must not change with damage."""
        if isinstance(self.manifest.get("tar_bytes"), int):
            return max(1, self.manifest["tar_bytes"] // max(1, len(self)))
        total = held = 0  # an older manifest does not say, so by what is there
        for number, row in enumerate(self.manifest["shards"]):
            try:
                path = self.paths[number]
                total += self.shard(number).tar_bytes if isinstance(path, Remote) else path.stat().st_size
                held += row["examples"]
            except FileNotFoundError as error:
                if self.on_error == "raise":
                    raise ShardError(f"{path}: is missing; run the command that wrote it again") from error
            except ShardError:
                if self.on_error == "raise":
                    raise
        return max(1, total // max(1, held))


class SignalShards(Shards):
    """A teacher's rows for a folder of example shards: one verified `pread` a view."""

    def __init__(self, folder: Path | Remote, examples: Shards, on_error: OnError = "raise") -> None:
        super().__init__(folder, on_error)
        about = self.manifest
        if about["examples_fingerprint"] != examples.fingerprint:
            raise MismatchError(
                f"{folder}: was made from examples {about['examples_fingerprint'][:12]}, {examples.folder} now holds "
                f"{examples.fingerprint[:12]}; delete {folder} and run `kd-dist cache-teacher`"
            )
        self.examples = examples
        self.teacher: str = about["teacher"]["name"]
        self.views: int = about["views"]["count"]
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
        self.header = npy_header_size(self.dtype, self.views)
        bad = {row["key"] for row in about["quarantined"]}
        self.quarantined = np.array(self._ids_of(bad), dtype=np.int64)

    def _ids_of(self, keys: set[str]) -> list[int]:
        ids: list[int] = []
        for number in range(len(self.paths) if keys else 0):
            try:
                held = self.shard(number).keys
            except ShardError:
                if self.on_error == "raise":
                    raise
                continue  # every example of this shard fails when it is read
            ids += [int(self.starts[number]) + place for place, key in enumerate(held) if key in keys]
        return ids

    def rows(self, ids: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Example ids and view numbers, both (B,) -> structured rows (B,), each checked against its CRC."""
        numbers, places = self.locate(ids)
        return np.concatenate(each(self.folder, self._row, numbers.tolist(), places.tolist(), views.tolist()))

    def _row(self, number: int, place: int, view: int) -> np.ndarray:
        shard, twin = self.shard(number), self.examples.shard(number)
        key = shard.key(place)
        if key != twin.key(place):
            raise MismatchError(
                f"{shard.path}: example {place} is '{key}', in {twin.path} it is '{twin.key(place)}'; "
                f"delete {self.folder} and run `kd-dist cache-teacher`"
            )
        offset, size = shard.member(place, f"{self.teacher}.npy")
        stride = self.dtype.itemsize
        if size != self.header + self.views * stride:
            raise ShardError(
                f"{shard.path}: '{key}' has {size} bytes, not {self.views} rows; delete it and cache again"
            )
        payload = shard.pread(offset + self.header + view * stride, stride, is_sound)
        return from_row_bytes(payload, self.dtype, f"{shard.path}: '{key}' view {view}")


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


class Rows(NamedTuple):
    """What a share of a batch is made of, one entry an example."""

    keys: tuple[str, ...]
    pixels: np.ndarray  # (B, H, W, C) uint8
    targets: list[Any]  # as the task collates them
    stored: np.ndarray | None  # (B,) structured rows of signals
    valid: tuple[bool, ...]
    failed: tuple[str, ...]  # a sentence for each row that is not valid, but a filler
    groups: np.ndarray  # (B, 2) int64, as in a batch


@dataclass(frozen=True)
class Corridor(Dataset[Batch]):
    """Micro-batches of one rank, by their number in the whole run: `step * accumulate + micro`."""

    examples: Shards
    signals: SignalShards | None
    task: Task
    policy: ViewPolicy
    plan: Plan
    rank: int
    views: int | None  # views an example has; None: a fresh one each epoch; 0: the canonical one
    epochs: int = 1
    features: tuple[str, ...] = ()  # of the stored ones, those that are delivered
    on_error: OnError = "raise"  # at a ShardError or DataError of an example; a MismatchError is always raised

    @property
    def codecs(self) -> dict[str, FeatureCodec]:
        """How the features that it delivers are decoded."""
        return {name: self.signals.features[name] for name in self.features}

    def __len__(self) -> int:
        return self.epochs * self.plan.steps_per_epoch * self.plan.accumulate

    def __getitem__(self, cursor: int) -> Batch:
        step, micro = divmod(cursor, self.plan.accumulate)
        epoch = step // self.plan.steps_per_epoch
        ids, total = self.plan.share(step, self.rank, micro), self.plan.total(step)
        if self.signals is not None and len(self.signals.quarantined):
            total -= int(np.isin(self.plan.step_examples(step), self.signals.quarantined).sum())
            ids = ids[~np.isin(ids, self.signals.quarantined)]
        rows = self._share(ids, epoch)
        if not any(rows.valid):
            rows = self._blank(rows.keys[0])._replace(failed=rows.failed)
        targets, sizes = self.task.collate(rows.targets)
        return Batch(
            keys=rows.keys,
            images=torch.from_numpy(np.ascontiguousarray(rows.pixels.transpose(0, 3, 1, 2))),
            targets=torch.from_numpy(targets),
            sizes=None if sizes is None else torch.from_numpy(sizes),
            valid=torch.tensor(rows.valid),
            total=max(total, 1),
            signals=None if rows.stored is None else self._signals(rows.stored),
            failed=rows.failed,
            groups=torch.from_numpy(rows.groups) if rows.groups.any() else None,
        )

    def _share(self, ids: np.ndarray, epoch: int) -> Rows:
        """The rows of these examples. With "replace_masked" one that fails is zeros, not valid, and says why."""
        if len(ids) == 0:
            return self._blank("")
        try:
            return self._rows(ids, epoch)
        except (DataError, ShardError) as error:
            if self.on_error == "raise":
                raise
            if len(ids) == 1:
                key, place = self._named(int(ids[0]))
                return self._blank(key)._replace(failed=(f"{place} is masked: {error}",))
        return joined([self._share(ids[row : row + 1], epoch) for row in range(len(ids))])

    def _blank(self, key: str) -> Rows:
        """One row of zeros that is not valid."""
        pixels = np.zeros((1, *self.policy.size, self.policy.channels), np.uint8)
        stored = None if self.signals is None else np.zeros(1, self.signals.dtype)
        targets, groups = [self.task.no_target(self.policy.size)], np.zeros((1, 2), np.int64)
        return Rows((key,), pixels, targets, stored, (False,), (), groups)

    def _named(self, one: int) -> tuple[str, str]:
        """The key of an example, and where it is, in words; without a readable index its place has to do."""
        [number], [place] = self.examples.locate(np.array([one]))
        path = self.examples.paths[number]
        try:
            key = self.examples.shard(int(number)).key(int(place))
        except ShardError:
            return f"{path.name}/{place}", f"{path}: example {place}"
        return key, f"{path}: example '{key}'"

    def _rows(self, ids: np.ndarray, epoch: int) -> Rows:
        examples = read_examples(self.examples, ids, self.task.decode)
        numbers = self._view_numbers(ids, epoch)
        stored = None if self.signals is None else self.signals.rows(ids, numbers)
        pixels, targets = np.empty((len(ids), *self.policy.size, self.policy.channels), np.uint8), []
        groups = np.zeros((len(ids), 2), np.int64)
        for row, example in enumerate(examples):
            view = self._view(example, int(numbers[row])) if stored is None else stored["view"][row]
            pixels[row] = self.policy.replay(example.image, view)
            # A model is judged against the mask as it is, at its own resolution.
            whole = self.views == 0
            targets.append(example.target if whole else self.task.replay_target(example.target, view, self.policy.size))
            if whole and example.about.get("video") is not None:
                groups[row] = video_and_frame(example)
        if stored is not None:
            self._check_pixels(ids, epoch, examples, pixels, stored)
        keys = tuple(example.key for example in examples)
        return Rows(keys, pixels, targets, stored, (True,) * len(keys), (), groups)

    def _signals(self, stored: np.ndarray) -> TeacherSignal:
        """The logits decoded; of the features their fields as they are."""
        names = [field[0] for codec in self.codecs.values() for field in codec.fields()]
        # A copy: the field of a single row counts as contiguous, and keeps a stride that torch refuses.
        fields = {name: torch.from_numpy(stored[name].copy()) for name in names}
        return TeacherSignal(torch.from_numpy(self.signals.codec.decode(stored)), fields)

    def _view_numbers(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        if self.views is None:
            return np.full(len(ids), epoch)
        return view_number(ids, epoch, max(self.views, 1), self.policy.seed)

    def _view(self, example: Example, number: int) -> np.void:
        if self.views == 0:
            return self.policy.canonical(example.image.shape[:2])
        return self.policy.draw_for(example, number)

    def _check_pixels(
        self, ids: np.ndarray, epoch: int, examples: list[Example], pixels: np.ndarray, stored: np.ndarray
    ) -> None:
        turn = (mix(self.policy.seed, ids) + np.uint64(epoch)) % np.uint64(CHECK_ONE_IN) == 0
        for row in np.flatnonzero(turn):
            there, here = int(stored["input_crc"][row]), input_crc(pixels[row])
            if there != here:
                raise MismatchError(
                    f"example '{examples[row].key}': its pixels have CRC {here:08x}, the teacher saw {there:08x} "
                    f"({describe(self.signals.manifest['versions'])} then, {describe(manifest.versions())} now); "
                    f"run `kd-dist verify` to see how far it goes, then decode with the same versions or cache again"
                )


def joined(parts: list[Rows]) -> Rows:
    """The rows of all parts, in order."""
    keys, pixels, targets, stored, valid, failed, groups = zip(*parts, strict=True)
    return Rows(
        keys=sum(keys, ()),
        pixels=np.concatenate(pixels),
        targets=sum(targets, []),
        stored=None if stored[0] is None else np.concatenate(stored),
        valid=sum(valid, ()),
        failed=sum(failed, ()),
        groups=np.concatenate(groups),
    )


def video_and_frame(example: Example) -> tuple[int, int]:
    """Digests of the video of an example that names one, and of the frame within it: without one, it is a frame of its
    own."""
    names = example.about["video"], example.about.get("frame", f"of {example.key}")
    payloads = (json.dumps(names[:count]).encode() for count in (1, 2))
    video, frame = (hashlib.blake2b(payload, digest_size=8).digest() for payload in payloads)
    return int.from_bytes(video, "little", signed=True), int.from_bytes(frame, "little", signed=True)


def describe(versions: dict[str, str]) -> str:
    """The versions that decide what pixels a file becomes."""
    return f"Pillow {versions['pillow']}"


def read_examples(shards: Shards, ids: np.ndarray, decode: Decode) -> list[Example]:
    """Read, verify and decode the examples with these ids, in their order."""

    def read(number: int, place: int) -> Example:
        shard = shards.shard(number)
        return decode(shard.key(place), shard.read(place))

    return each(shards.folder, read, *(one.tolist() for one in shards.locate(ids)))
