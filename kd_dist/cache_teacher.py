"""Run a teacher once over every (example, view) and write its signals, shard by shard.

Reading with replay, the teacher, and encoding with writing overlap through bounded queues. Batches never cross a
shard, and their size, dtype and thread count are fixed and recorded, so any number of processes writes the same bytes.
`accelerate launch -m kd_dist.cache_teacher RECIPE`.
"""

import argparse
import contextlib
import functools
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from kd_dist import assemble, guard, manifest
from kd_dist.config import load
from kd_dist.data import Decode, Shards, read_examples
from kd_dist.errors import ShardError, one_sentence
from kd_dist.losses import LOSSES
from kd_dist.models import Network
from kd_dist.pack import refuse_other
from kd_dist.progress import Advance, progress
from kd_dist.recipe import Recipe
from kd_dist.shards import Shard, is_committed, shard_path, write_shard
from kd_dist.signals import (
    LogitsCodec,
    dtype_to_json,
    error_report,
    measured_error,
    merge_errors,
    pack_rows,
    row_dtype,
    to_npy,
)
from kd_dist.tasks import classification as task
from kd_dist.views import VIEW_DTYPE, ImageViews, canonical, draw, input_crc, replay

STEM = "signals"
QUEUE_DEPTH = 4
SATURATED_ENTROPY = 0.02  # nat; a teacher below it says little more than its top class


@dataclass(frozen=True)
class Extraction:
    """What one split's cache is made of."""

    examples: Shards
    folder: Path
    teacher: str  # its name, in member names
    policy: ImageViews
    views: int  # of an example; 0: one canonical view
    codec: LogitsCodec
    batch_size: int  # rows
    threads: int

    @property
    def rows(self) -> int:
        """Rows of an example."""
        return max(1, self.views)

    @property
    def dtype(self) -> np.dtype:
        return row_dtype(VIEW_DTYPE, self.codec.fields())


class Rows(NamedTuple):
    """Consecutive rows of one shard on their way through the teacher. Rows of an example are neighbours."""

    keys: list[str]
    views: np.ndarray  # (b,) VIEW_DTYPE
    crcs: np.ndarray  # (b,) uint32, of each row's pixels
    targets: np.ndarray  # (b,) class indices
    pixels: np.ndarray  # (b, H, W, 3) uint8
    logits: np.ndarray | None  # (b, C) float32, once the teacher has run


def extract(
    work: Extraction, network: Network, decode: Decode, device: torch.device, mine: range, advance: Advance
) -> None:
    """Write those of the shards numbered `mine` that are not committed yet."""
    wanted = []
    for number in mine:
        if is_committed(shard_path(work.folder, STEM, number)):
            advance(len(work.examples.shard(number)))
        else:
            wanted.append(number)
    with (
        contextlib.closing(prefetch(read_rows(work, wanted, decode))) as read,
        contextlib.closing(prefetch(run_teacher(read, network, device, work.threads))) as ran,
    ):
        for number in wanted:
            notes: dict[str, Any] = {"quarantined": [], "error": merge_errors([]), "teacher": None}
            rows = len(work.examples.shard(number)) * work.rows
            write_shard(shard_path(work.folder, STEM, number), encode(work, take(ran, rows), notes, advance), notes)


