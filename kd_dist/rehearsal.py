"""A recipe in small, before anything is spent: some of its examples in a temporary folder, cached and trained on for
seconds, by the clock."""

import contextlib
import io
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kd_dist import assemble, engine, guard, manifest, places, train
from kd_dist.batch import Batch, TeacherSignal
from kd_dist.cache_teacher import cache_split, extraction
from kd_dist.calibrate import BASIS_ROWS, PROBE_ROWS
from kd_dist.checkpoint import Progress
from kd_dist.epoch import run_evaluation
from kd_dist.errors import DataError
from kd_dist.extract import STEM, Said, answers, batches_ahead, encode
from kd_dist.folders import Shards
from kd_dist.link import SOURCE
from kd_dist.loader import on_device
from kd_dist.pack import assign, item_key, pack_split, refuse_classes, refuse_twins
from kd_dist.preempt import Notice
from kd_dist.recipe import Recipe, Stage
from kd_dist.rows import feature_codecs
from kd_dist.shards import BLOCK, Shard, shard_path, write_shard
from kd_dist.sources import Item, Listing, list_items
from kd_dist.stage import Run, prepare
from kd_dist.step import run_step
from kd_dist.tasks import packed_for
from kd_dist.teacher import Teacher

Clock = Callable[[], float]  # seconds

FEWEST, MOST, OTHERS = 64, 1024, 64  # examples that are tried: of the training split, where there are any; of another
ENDLESS = 100_000  # epochs: a stage must not end while it is measured
BATCHES, STEPS = 4, 3  # that are measured at least
LISTED, OPENINGS, INDEXED = 4096, 16, (16, 4096)  # shards of a manifest; indexes that are opened, and their examples
READ_AHEAD = 4  # batches that each loader process holds ready, which the first steps find for nothing


class Counted(NamedTuple):
    """What there is, or will be, of each split that a source has to give."""

    shards: dict[str, list[int]]  # examples of each shard
    key_bytes: dict[str, int]  # of all keys of the split
    listing: Listing | None  # None: they are packed
    items: dict[str, list[Item]]  # of a listing


class Small(NamedTuple):
    """A recipe whose shards and runs lie in a temporary folder."""

    recipe: Recipe
    example_bytes: float  # mean of an example of the training split in its tar


def counted(recipe: Recipe) -> Counted:
    """Count the packed examples, or, where some split is not packed yet, those that the source lists."""
    folder, splits = places.shards_folder(recipe), places.splits(recipe)
    if all(manifest.finished(folder / split) is not None for split in splits):
        parts = {split: assemble.examples(recipe, split) for split in splits}
        sizes = {split: [row["examples"] for row in part.manifest["shards"]] for split, part in parts.items()}
        return Counted(sizes, {split: keys_of(part) for split, part in parts.items()}, None, {})
    d, task = recipe.data, assemble.task(recipe)
    if d.source == SOURCE:
        raise DataError(f"{folder}: the tars of data.source {SOURCE} have no index yet; run `kd-dist index` first")
    listing = list_items(d.source, d.root, d.options)
    refuse_classes(d.source, listing.classes, task)
    items = assign(listing.items, d.splits)
    for split in splits:
        if not items.get(split):
            raise DataError(f"data.source {d.source}: no example for split '{split}'; it has {sorted(items)}")
        refuse_twins(items[split])
    sizes = {split: divided(len(items[split]), d.shard_size) for split in splits}
    keys = {split: sum(len(item_key(item)) for item in items[split]) for split in splits}
    return Counted(sizes, keys, listing, {split: items[split] for split in splits})


def keys_of(shards: Shards) -> int:
    """Bytes of all keys."""
    return sum(len(key) for number in range(len(shards.paths)) for key in shards.shard(number).keys)


def divided(count: int, size: int) -> list[int]:
    """How many of `count` examples each shard of at most `size` holds."""
    return [min(size, count - start) for start in range(0, count, size)]


