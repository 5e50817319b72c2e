"""The corridor: which rows a rank needs (plan), read, verify, decode, replay, collate.

A map-style dataset indexed by the micro-batch's place in the whole run: workers are stateless, there is no worker
split to get wrong, the length is exact and resuming is one integer. Accelerate must not shard it again, so it is never
given to `prepare`: a rank's `Corridor` already holds that rank's share only.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from kd_dist import manifest
from kd_dist.batch import Batch, Example, TeacherSignal
from kd_dist.compress import FeatureCodec, load_bases
from kd_dist.errors import KdError, MismatchError, ShardError
from kd_dist.plan import Plan, mix, view_number
from kd_dist.remote import Remote, at_once, each, read_whole
from kd_dist.shards import Shard
from kd_dist.signals import LogitsCodec, dtype_from_json, from_row_bytes, is_sound, npy_header_size
from kd_dist.tasks import Task
from kd_dist.views import ImageViews, canonical, draw, input_crc, replay

Decode = Callable[[str, Mapping[str, bytes]], Example]
BASES = "bases.safetensors"  # beside the manifest: the principal components of the features that have them
CHECK_ONE_IN = 16  # examples whose pixels are compared with the stored CRC, a different sixteenth each epoch


class Shards:
    """The shards of one finished folder as one sequence of examples, in manifest order. Opened on first use."""

    def __init__(self, folder: Path | Remote) -> None:
        self.folder = folder
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
        """Mean bytes of an example on disk."""
        try:
            if isinstance(self.folder, Remote):
                total = sum(self.shard(number).tar_bytes for number in range(len(self.paths)))
            else:
                total = sum(path.stat().st_size for path in self.paths)
        except FileNotFoundError as error:
            raise ShardError(f"{error.filename}: is missing; run the command that wrote it again") from error
        return max(1, total // max(1, len(self)))


class SignalShards(Shards):
    """A teacher's rows for a folder of example shards: one verified `pread` a view."""

    def __init__(self, folder: Path | Remote, examples: Shards) -> None:
        super().__init__(folder)
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
        grid = about["codec"]["grid"]
        self.codec = LogitsCodec(about["codec"]["logits"], about["classes"], grid and tuple(grid))
        self.features = feature_codecs(folder, about["codec"])
        self.header = npy_header_size(self.dtype, self.views)
        bad = {row["key"] for row in about["quarantined"]}
        self.quarantined = np.array(self._ids_of(bad), dtype=np.int64)

    def _ids_of(self, keys: set[str]) -> list[int]:
        if not keys:
            return []
        return [
            int(self.starts[number]) + place
            for number in range(len(self.paths))
            for place, key in enumerate(self.shard(number).keys)
            if key in keys
        ]

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
    pixels: np.ndarray  # (B, H, W, 3) uint8
    targets: np.ndarray
    sizes: np.ndarray | None
    signals: TeacherSignal | None


@dataclass(frozen=True)
class Corridor(Dataset[Batch]):
    """Micro-batches of one rank, by their number in the whole run: `step * accumulate + micro`."""

    examples: Shards
    signals: SignalShards | None
    task: Task
    policy: ImageViews
    plan: Plan
    rank: int
    views: int | None  # views an example has; None: a fresh one each epoch; 0: the canonical one
    epochs: int = 1
    features: tuple[str, ...] = ()  # of the stored ones, those that are delivered

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
        filler = len(ids) == 0
        rows = self._rows(np.zeros(1, np.int64) if filler else ids, epoch)
        return Batch(
            keys=rows.keys,
            images=torch.from_numpy(np.ascontiguousarray(rows.pixels.transpose(0, 3, 1, 2))),
            targets=torch.from_numpy(rows.targets),
            sizes=None if rows.sizes is None else torch.from_numpy(rows.sizes),
            valid=torch.full((len(rows.keys),), not filler),
            total=max(total, 1),
            signals=rows.signals,
        )

    def _rows(self, ids: np.ndarray, epoch: int) -> Rows:
        examples = read_examples(self.examples, ids, self.task.decode)
        numbers = self._view_numbers(ids, epoch)
        stored = None if self.signals is None else self.signals.rows(ids, numbers)
        pixels, targets = np.empty((len(ids), *self.policy.size, 3), np.uint8), []
        for row, example in enumerate(examples):
            view = self._view(example, int(numbers[row])) if stored is None else stored["view"][row]
            pixels[row] = replay(example.image, view, self.policy.size)
            # A model is judged against the mask as it is, at its own resolution.
            whole = self.views == 0
            targets.append(example.target if whole else self.task.replay_target(example.target, view, self.policy.size))
        if stored is not None:
            self._check_pixels(ids, epoch, examples, pixels, stored)
        keys = tuple(example.key for example in examples)
        return Rows(keys, pixels, *self.task.collate(targets), None if stored is None else self._signals(stored))

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
        size = example.image.shape[:2]
        return canonical(self.policy, size) if self.views == 0 else draw(self.policy, example.key, number, size)

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


def describe(versions: dict[str, str]) -> str:
    """The versions that decide what pixels a file becomes."""
    return f"Pillow {versions['pillow']}"


def read_examples(shards: Shards, ids: np.ndarray, decode: Decode) -> list[Example]:
    """Read, verify and decode the examples with these ids, in their order."""


    def read(number: int, place: int) -> Example:
        shard = shards.shard(number)
        return decode(shard.key(place), shard.read(place))

    return each(shards.folder, read, *(one.tolist() for one in shards.locate(ids)))


def batches(corridor: Corridor, start: int, stop: int, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches `start` to `stop` in order, prefetched by `workers` processes (0: read in this one)."""
    options: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    loader = DataLoader(
        _Delivered(corridor),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin,
        generator=torch.Generator(),  # the global one belongs to the training step
        **options,
    )
    for delivered in loader:
        if isinstance(delivered, KdError):
            raise delivered
        yield delivered


class _Delivered(Dataset[Batch | KdError]):
    """A corridor whose errors come out as values: a worker that raises one would bury its sentence in a traceback."""

    def __init__(self, corridor: Corridor) -> None:
        self.corridor = corridor

    def __getitem__(self, cursor: int) -> Batch | KdError:
        try:
            return self.corridor[cursor]
        except KdError as error:
            return error


def _as_it_is(delivered: Batch | KdError) -> Batch | KdError:
    return delivered


def to_device(batch: Batch, device: torch.device, codecs: Mapping[str, FeatureCodec] | None = None) -> Batch:
    """The batch with its tensors on the device, its features decoded there by their codecs."""
    signals = batch.signals
    if signals is not None:
        fields = {name: value.to(device, non_blocking=True) for name, value in signals.features.items()}
        features = {name: codec.decode(fields) for name, codec in (codecs or {}).items()}
        signals = TeacherSignal(signals.logits.to(device, non_blocking=True), features)
    return batch._replace(
        images=batch.images.to(device, non_blocking=True),
        targets=batch.targets.to(device, non_blocking=True),
        sizes=batch.sizes if batch.sizes is None else batch.sizes.to(device, non_blocking=True),
        valid=batch.valid.to(device, non_blocking=True),
        signals=signals,
    )


def on_device(codecs: Mapping[str, FeatureCodec], device: torch.device) -> dict[str, FeatureCodec]:
    """The codecs with their bases on the device."""
    return {
        name: codec
        if codec.basis is None
        else replace(codec, basis=type(codec.basis)(*(one.to(device) for one in codec.basis)))
        for name, codec in codecs.items()
    }