def read_rows(work: Extraction, numbers: list[int], decode: Decode) -> Iterator[Rows]:
    """Decode the examples of the shards, draw and replay their views, in batches that end with the shard."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number in numbers:
            first = int(work.examples.starts[number])
            for start in range(0, len(work.examples.shard(number)) * work.rows, work.batch_size):
                stop = min(start + work.batch_size, len(work.examples.shard(number)) * work.rows)
                places = range(start // work.rows, -(-stop // work.rows))
                examples = read_examples(work.examples, first + np.array(places), decode)
                chosen = [divmod(row, work.rows) for row in range(start, stop)]
                yield make_rows(work, [(examples[place - places[0]], view) for place, view in chosen], pool)


def make_rows(work: Extraction, chosen: list[tuple[Any, int]], pool: ThreadPoolExecutor) -> Rows:
    """Draw and replay each (example, view number)."""
    views = np.zeros(len(chosen), VIEW_DTYPE)
    pixels = np.empty((len(chosen), *work.policy.size, 3), np.uint8)

    def fill(row: int) -> int:
        example, number = chosen[row]
        size = example.image.shape[:2]
        views[row] = draw(work.policy, example.key, number, size) if work.views else canonical(work.policy, size)
        pixels[row] = replay(example.image, views[row], work.policy.size)
        return input_crc(pixels[row])

    crcs = np.fromiter(pool.map(fill, range(len(chosen))), np.uint32, len(chosen))
    targets = np.array([example.target for example, _ in chosen])
    return Rows([example.key for example, _ in chosen], views, crcs, targets, pixels, None)


def run_teacher(batches: Iterator[Rows], network: Network, device: torch.device, threads: int) -> Iterator[Rows]:
    """Fill in the logits. On a GPU a batch is fetched only once the next has been started."""
    torch.set_num_threads(threads)  # a convolution's last bits depend on it
    waiting: tuple[Rows, torch.Tensor] | None = None
    for rows in batches:
        with torch.inference_mode():
            images = torch.from_numpy(rows.pixels).to(device, non_blocking=True).permute(0, 3, 1, 2)
            logits = network(images).float()
        if waiting is not None:
            yield waiting[0]._replace(logits=waiting[1].cpu().numpy())
        waiting = rows, logits
    if waiting is not None:
        yield waiting[0]._replace(logits=waiting[1].cpu().numpy())


def encode(
    work: Extraction, batches: Iterator[Rows], notes: dict[str, Any], advance: Advance
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Batches -> the members of one example after another. Fills `notes` with the codec's error, the teacher's sums and
    the examples whose signals are not finite: they keep their place, as zeros, and training leaves them out."""
    # Rows wait as bytes for the rest of their example: copying records would leave their padding behind.
    keys: list[str] = []
    payload, storable, stride = b"", np.zeros(0, bool), work.dtype.itemsize * work.rows
    for batch in batches:
        fields, good = work.codec.encode(batch.logits)
        new = pack_rows(work.dtype, batch.views, batch.crcs, fields)
        error = measured_error(batch.logits[good], work.codec.decode(new[good]))
        notes["error"] = merge_errors([notes["error"], error])
        notes["teacher"] = add_sums(notes["teacher"], task.teacher_sums(batch.logits[good], batch.targets[good]))
        keys, payload, storable = keys + batch.keys, payload + new.tobytes(), np.concatenate([storable, good])
        whole = len(keys) // work.rows
        for number in range(whole):
            key, lost = keys[number * work.rows], np.flatnonzero(~storable[number * work.rows :][: work.rows])
            if len(lost):
                reason = f"the teacher's logits of views {lost.tolist()} are not finite or too large for a row"
                notes["quarantined"].append({"key": key, "reason": reason})
            rows = np.frombuffer(payload, work.dtype, work.rows, number * stride)
            yield key, {f"{work.teacher}.npy": to_npy(rows)}
            advance(1)
        keys, storable, payload = keys[whole * work.rows :], storable[whole * work.rows :], payload[whole * stride :]


def add_sums(one: Any, other: Any) -> Any:
    """Two nested structures of numbers added entry by entry; None counts as zero."""
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, dict):
        return {name: add_sums(one[name], other[name]) for name in one}
    if isinstance(one, list):
        return [add_sums(left, right) for left, right in zip(one, other, strict=True)]
    return one + other


def take(batches: Iterator[Rows], rows: int) -> Iterator[Rows]:
    """Batches until `rows` rows have passed."""
    while rows > 0:
        batch = next(batches)
        rows -= len(batch.keys)
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


def identity(work: Extraction, recipe: Recipe, split: str, network: Network, device: torch.device) -> dict[str, Any]:
    """What the manifest must say for the shards in the folder to be this extraction's."""
    classes = work.codec.classes
    fits = [name for name, loss in LOSSES.items() if loss.classes[0] <= classes <= (loss.classes[1] or classes)]
    return manifest.plain(
        {
            "kind": "signals",
            "examples_fingerprint": work.examples.fingerprint,
            "teacher": assemble.teacher_identity(recipe, network),
            "views": assemble.views_identity(recipe, split),
            "classes": classes,
            "codec": {"logits": work.codec.name},
            "row_dtype": dtype_to_json(work.dtype),
            "execution": {
                "batch_size": work.batch_size,
                "threads": work.threads,
                "device": device.type,
                "dtype": "float32",
                "tf32": False,
            },
            "exact_losses": sorted(fits),
        }
    )


