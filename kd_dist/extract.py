"""A teacher over the examples of one split: read and replay, run, encode, write, one shard after another.

The three parts overlap through bounded queues. Batches never cross a shard, so any number of processes writes the
same bytes.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kd_dist.batch import Example, TeacherSignal
from kd_dist.compress import FeatureCodec
from kd_dist.folders import Shards, drawn_partners, read_examples, with_partners
from kd_dist.progress import Advance
from kd_dist.shards import is_committed, shard_path, write_shard
from kd_dist.signals import Codec, add_sums, pack_rows, row_dtype, to_npy
from kd_dist.tasks import Task
from kd_dist.teacher import Teacher
from kd_dist.views import MixedViews, ViewPolicy, input_crc, replayed
from kd_dist.views.mixed import second_share

STEM = "signals"
NOTED = ("error", "teacher", "overflow")  # sums in the index of a shard
QUEUE_DEPTH = 4


@dataclass(frozen=True)
class Extraction:
    """What one split's cache is made of."""

    examples: Shards
    folder: Path
    task: Task
    teacher: str  # its name, in member names
    policy: ViewPolicy
    views: int  # of an example; 0: one canonical view
    codec: Codec  # NoLogits where features are added to logits that are there
    features: dict[str, FeatureCodec]
    batch_size: int  # rows
    threads: int
    first: int = 0  # of an example's views

    @property
    def rows(self) -> int:
        """Rows of an example."""
        return max(1, self.views)

    @property
    def dtype(self) -> np.dtype:
        """Of a row."""
        fields = [field for codec in self.features.values() for field in codec.fields()]
        return row_dtype(self.policy.dtype, [*self.codec.fields(), *fields])


class Rows(NamedTuple):
    """Consecutive rows of one shard on their way through the teacher. Rows of an example are neighbours."""

    keys: list[str]
    views: np.ndarray  # (b,) records of the policy
    crcs: np.ndarray  # (b,) uint32, of each row's pixels
    targets: np.ndarray  # (b,) class indices, masks (b, h, w), or numbers (b, D)
    sizes: np.ndarray | None  # (b, 2), of the masks
    labels: np.ndarray  # what the codec keeps: `targets`; of mixed views the classes (b, 2) of both that are shown
    pixels: np.ndarray  # (b, H, W, C) uint8

    def only(self, places: np.ndarray) -> "Rows":
        """The rows at these places."""
        return Rows(
            [self.keys[place] for place in places],
            *(one if one is None else one[places] for one in self[1:]),
        )


class Said(NamedTuple):
    """Rows after the teacher."""

    rows: Rows
    logits: np.ndarray  # (b, C, ...) float32
    fields: dict[str, np.ndarray]  # of the features, encoded, each (b, ...)
    storable: dict[str, np.ndarray]  # by feature, (b,) bool
    overflow: dict[str, int]  # by feature: values too large for their format


def extract(work: Extraction, teacher: Teacher, device: torch.device, mine: range, advance: Advance) -> float:
    """Write those of the shards numbered `mine` that are not committed yet; returns the seconds that the slowest took.

    What teacher or examples raise comes out of here, and what was being written is dropped.
    """
    wanted, slowest = [], 0.0
    for number in mine:
        if is_committed(shard_path(work.folder, STEM, number)):
            advance(len(work.examples.shard(number)))
        else:
            wanted.append(number)
    with (
        contextlib.closing(prefetch(read_rows(work, wanted))) as read,
        contextlib.closing(prefetch(run_teacher(work, read, teacher, device))) as ran,
    ):
        for number in wanted:
            notes: dict[str, Any] = {"quarantined": [], **dict.fromkeys(NOTED)}
            rows, start = len(work.examples.shard(number)) * work.rows, time.monotonic()
            write_shard(shard_path(work.folder, STEM, number), encode(work, take(ran, rows), notes, advance), notes)
            slowest = max(slowest, time.monotonic() - start)
    return slowest