def likely_teacher(recipe: Recipe) -> tuple[Recipe, bool]:
    """The recipe with a teacher that can be built now, and whether it is the one that will be cached: of one that is
    not trained yet the weights are random."""
    t, file = recipe.teacher, places.weights_file(recipe, recipe.teacher.weights)
    if file is None:
        return recipe, True
    ready = places.weights_ready(recipe, t.weights) and file.is_file()
    return replace(recipe, teacher=replace(t, weights=str(file) if ready else None)), ready


def small(recipe: Recipe, there: Counted, folder: Path, processes: int) -> Small:
    """Put the first examples of each split under `folder`, and give the recipe that reads them: stages without weights
    to start from, with one process's share of their batches."""
    stages = {
        name: replace(
            one,
            init=None,
            generated=False,
            epochs=ENDLESS,
            max_steps=None,
            patience=None,
            teachers=(),
            shards=None,
            batch_size=own_share(one, processes),
        )
        for name, one in recipe.stages.items()
    }
    wanted = min(MOST, max(FEWEST, *(one.batch_size for one in stages.values())))
    for split, sizes in there.shards.items():
        count = min(sum(sizes), wanted if split == places.TRAINING_SPLIT else OTHERS)
        at = folder / "shards" / recipe.name / split
        if there.listing is None:
            copy_examples(assemble.examples(recipe, split), at, count)
        else:
            pack_examples(recipe, there, split, at, count)
    packed = Shard(shard_path(folder / "shards" / recipe.name / places.TRAINING_SPLIT, "data", 0))
    members = [[len(one) for one in packed.read(place).values()] for place in range(len(packed))]
    views = min(recipe.views.count, -(-(BASIS_ROWS + PROBE_ROWS) // len(packed)))
    made = replace(
        recipe.with_teacher(recipe.teacher.name),
        data=replace(recipe.data, shards=str(folder / "shards"), local_cache=None),
        runs=str(folder / "runs"),
        views=replace(recipe.views, count=views),
        student=replace(recipe.student, weights=None),
        stages=stages,
    )
    return Small(made, statistics.fmean(map(tar_bytes, members)))


def own_share(stage: Stage, processes: int) -> int:
    """A process's part of a stage's batch: whole micro-batches, of two examples at least where there are as many."""
    part = -(-stage.batch_size // (processes * stage.accumulate))
    return min(stage.batch_size, stage.accumulate * max(part, 2))


def tar_bytes(sizes: Sequence[int]) -> int:
    """Bytes in a tar of an example whose members have these sizes."""
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)


def copy_examples(shards: Shards, folder: Path, count: int) -> None:
    """The first `count` packed examples as a finished folder of one shard."""
    folder.mkdir(parents=True)
    numbers, spots = (one.tolist() for one in shards.locate(np.arange(count)))
    path = shard_path(folder, "data", 0)
    held = (shards.read(number, spot) for number, spot in zip(numbers, spots, strict=True))  # as they are packed
    write_shard(path, held, {"quarantined": []})
    shard = Shard(path)
    changed = {"examples": len(shard), "tar_bytes": shard.tar_bytes, "shards": [manifest.shard_entry(shard)]}
    kept = {name: one for name, one in shards.manifest.items() if name != "members"}
    manifest.write_manifest(folder, {**kept, **changed, "quarantined": []})


def pack_examples(recipe: Recipe, there: Counted, split: str, folder: Path, count: int) -> None:
    """The first `count` examples that the source lists for a split, packed as a finished folder of one shard."""
    task = assemble.task(recipe)
    content = {"kind": "examples", "split": split, "class_names": list(there.listing.classes), "shard_size": count}
    pack_split(
        folder,
        there.items[split][:count],
        {**content, **packed_for(task)},
        task,
        Notice(),
        there.listing.libraries,
    )


class Stand(Teacher):
    """In a teacher's place, says at once numbers of the shapes that it would say: what a student's step takes does not
    depend on them."""

    def __init__(self, teacher: Teacher, size: tuple[int, int]) -> None:
        super().__init__(teacher.network, {})
        self.said = teacher.shapes(size)

    def shapes(self, size: tuple[int, int]) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
        return self.said

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> TeacherSignal:
        logits, features = self.said

        def some(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(len(images), *shape, device=images.device)

        return TeacherSignal(some(logits), {name: some(shape) for name, shape in features.items()})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said within: it is no real run. Threads of the CPU are put back."""
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        torch.set_num_threads(threads)


def measure(tried: Small, teacher: Teacher, clock: Clock, seconds: float, students: bool = True) -> dict[str, Any]:
    """What caching a view takes here, and what the teacher says of one in `teacher_seconds`; of `students` also a step
    of each stage and judging an example. Each is measured for about so many `seconds`; see `extraction_time` and
    `stage_time`."""
    recipe = tried.recipe
    with quiet():
        accelerator = engine.accelerator()
        teacher = teacher.to(accelerator.device)
        cache_split(recipe, places.TRAINING_SPLIT, Stand(teacher, recipe.views.shape), accelerator)
        cached = extraction_time(recipe, teacher, accelerator.device, clock, seconds)
    size = (recipe.cache.batch_size, teacher.network.channels, *recipe.views.shape)
    images = torch.randint(0, 256, size, dtype=torch.uint8, device=accelerator.device)
    stages: dict[str, Any] = {}
    for name, stage in recipe.stages.items() if students else ():
        if stage.model == "student":
            with quiet():
                stages[name] = stage_time(recipe, name, teacher, clock, seconds)
    spoken = teacher_time(teacher, images, clock)
    return {
        "device": accelerator.device.type,
        "cache": cached,
        "stages": stages,
        "teacher_seconds": spoken,
        "start": start_time(assemble.examples(recipe, places.TRAINING_SPLIT), clock),
    }


def start_time(shards: Shards, clock: Clock) -> dict[str, float]:
    """What a process does before it can read: `listed_seconds` for each shard that a manifest lists; for each index
    that is opened `opened_seconds`, and `index_seconds` for each of its examples."""
    folder, taken = shards.folder.with_name("listed"), []
    folder.mkdir()
    for number, examples in enumerate(INDEXED):
        taken.append(opening_time(shard_path(folder, "data", number), examples, clock))
    each = max(0.0, (taken[1] - taken[0]) / (INDEXED[1] - INDEXED[0]))
    manifest.write_manifest(folder, {**shards.manifest, "shards": shards.manifest["shards"][:1] * LISTED})
    began = clock()
    assert Shards(folder).fingerprint
    listed = (clock() - began) / LISTED
    return {"listed_seconds": listed, "opened_seconds": max(0.0, taken[0] - INDEXED[0] * each), "index_seconds": each}


def opening_time(path: Path, examples: int, clock: Clock) -> float:
    """Seconds of opening the index of a shard of so many empty examples, which is written to `path`."""
    write_shard(path, ((f"{one:020d}", {"jpg": b"", "json": b""}) for one in range(examples)), {})
    began = clock()
    for _ in range(OPENINGS):
        Shard(path)
    return (clock() - began) / OPENINGS


def teacher_time(teacher: Teacher, images: torch.Tensor, clock: Clock) -> float:
    """Seconds of a teacher in the loop for one image."""
    for _ in range(2):  # the first has more to do
        began = time_of(clock, images.device)
        teacher(images)
        spoken = time_of(clock, images.device) - began
    return spoken / len(images)


def extraction_time(
    recipe: Recipe, teacher: Teacher, device: torch.device, clock: Clock, seconds: float
) -> dict[str, Any]:
    """`seconds` for `rows` views: read, decoded, replayed, through the teacher, encoded and written, as caching does
    it."""
    work = extraction(recipe, places.TRAINING_SPLIT, teacher)
    codecs = feature_codecs(work.folder, manifest.read_manifest(work.folder)["codec"])
    work = replace(work, folder=work.folder.with_name("timed"), features=on_device(codecs, device))
    work.folder.mkdir()
    marks: list[tuple[float, int]] = []  # when a batch was ready, and its rows
    early, began = batches_ahead(), clock()  # the first batches were made while the teacher had not begun

    def enough() -> bool:
        taken = marks[-1][0] - marks[0][0] if marks else 0.0
        return taken >= seconds and (len(marks) > BATCHES or taken >= 4 * seconds)

    def shard_of(batches: Iterator[Said]) -> Iterator[Said]:
        nonlocal early
        rows, whole = 0, len(work.examples) * work.rows
        while rows < whole and not enough():
            batch = next(batches)
            rows += len(batch.rows.keys)
            marks.append((clock(), len(batch.rows.keys)))
            if early > 0 and marks[-1][0] - began < seconds:
                early, marks[:] = early - 1, marks[-1:]
            yield batch

    with answers(work, itertools.repeat(0), teacher, device) as ran:
        for number in itertools.count():
            notes: dict[str, Any] = {"quarantined": [], "error": None, "teacher": None, "overflow": None}
            write_shard(shard_path(work.folder, STEM, number), encode(work, shard_of(ran), notes, nothing), notes)
            if enough():
                break
        ended = clock()
    first, *others = marks  # of the first that counts, what came before it does not
    return {"rows": sum(rows for _, rows in others), "seconds": ended - first[0], "threads": work.threads}


def nothing(count: int) -> None:
    """No progress is shown."""


def stage_time(recipe: Recipe, name: str, teacher: Teacher, clock: Clock, seconds: float) -> dict[str, Any]:
    """What a stage takes on one process: `step_seconds` of a step, reading included, of `rows` examples, of which it
    waits for batches `wait_seconds`; `steps` that were measured; `read_seconds` of an example in one process,
    `validation_seconds` of one, and the `teacher_seconds` that one in the loop would take for it."""
    run, progress = prepare(recipe, name), Progress(scale=guard.first_scale(recipe.stages[name].precision == "fp16"))
    run.folder.mkdir(parents=True, exist_ok=True)
    run.engine.set_lr(0.0)  # what is learnt from numbers without sense must not become infinite
    device, stream = run.accelerator.device, train.read_ahead(run, 0)
    taken: list[tuple[float, int]] = []
    ahead, seen, waits = 2 + READ_AHEAD * run.workers, [], []
    with closing(stream):
        began = now = time_of(clock, device)
        steps = 0
        while not done(taken, seconds):
            seen.clear()
            run_step(run, progress, watched(stream, seen), stopping=False)
            rows, images = sum(len(batch.keys) for batch, _ in seen), seen[-1][0].images
            before, now, steps = now, time_of(clock, device), steps + 1
            if steps > ahead or (steps > 1 and before - began >= seconds):
                taken.append((now - before, rows))
                waits.append(sum(waited for _, waited in seen))
    whole = max(rows for _, rows in taken)
    full = [one for one, rows in taken if rows == whole]
    waited = statistics.fmean(wait for wait, (_, rows) in zip(waits, taken, strict=True) if rows == whole)
    return {
        "rows": whole,
        "steps": len(full),
        "step_seconds": statistics.fmean(full),
        "wait_seconds": waited,
        "read_seconds": reading_time(run, clock),
        "validation_seconds": validation_time(run, clock),
        "teacher_seconds": teacher_time(teacher, images, clock),
    }


def watched(
    stream: Iterator[tuple[Batch, float]], seen: list[tuple[Batch, float]]
) -> Iterator[tuple[Batch, float]]:
    """The batches of a stream, each noted as it passes."""
    for one in stream:
        seen.append(one)
        yield one


def reading_time(run: Run, clock: Clock) -> float:
    """Seconds in which one process reads an example to train on, decodes it and replays its view."""
    _ = run.train[0]  # opens what there is to open
    began = clock()
    read = [run.train[number] for number in range(BATCHES)]
    return (clock() - began) / sum(len(batch.keys) for batch in read)


def validation_time(run: Run, clock: Clock) -> float:
    """Seconds for an example that is judged by."""
    run_evaluation(run)
    began = time_of(clock, run.accelerator.device)
    run_evaluation(run)
    if run.writer is not None:
        run.writer.close()
    return (time_of(clock, run.accelerator.device) - began) / len(run.validation.examples)


def done(taken: Sequence[tuple[float, int]], seconds: float) -> bool:
    """Whether enough steps are measured."""
    spent = sum(one for one, _ in taken)
    return bool(taken) and spent >= seconds and (len(taken) >= STEPS or spent >= 4 * seconds)


def time_of(clock: Clock, device: torch.device) -> float:
    """The clock, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()
