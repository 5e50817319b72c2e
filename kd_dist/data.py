"""The corridor: which rows a rank needs (plan), read, verify, decode, replay, collate.

A map-style dataset indexed by the micro-batch's place in the whole run: workers are stateless, there is no worker
split to get wrong, the length is exact and resuming is one integer. Accelerate must not shard it again, so it is never
given to `prepare`: a rank's `Corridor` already holds that rank's share only.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from kd_dist import manifest
from kd_dist.batch import Batch, Example, Mixture, TeacherSignal, each_tensor
from kd_dist.compress import FeatureCodec
from kd_dist.errors import DataError, MismatchError, ShardError
from kd_dist.folders import OnError, Shards, drawn_partners, read_examples, with_partners
from kd_dist.plan import Plan, mix, view_number
from kd_dist.rows import Signals
from kd_dist.tasks import Task
from kd_dist.views import MixedViews, ViewPolicy, input_crc, replayed
from kd_dist.views.mixed import partners_of, second_share

CHECK_ONE_IN = 16  # times that an example is shown, its pixels are compared with the stored CRC


class Rows(NamedTuple):
    """What a share of a batch is made of, one entry a row."""

    keys: tuple[str, ...]
    pixels: np.ndarray  # (B, H, W, C) uint8
    targets: list[Any]  # as the task collates them
    stored: np.ndarray | None  # (B,) structured rows of signals
    valid: tuple[bool, ...]
    failed: tuple[str, ...]  # a sentence for each row that is not valid, but a filler
    groups: np.ndarray  # (B, 2) int64, as in a batch
    seconds: np.ndarray  # (B, 2) float64: the class of each row's partner, and its share; 0, 0 of one without


@dataclass(frozen=True)
class Corridor(Dataset[Batch]):
    """Micro-batches of one rank, by their number in the whole run: `step * accumulate + micro`."""

    examples: Shards
    signals: Signals | None
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
        ids, uses = self.plan.uses(step, self.rank, micro)
        total = self.plan.total(step)
        if self.signals is not None and len(self.signals.quarantined):
            total -= int(np.isin(self.plan.step_examples(step), self.signals.quarantined).sum())
            sound = ~np.isin(ids, self.signals.quarantined)
            ids, uses = ids[sound], uses[sound]
        rows = self._share(ids, uses)
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
            mixture=self._mixture(rows.seconds),
        )

    def _share(self, ids: np.ndarray, uses: np.ndarray) -> Rows:
        """The rows of these examples, shown so often before. With "replace_masked" one that fails is zeros, not valid,
        and says why."""
        if len(ids) == 0:
            return self._blank("")
        try:
            return self._rows(ids, uses)
        except (DataError, ShardError) as error:
            if self.on_error == "raise":
                raise
            if len(ids) == 1:
                key, place = self._named(int(ids[0]))
                return self._blank(key)._replace(failed=(f"{place} is masked: {error}",))
        return joined([self._share(ids[row : row + 1], uses[row : row + 1]) for row in range(len(ids))])

    def _blank(self, key: str) -> Rows:
        """One row of zeros that is not valid."""
        pixels = np.zeros((1, *self.policy.size, self.policy.channels), np.uint8)
        stored = None if self.signals is None else np.zeros(1, self.signals.dtype)
        targets, groups = [self.task.no_target(self.policy.size)], np.zeros((1, 2), np.int64)
        return Rows((key,), pixels, targets, stored, (False,), (), groups, np.zeros((1, 2)))

    def _named(self, one: int) -> tuple[str, str]:
        """The key of an example, and where it is, in words; without a readable index its place has to do."""
        [number], [place] = self.examples.locate(np.array([one]))
        path = self.examples.paths[number]
        try:
            key = self.examples.shard(int(number)).key(int(place))
        except ShardError:
            return f"{path.name}/{place}", f"{path}: example {place}"
        return key, f"{path}: example '{key}'"

    def _rows(self, ids: np.ndarray, uses: np.ndarray) -> Rows:
        once, places = np.unique(ids, return_inverse=True)  # several views of an example take one decode
        read = read_examples(self.examples, once, self.task.decode)
        examples = [read[place] for place in places]
        numbers = self._view_numbers(ids, uses)
        stored = None if self.signals is None else self.signals.rows(ids, numbers)
        if isinstance(self.policy, MixedViews):
            fresh = stored is None
            chosen = drawn_partners(self.examples, self.policy, ids, numbers) if fresh else partners_of(stored["view"])
            examples = with_partners(self.examples, examples, ids, chosen, self.task.decode)
        # In the order of a batch in memory: each view is turned while the processor has it at hand.
        pixels = np.empty((len(ids), self.policy.channels, *self.policy.size), np.uint8).transpose(0, 2, 3, 1)
        targets: list[Any] = []
        groups, seconds = np.zeros((len(ids), 2), np.int64), np.zeros((len(ids), 2))
        for row, example in enumerate(examples):
            view = self._view(example, int(numbers[row])) if stored is None else stored["view"][row]
            pixels[row] = replayed(self.policy, example, view)
            if example.partner is not None:
                seconds[row] = example.partner[1].target, second_share(view, self.policy.size)
            # A model is judged against the mask as it is, at its own resolution.
            whole = self.views == 0
            targets.append(example.target if whole else self.task.replay_target(example.target, view, self.policy.size))
            if whole and example.about.get("video") is not None:
                groups[row] = video_and_frame(example)
        if stored is not None:
            self._check_pixels(ids, uses, examples, pixels, stored)
        keys = tuple(example.key for example in examples)
        return Rows(keys, pixels, targets, stored, (True,) * len(keys), (), groups, seconds)

    def _mixture(self, seconds: np.ndarray) -> Mixture | None:
        if not isinstance(self.policy, MixedViews):
            return None
        targets, shares = torch.from_numpy(seconds).T
        return Mixture(targets.long(), shares.float())

    def _signals(self, stored: np.ndarray) -> TeacherSignal:
        """The logits decoded; of the features their fields as they are."""
        names = [field[0] for codec in self.codecs.values() for field in codec.fields()]
        # A copy: the field of a single row counts as contiguous, and keeps a stride that torch refuses.
        fields = {name: torch.from_numpy(stored[name].copy()) for name in names}
        return TeacherSignal(each_tensor(self.signals.codec.decode(stored), torch.from_numpy), fields)

    def _view_numbers(self, ids: np.ndarray, uses: np.ndarray) -> np.ndarray:
        return uses if self.views is None else view_number(ids, uses, max(self.views, 1), self.policy.seed)

    def _view(self, example: Example, number: int) -> np.void:
        if self.views == 0:
            return self.policy.canonical(example.image.shape[:2])
        return self.policy.draw_for(example, number)

    def _check_pixels(
        self, ids: np.ndarray, uses: np.ndarray, examples: list[Example], pixels: np.ndarray, stored: np.ndarray
    ) -> None:
        turn = (mix(self.policy.seed, ids) + uses.astype(np.uint64)) % np.uint64(CHECK_ONE_IN) == 0
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
    keys, pixels, targets, stored, valid, failed, groups, seconds = zip(*parts, strict=True)
    return Rows(
        keys=sum(keys, ()),
        pixels=np.concatenate(pixels),
        targets=sum(targets, []),
        stored=None if stored[0] is None else np.concatenate(stored),
        valid=sum(valid, ()),
        failed=sum(failed, ()),
        groups=np.concatenate(groups),
        seconds=np.concatenate(seconds),
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
    return f"Pillow {versions.get('pillow', 'of an unknown version')}"  # a folder begun by an older kd_dist says none