def finish(work: Extraction, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest that completes the folder, with the codec's measured error and the teacher's report."""
    paths = [shard_path(work.folder, STEM, number) for number in range(len(work.examples.paths))]
    shards = [Shard(path) for path in paths]
    error = error_report(merge_errors([shard.notes["error"] for shard in shards]))
    sums = functools.reduce(add_sums, [shard.notes["teacher"] for shard in shards], None)
    final = {
        **content,
        "complete": True,
        "examples": sum(len(shard) for shard in shards),
        "row_bytes": work.dtype.itemsize,
        "bytes_per_view": sum(path.stat().st_size for path in paths) / max(1, len(work.examples) * work.rows),
        "codec_error": {"logits": error},
        "teacher_report": sums and task.teacher_report(sums),
        "shards": [manifest.shard_entry(shard) for shard in shards],
        "quarantined": [row for shard in shards for row in shard.notes["quarantined"]],
        "versions": manifest.versions(),
    }
    if len(final["quarantined"]) == final["examples"]:
        raise ShardError(
            f"{work.folder}: the teacher's logits are not finite for any example; check its weights and normalisation"
        )
    manifest.write_manifest(work.folder, final)
    return final


def cache_split(recipe: Recipe, split: str, network: Network, accelerator: Accelerator) -> dict[str, Any]:
    """Cache one split with all processes; returns its manifest. What is committed already is kept."""
    work = Extraction(
        examples=assemble.examples(recipe, split),
        folder=assemble.signals_folder(recipe, split),
        teacher=recipe.teacher.name,
        policy=assemble.view_policy(recipe),
        views=assemble.stored_views(recipe, split),
        codec=LogitsCodec(recipe.cache.logits, recipe.task.classes),
        batch_size=recipe.cache.batch_size,
        threads=recipe.cache.threads,
    )
    content = identity(work, recipe, split, network, accelerator.device)
    done = None
    if (work.folder / manifest.FILE_NAME).is_file():
        there = manifest.read_manifest(work.folder)
        refuse_other(work.folder, {name: there.get(name) for name in content}, content)
        done = manifest.finished(work.folder)
    accelerator.wait_for_everyone()  # every rank has read it before one changes it
    if done is not None:
        accelerator.print(f"cache {split}: done before, {done['examples']:,} examples x {work.rows} views")
        return done
    if accelerator.is_main_process:
        work.folder.mkdir(parents=True, exist_ok=True)
        manifest.write_manifest(work.folder, {**content, "complete": False})
    accelerator.wait_for_everyone()
    mine = range(accelerator.process_index, len(work.examples.paths), accelerator.num_processes)
    total = sum(len(work.examples.shard(number)) for number in mine)
    with progress(f"cache {split}", total, "examples", accelerator.is_main_process) as advance:
        extract(work, network, assemble.decoder(recipe), accelerator.device, mine, advance)
    accelerator.wait_for_everyone()
    return finish(work, content) if accelerator.is_main_process else content


def cache_teacher(recipe: Recipe) -> None:
    """Run the recipe's teacher over every split that it needs and report what it said."""
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))  # ranks finish their last shards far apart
    accelerator = Accelerator(kwargs_handlers=[patient])
    guard.check_world(accelerator.num_processes)
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = False
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    network = assemble.teacher_network(recipe).to(accelerator.device)
    for split in assemble.splits(recipe):
        made = cache_split(recipe, split, network, accelerator)
        if accelerator.is_main_process:
            print(summary(split, made), flush=True)
    accelerator.end_training()


def summary(split: str, made: dict[str, Any]) -> str:
    """The teacher's report and the cost of its signals, with warnings."""
    said, error = made["teacher_report"], made["codec_error"]["logits"]
    lines = [f"teacher on {split}: no rows"]
    if said is not None:
        lines = [
            f"teacher on {split}: accuracy {said['accuracy']:.4f}, nll {said['nll']:.4f}, "
            f"entropy {said['entropy']:.4f} nat, saturated {said['saturated']:.1%} of {said['rows']:,} rows",
            f"  rows per class, labelled / predicted: {said['labelled_per_class']} / {said['predicted_per_class']}",
            f"  {made['row_bytes']} bytes a row, {made['bytes_per_view']:,.0f} a view on disk; "
            f"{made['codec']['logits']} logits: largest error {error['max_abs']:.1e}, "
            f"mean KL {error['mean_kl_t1']:.1e} nat",
        ]
        if said["entropy"] < SATURATED_ENTROPY:
            lines.append(
                f"warning: the teacher's mean entropy is {said['entropy']:.4f} nat: it says little beyond its top "
                f"class; a higher temperature, stronger views or a less certain teacher would teach more"
            )
    bad = made["quarantined"]
    if bad:
        lines.append(f"warning: {len(bad)} examples are quarantined; the first: '{bad[0]['key']}', {bad[0]['reason']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m kd_dist.cache_teacher",
        description="Run the teacher of a recipe once over every view and write its signals.",
        epilog="example: accelerate launch -m kd_dist.cache_teacher configs/digits.yaml cache.logits=uint8",
    )
    parser.add_argument("recipe", help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    given = parser.parse_args(arguments)
    cache_teacher(load(given.recipe, given.overrides))


if __name__ == "__main__":
    with one_sentence():
        main()