def read_rows(work: Extraction, numbers: list[int]) -> Iterator[Rows]:
    """Decode the examples of the shards, draw and replay their views, in batches that end with the shard."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number in numbers:
            first = int(work.examples.starts[number])
            for start in range(0, len(work.examples.shard(number)) * work.rows, work.batch_size):
                stop = min(start + work.batch_size, len(work.examples.shard(number)) * work.rows)
                yield make_rows(work, *np.divmod(first * work.rows + np.arange(start, stop), work.rows), pool)


def make_rows(work: Extraction, ids: np.ndarray, numbers: np.ndarray, pool: ThreadPoolExecutor) -> Rows:
    """Read the examples `ids` (b,), draw and replay of each the view `numbers` (b,), counted from the first."""
    policy, numbers = work.policy, numbers + work.first
    once, places = np.unique(ids, return_inverse=True)
    read = read_examples(work.examples, once, work.task.decode)
    examples = [read[place] for place in places]
    if isinstance(policy, MixedViews):
        partners = drawn_partners(work.examples, policy, ids, numbers)
        examples = with_partners(work.examples, examples, ids, partners, work.task.decode)
    views = np.zeros(len(ids), policy.dtype)
    pixels = np.empty((len(ids), *policy.size, policy.channels), np.uint8)

    def fill(row: int) -> int:
        example, number = examples[row], int(numbers[row])
        drawn = work.views > 0
        views[row] = policy.draw_for(example, number) if drawn else policy.canonical(example.image.shape[:2])
        pixels[row] = replayed(policy, example, views[row])
        return input_crc(pixels[row])

    crcs = np.fromiter(pool.map(fill, range(len(ids))), np.uint32, len(ids))
    # Of two examples the one of which more is seen says what the teacher should.
    shown = [shown_in(example, view, policy.size) for example, view in zip(examples, views, strict=True)]
    targets, sizes = work.task.collate(
        [
            work.task.replay_target(first.target, view, policy.size)
            for (first, _), view in zip(shown, views, strict=True)
        ]
    )
    mixed = isinstance(policy, MixedViews)
    labels = np.array([[one.target for one in both] for both in shown]) if mixed else targets
    return Rows([example.key for example in examples], views, crcs, targets, sizes, labels, pixels)


def shown_in(example: Example, view: np.void, size: tuple[int, int]) -> tuple[Example, Example]:
    """What a view shows: the example of which more is seen first, then the other; twice the same if it is not mixed."""
    share = second_share(view, size)
    other = example.partner[1] if share else example
    return (other, example) if share > 0.5 else (example, other)


def run_teacher(work: Extraction, batches: Iterator[Rows], teacher: Teacher, device: torch.device) -> Iterator[Said]:
    """Ask the teacher and encode its features. On a GPU a batch is fetched only once the next has been started."""
    torch.set_num_threads(work.threads)  # a convolution's last bits depend on it
    waiting: tuple[Rows, TeacherSignal] | None = None
    for rows in batches:
        with torch.inference_mode():
            images = torch.from_numpy(rows.pixels).to(device, non_blocking=True).permute(0, 3, 1, 2)
            signal = teacher(images)
        if waiting is not None:
            yield said(work, *waiting)
        waiting = rows, signal
    if waiting is not None:
        yield said(work, *waiting)


def said(work: Extraction, rows: Rows, signal: TeacherSignal) -> Said:
    """The signal on the host, its features encoded where they were made."""
    fields, storable, overflow = {}, {}, {}
    with torch.inference_mode():
        for name, codec in work.features.items():
            encoded, storable[name], overflow[name] = codec.encode(signal.features[name], rows.crcs)
            fields |= encoded
    return Said(rows, signal.logits.cpu().numpy(), fields, storable, overflow)


def encode(
    work: Extraction, batches: Iterator[Said], notes: dict[str, Any], advance: Advance
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Batches -> the members of one example after another. Fills `notes` with the codec's error, the teacher's sums and
    the examples whose signals cannot be stored: they keep their place, as zeros, and training leaves them out."""
    # Rows wait as bytes for the rest of their example: copying records would leave their padding behind.
    keys: list[str] = []
    payload: list[bytes] = []
    lost: list[list[str]] = []  # of each row, the signals that could not be stored
    for batch in batches:
        rows = batch.rows
        fields, good = work.codec.encode(batch.logits, rows.labels)
        new = pack_rows(work.dtype, rows.views, rows.crcs, fields | batch.fields)
        storable = {"logits": good, **batch.storable}
        keys += rows.keys
        payload += [new[row : row + 1].tobytes() for row in range(len(new))]
        lost += [[name for name, fine in storable.items() if not fine[row]] for row in range(len(new))]
        note(work, notes, batch, new, good)
        while len(keys) >= work.rows:
            bad = {view: names for view, names in enumerate(lost[: work.rows], work.first) if names}
            if bad:
                what = ", ".join(sorted({name for names in bad.values() for name in names}))
                reason = f"the teacher's {what} of views {list(bad)} are not finite or too large for a row"
                notes["quarantined"].append({"key": keys[0], "reason": reason})
            example = np.frombuffer(b"".join(payload[: work.rows]), work.dtype)
            yield keys[0], {f"{work.teacher}.npy": to_npy(example)}
            advance(1)
            keys, payload, lost = keys[work.rows :], payload[work.rows :], lost[work.rows :]


def note(work: Extraction, notes: dict[str, Any], batch: Said, packed: np.ndarray, good: np.ndarray) -> None:
    """Add a batch to what the shard's index says about the codec, the teacher and overflows."""
    notes["overflow"] = add_sums(notes["overflow"], batch.overflow)
    if not work.codec.fields():
        return
    rows, logits = batch.rows, batch.logits[good]
    some = good.nonzero()[0][:: work.codec.every]
    notes["error"] = add_sums(notes["error"], work.codec.error(batch.logits[some], work.codec.decode(packed[some])))
    sizes = None if rows.sizes is None else rows.sizes[good]
    notes["teacher"] = add_sums(notes["teacher"], work.task.teacher_sums(logits, rows.targets[good], sizes))


def take(batches: Iterator[Said], rows: int) -> Iterator[Said]:
    """Batches until `rows` rows have passed."""
    while rows > 0:
        batch = next(batches)
        rows -= len(batch.rows.keys)
        yield batch


def prefetch(items: Iterator[Any]) -> Iterator[Any]:
    """The items in order, made ahead by a thread. Its exceptions come out here; closing this generator ends it."""
    slots: queue.Queue[tuple[str, Any]] = queue.Queue(QUEUE_DEPTH)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                slots.put((kind, value), timeout=0.1)
                return

    def produce() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # handed over whole: the consumer raises it
            put("error", error)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = slots.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
        thread.join()
