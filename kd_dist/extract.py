"""A teacher over the examples of one split: read and replay, run, encode, write, one shard after another.

The parts overlap, each in threads of its own, and little is under way between them. Batches never cross a shard, so
any number of processes writes the same bytes.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kd_dist.batch import Example, TeacherSignal
from kd_dist.compress import FeatureCodec
from kd_dist.folders import Shards, drawn_partners, read_examples, with_partners
from kd_dist.loader import prefetch
from kd_dist.progress import Advance
from kd_dist.shards import is_committed, shard_path, write_shard
from kd_dist.signals import Codec, add_sums, pack_rows, row_dtype, to_npy
from kd_dist.tasks import Task
from kd_dist.teacher import Teacher
from kd_dist.views import MixedViews, ViewPolicy, input_crc, replayed
from kd_dist.views.mixed import second_share

STEM = "signals"
NOTED = ("error", "teacher", "overflow")  # sums in the index of a shard
READERS = 16  # threads that read, at most
SPARE = 2  # batches that they find when they are done with one


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


class Asked(NamedTuple):
    """Rows that the teacher has been asked about: a GPU may not have come to them yet."""

    rows: Rows
    signal: TeacherSignal
    ready: torch.cuda.Event | None  # when the signal is; None: now


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
    with answers(work, wanted, teacher, device) as ran:
        for number in wanted:
            notes: dict[str, Any] = {"quarantined": [], **dict.fromkeys(NOTED)}
            rows, start = len(work.examples.shard(number)) * work.rows, time.monotonic()
            write_shard(shard_path(work.folder, STEM, number), encode(work, take(ran, rows), notes, advance), notes)
            slowest = max(slowest, time.monotonic() - start)
    return slowest


@contextlib.contextmanager
def answers(
    work: Extraction, numbers: Iterable[int], teacher: Teacher, device: torch.device
) -> Iterator[Iterator[Said]]:
    """Within the block the rows of these shards, in order, after the teacher, made ahead by threads."""
    with (
        contextlib.closing(read_rows(work, numbers)) as read,
        # One waits: with it the features of three batches are held at a time.
        contextlib.closing(prefetch(run_teacher(work, read, teacher, device), 1)) as asked,
        contextlib.closing(prefetch(fetched(work, asked, device))) as ran,
    ):
        yield ran


def read_rows(work: Extraction, numbers: Iterable[int]) -> Iterator[Rows]:
    """Decode the examples of the shards, draw and replay their views, in batches that end with the shard."""

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in numbers:
            first, count = int(work.examples.starts[number]) * work.rows, len(work.examples.shard(number)) * work.rows
            for start in range(0, count, work.batch_size):
                stop = min(start + work.batch_size, count)
                yield np.divmod(first + np.arange(start, stop), work.rows)

    return made_rows(work, batches())


def made_rows(work: Extraction, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[Rows]:
    """`make_rows` of each batch of example ids and view numbers, in order: several at a time, one by each thread."""
    under_way: deque[Future[Rows]] = deque()
    pool = ThreadPoolExecutor(readers())
    try:
        for batch in batches:
            under_way.append(pool.submit(make_rows, work, *batch))
            if len(under_way) > readers() + SPARE:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def readers() -> int:
    """Threads that read."""
    return min(READERS, os.cpu_count() or 1)


def batches_ahead() -> int:
    """How many batches may have been read, at most, before the teacher is asked about the first."""
    return readers() + SPARE + 1


def make_rows(work: Extraction, ids: np.ndarray, numbers: np.ndarray) -> Rows:
    """Read the examples `ids` (b,), draw and replay of each the view `numbers` (b,), counted from the first."""
    policy, numbers = work.policy, numbers + work.first
    once, places = np.unique(ids, return_inverse=True)
    read = read_examples(work.examples, once, work.task.decode)
    examples = [read[place] for place in places]
    if isinstance(policy, MixedViews):
        partners = drawn_partners(work.examples, policy, ids, numbers)
        examples = with_partners(work.examples, examples, ids, partners, work.task.decode)
    views, crcs = np.zeros(len(ids), policy.dtype), np.zeros(len(ids), np.uint32)
    pixels = np.empty((len(ids), *policy.size, policy.channels), np.uint8)
    for row, (example, number) in enumerate(zip(examples, numbers.tolist(), strict=True)):
        drawn = work.views > 0
        views[row] = policy.draw_for(example, number) if drawn else policy.canonical(example.image.shape[:2])
        pixels[row] = replayed(policy, example, views[row])
        crcs[row] = input_crc(pixels[row])
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


def run_teacher(work: Extraction, batches: Iterable[Rows], teacher: Teacher, device: torch.device) -> Iterator[Asked]:
    """Ask the teacher. A GPU is only told what to do: nothing here waits for it."""
    torch.set_num_threads(work.threads)  # a convolution's last bits depend on it
    on_gpu = device.type == "cuda"
    for rows in batches:
        with torch.inference_mode():
            pixels = torch.from_numpy(rows.pixels)
            pixels = pixels.pin_memory() if on_gpu else pixels  # from elsewhere no copy goes on by itself
            signal = teacher(pixels.to(device, non_blocking=True).permute(0, 3, 1, 2))
        ready = torch.cuda.current_stream(device).record_event() if on_gpu else None
        yield Asked(rows, signal, ready)


def fetched(work: Extraction, batches: Iterable[Asked], device: torch.device) -> Iterator[Said]:
    """Signals on the host, their features encoded where they were made. On a GPU this goes on beside the teacher, in a
    stream of its own: in the teacher's, a signal would be had only after all that the teacher was asked since."""
    beside: Any = contextlib.nullcontext()
    if device.type == "cuda":
        beside = torch.cuda.stream(torch.cuda.Stream(device))
    for rows, signal, ready in batches:
        with beside:
            if ready is not None:
                torch.cuda.current_stream(device).wait_event(ready)
            found = said(work, rows, signal)  # waits for what it copies, so the signal's memory may be used again
        yield found


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
    payload = np.zeros((0, work.dtype.itemsize), np.uint8)
    lost: list[list[str]] = []  # of each row, the signals that could not be stored
    for batch in batches:
        rows = batch.rows
        fields, good = work.codec.encode(batch.logits, rows.labels)
        new = pack_rows(work.dtype, rows.views, rows.crcs, fields | batch.fields)
        note(work, notes, batch, new, good)
        storable = {"logits": good, **batch.storable}
        fine = np.all(list(storable.values()), axis=0).tolist()
        keys += rows.keys
        lost += [
            [] if fine[row] else [name for name, one in storable.items() if not one[row]] for row in range(len(new))
        ]
        fresh = new.view(np.uint8).reshape(len(new), -1)
        payload = np.concatenate([payload, fresh]) if len(payload) else fresh
        whole = len(keys) - len(keys) % work.rows
        for start in range(0, whole, work.rows):
            bad = {view: names for view, names in enumerate(lost[start : start + work.rows], work.first) if names}
            if bad:
                what = ", ".join(sorted({name for names in bad.values() for name in names}))
                reason = f"the teacher's {what} of views {list(bad)} are not finite or too large for a row"
                notes["quarantined"].append({"key": keys[start], "reason": reason})
            example = payload[start : start + work.rows].reshape(-1).view(work.dtype)
            yield keys[start], {f"{work.teacher}.npy": to_npy(example)}
            advance(1)
        keys, payload, lost = keys[whole:], payload[whole:], lost[whole:]


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
