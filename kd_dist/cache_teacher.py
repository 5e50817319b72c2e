"""Run a teacher once over every (example, view) and write its signals.

Batch size, dtype and thread count are fixed and recorded, so any number of processes writes the same bytes. They meet
in the folder alone: each waits for the files that the others write, and none can hang in a collective call.
`accelerate launch -m kd_dist.cache_teacher RECIPE`.
"""

import argparse
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kd_dist import assemble, caches, guard, manifest, places, policies
from kd_dist.caches import Piece
from kd_dist.calibrate import calibrate, planned_codecs
from kd_dist.compress import Basis, save_bases
from kd_dist.config import load
from kd_dist.disk import published
from kd_dist.errors import ContactError, ModelError, Preempted, ShardError, cause, is_out_of_memory, one_sentence
from kd_dist.extract import STEM, Extraction, extract
from kd_dist.loader import on_device
from kd_dist.pack import refuse_other, refuse_writing
from kd_dist.preempt import Notice, noticed
from kd_dist.progress import progress
from kd_dist.recipe import Recipe
from kd_dist.rows import BASES, LOGITS, feature_codecs, span
from kd_dist.shards import Shard, is_committed, shard_path
from kd_dist.signals import codec_of, dtype_to_json
from kd_dist.tasks import Task
from kd_dist.teacher import Teacher, repeatable

POOR = 0.5  # relative error of a feature that is worth a warning
LAST_SHARD = 10  # times the slowest shard of this process, that another may take for one
LONGEST_LOOK = 2.0  # seconds between two looks for the files of others


def identity(work: Extraction, recipe: Recipe, split: str, teacher: Teacher, device: torch.device) -> dict[str, Any]:
    """What the manifest must say for the shards in the folder to be this extraction's."""
    wanted = caches.codec_identity(recipe, split)["features"]
    features = {name: {**wanted[name], "shape": codec.shape} for name, codec in work.features.items()}
    return manifest.plain(
        {
            "kind": "signals",
            "examples_fingerprint": work.examples.fingerprint,
            "teacher": caches.teacher_identity(recipe, teacher.network),
            "views": caches.views_identity(recipe, split, work.first, work.views),
            "task": work.task.name,
            "classes": work.codec.classes,
            "codec": {"logits": work.codec.name, "grid": work.codec.grid, "features": features},
            "execution": {
                "batch_size": work.batch_size,
                "threads": work.threads,
                "device": device.type,
                "dtype": "float32",
                "tf32": False,
            },
        }
    )


def finish(work: Extraction, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest that completes the folder, with the codec's measured error and the teacher's report."""
    paths = [shard_path(work.folder, STEM, number) for number in range(len(work.examples.paths))]
    final = {
        **content,
        **caches.told([Shard(path) for path in paths], content, work.task),
        "complete": True,
        "row_bytes": work.dtype.itemsize,
        "bytes_per_view": sum(path.stat().st_size for path in paths) / max(1, len(work.examples) * work.rows),
        "versions": manifest.versions(),
    }
    if len(final["quarantined"]) == final["examples"]:
        first = final["quarantined"][0]
        raise ShardError(
            f"{work.folder}: no example has signals that could be stored, the first is '{first['key']}': "
            f"{first['reason']}; check the teacher's weights and normalisation, or store what is too large as fp32"
        )
    manifest.write_manifest(work.folder, final)
    return final


def extraction(recipe: Recipe, split: str, teacher: Teacher, piece: Piece | None = None) -> Extraction:
    """What a split's cache is made of, or one piece of it; the features that are reduced have no basis yet."""
    grid, shapes = teacher.shapes(recipe.views.shape)
    wanted, task = caches.codec_identity(recipe, split)["features"], assemble.task(recipe)
    views = places.stored_views(recipe, split)
    if piece is None:
        piece = Piece(0, 0, views, frozenset([LOGITS, *wanted]), None)
    logits = recipe.cache.logits if LOGITS in piece.stored else None
    features = {name: recipe.cache.features[name] for name in wanted if name in piece.stored}
    return Extraction(
        examples=assemble.examples(recipe, split),
        folder=places.signals_folder(recipe, split, piece.number),
        task=task,
        teacher=recipe.teacher.name,
        policy=policies.split_policy(recipe, split),
        views=piece.count if views else 0,
        codec=codec_of(task.name, logits, task.classes, grid[1:] or None),
        features=planned_codecs(features, shapes),
        batch_size=recipe.cache.batch_size,
        threads=recipe.cache.threads,
        first=piece.first,
    )


def prepare_codecs(
    work: Extraction, content: dict[str, Any], recipe: Recipe, split: str, teacher: Teacher, device: torch.device
) -> None:
    """Fit the bases, measure the codecs and begin the folder with its manifest so far. For one process.

    A run that goes on keeps the bases of the one before: half the rows may be written with them. What is added is
    reduced with the bases of what is there, and generated examples with those of the packed ones: they are trained on
    together.
    """
    if (work.folder / manifest.FILE_NAME).is_file():
        return
    torch.set_num_threads(work.threads)  # as for the rows: the last bits of the bases depend on it
    bases, report = {}, {}
    if work.features:
        features = {name: recipe.cache.features[name] for name in work.features}
        bases, report = calibrate(work, features, teacher, device, known_bases(recipe, split, features))
    work.folder.mkdir(parents=True, exist_ok=True)
    sha256 = None
    if bases:
        payload = save_bases(bases)
        sha256 = hashlib.sha256(payload).hexdigest()
        with published(work.folder / BASES) as file:
            file.write(payload)
    codecs = {name: replace(codec, basis=bases.get(name)) for name, codec in work.features.items()}
    begun = {
        **content,
        "codec": {**content["codec"], "bases_sha256": sha256},
        "feature_report": report,
        "row_dtype": dtype_to_json(replace(work, features=codecs).dtype),
        "versions": manifest.versions(),
    }
    manifest.write_manifest(work.folder, {**begun, "complete": False})


def known_bases(recipe: Recipe, split: str, features: Iterable[str]) -> dict[str, Basis] | None:
    """What those of the features that are reduced are reduced with in folders that are there; None where there are
    none."""
    given, there = {}, list(caches.folders(recipe, places.TRAINING_SPLIT))
    if split == manifest.GENERATED:
        there += caches.folders(recipe, split)
    for _, folder in there:
        codecs = feature_codecs(folder, manifest.read_manifest(folder)["codec"])
        given |= {name: codecs[name].basis for name in features if name in codecs and codecs[name].basis is not None}
    return given if there else None


def cache_split(
    recipe: Recipe, split: str, teacher: Teacher, accelerator: Accelerator, notice: Notice | None = None
) -> dict[str, Any]:
    """Cache what is missing of one split with all processes, a folder for each piece of it; returns the manifest of the
    last, or of the first folder where nothing is missing. What is committed already is kept.

    Raises Preempted at the teacher's next batch once a signal is noticed, and ContactError when the other processes
    write nothing for long.
    """
    first = places.signals_folder(recipe, split)
    if not (first / manifest.FILE_NAME).is_file():
        refuse_writing(first)
    found = caches.pieces(recipe, split)
    todo = [piece.number for piece in found if not caches.is_finished(recipe, split, piece)]
    for piece in found:
        if piece.number not in todo:
            work = extraction(recipe, split, teacher, piece)
            refuse_begun(work, identity(work, recipe, split, teacher, accelerator.device), finished=True)
            feature_codecs(work.folder, piece.about["codec"])  # refuses a folder that has lost its bases
    if not todo:
        examples, views = found[0].about["examples"], max(1, places.stored_views(recipe, split))
        accelerator.print(f"cache {split}: done before, {examples:,} examples x {views} views")
    for piece in found:
        made = piece.about
        if piece.number in todo:
            made = cache_piece(recipe, split, piece, teacher, accelerator, notice or Notice())
        if accelerator.is_main_process:
            print(summary(split, made, assemble.task(recipe)), flush=True)
    return made


def refuse_begun(work: Extraction, content: dict[str, Any], finished: bool) -> None:
    """Raise a MismatchError that names the first value that the folder's manifest has otherwise. In a finished folder
    more features than are wanted do no harm."""
    there = manifest.read_manifest(work.folder)
    codec = there["codec"] = {name: value for name, value in there["codec"].items() if name != "bases_sha256"}
    if finished:
        codec["features"] = {name: one for name, one in codec["features"].items() if name in work.features}
    refuse_other(work.folder, there, content)


def cache_piece(
    recipe: Recipe, split: str, piece: Piece, teacher: Teacher, accelerator: Accelerator, notice: Notice
) -> dict[str, Any]:
    """Write one folder with all processes, from its beginning or from where it was left; returns its manifest."""
    work = extraction(recipe, split, teacher, piece)
    content = identity(work, recipe, split, teacher, accelerator.device)
    path, patience = work.folder / manifest.FILE_NAME, 60 * recipe.cache.patience
    if not accelerator.is_main_process:
        wait_for([path], Path.is_file, patience, notice)
    if path.is_file():
        refuse_begun(work, content, finished=False)
    refuse_writing(work.folder)
    if accelerator.is_main_process:
        prepare_codecs(work, content, recipe, split, teacher, accelerator.device)
    begun = manifest.read_manifest(work.folder)
    content = {name: begun[name] for name in (*content, "feature_report", "row_dtype")}
    work = replace(work, features=on_device(feature_codecs(work.folder, content["codec"]), accelerator.device))
    numbers = range(len(work.examples.paths))
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    total = sum(len(work.examples.shard(number)) for number in mine)
    with progress(f"cache {split}", total, "examples", accelerator.is_main_process) as advance:
        slowest = extract(work, teacher, accelerator.device, mine, advance)
    others = [shard_path(work.folder, STEM, number) for number in numbers if number not in mine]
    wait_for(others, is_committed, max(patience, LAST_SHARD * slowest), notice)
    return finish(work, content) if accelerator.is_main_process else content


def wait_for(paths: Sequence[Path], there: Callable[[Path], bool], patience: float, notice: Notice) -> None:
    """Wait until every file is `there`, which other processes write.

    Raises Preempted once a signal is noticed, and ContactError when none has come for `patience` seconds.
    """
    pause, last, missing = 0.05, time.monotonic(), list(paths)
    while left := [path for path in missing if not there(path)]:
        if len(left) < len(missing):
            last, missing = time.monotonic(), left
        waited = time.monotonic() - last
        if waited > patience:
            raise ContactError(
                f"{left[0]} is not there, and nothing new has come for {waited:,.0f} s; it must be one folder to all"
            )
        if notice.name is not None:
            raise Preempted
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_LOOK)


@contextmanager
def interruptible(teacher: Teacher, notice: Notice) -> Iterator[None]:
    """Within the block the teacher raises Preempted instead of taking another batch once a signal is noticed."""

    def stop(module: torch.nn.Module, arguments: tuple) -> None:
        if notice.name is not None:
            raise Preempted

    hook = teacher.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def at_work(recipe: Recipe, split: str) -> Path:
    """The folder that is being written; the last where another process has just finished it."""
    found = caches.pieces(recipe, split)
    left = [piece.number for piece in found if not caches.is_finished(recipe, split, piece)]
    return places.signals_folder(recipe, split, (left or [found[-1].number])[0])


def stopped(recipe: Recipe, split: str, signal: str) -> str:
    """What is said when a signal has stopped the work at a split."""
    folder, count = at_work(recipe, split), len(assemble.examples(recipe, split).paths)
    done = sum(is_committed(shard_path(folder, STEM, number)) for number in range(count))
    return f"cache {split}: stopped by {signal} after {done} of {count} shards; the same command goes on"


def too_large(recipe: Recipe, split: str, error: Exception) -> str:
    """What is said when a teacher needs more memory than there is."""
    return (
        f"cache {split}: out of memory ({cause(error)}); run the same command where there is more, or lower "
        f"cache.batch_size (now {recipe.cache.batch_size}) or views.size or take a smaller teacher, and delete "
        f"{at_work(recipe, split)}, which was begun with the old ones"
    )


def cache_teacher(recipe: Recipe) -> None:
    """Run each of the recipe's teachers over every split that it needs and report what it said."""
    accelerator = Accelerator()
    guard.check_world(accelerator.num_processes)
    repeatable()
    for split in places.cached_splits(recipe):
        assemble.examples(recipe, split)  # one that is not there is told before the first takes its time
    every = places.cached_teachers(recipe)
    for name in sorted(recipe.teachers.keys() - {one.teacher.name for one in every}):
        accelerator.print(f"warning: no stage listens to the teacher '{name}', which is not cached")
    for one in every:
        if every[1:]:
            accelerator.print(f"cache {one.teacher.name}", flush=True)
        cache_one(one, accelerator)
    accelerator.end_training()


def cache_one(recipe: Recipe, accelerator: Accelerator) -> None:
    """Run the recipe's only teacher over every split."""
    teacher = assemble.teacher(recipe, recipe.cache.features).to(accelerator.device)
    read = {feature for name in recipe.stages for feature in assemble.stage_features(recipe, name)}
    for feature in sorted(recipe.cache.features.keys() - read):
        accelerator.print(f"warning: no stage reads the feature '{feature}', which is cached all the same")
    with noticed() as notice, interruptible(teacher, notice):
        # First those that students are judged by, so that a stage may learn from what is finished of the others.
        for split in sorted(places.cached_splits(recipe), key=places.is_trained_on):
            try:
                cache_split(recipe, split, teacher, accelerator, notice)
            except Preempted:
                raise Preempted(stopped(recipe, split, notice.name)) from None
            except Exception as error:
                if is_out_of_memory(error):
                    raise ModelError(too_large(recipe, split, error)) from error
                raise


def feature_sentence(name: str, one: dict[str, Any]) -> str:
    """What is kept of a feature, in words."""
    return (
        f"  {name}: {one['bytes']:,} bytes a row, 1/{one['fp16_bytes'] / one['bytes']:.1f} of fp16; relative error "
        f"{one['relative_error']:.3f}, cosine {one['cosine']:.4f}, gradient cosine {one['gradient_cosine']:.4f}"
    )


def summary(split: str, made: dict[str, Any], task: Task) -> str:
    """The teacher's report and the cost of its signals, with warnings."""
    said, codec, (first, count) = made["teacher_report"], made["codec"], span(made)
    where = f"{split}, views {first} to {first + count - 1}" if first else split
    if codec["logits"] is None:
        lines = [f"added on {where}: {made['row_bytes']:,} bytes a row, {made['bytes_per_view']:,.0f} a view on disk"]
    else:
        stored = codec_of(task.name, codec["logits"], task.classes, codec["grid"] and tuple(codec["grid"]))
        words, *more = ["no rows"] if said is None else task.teacher_sentences(said)
        lines = [f"teacher on {where}: {words}", *more]
        lines.append(
            f"  {made['row_bytes']:,} bytes a row, {made['bytes_per_view']:,.0f} a view on disk; "
            f"{stored.words(made['codec_error'][LOGITS])}"
        )
    lines += [feature_sentence(name, one) for name, one in made["feature_report"].items()]
    lines += [
        f"warning: '{name}' as it is stored is off by {one['relative_error']:.0%} of the feature; keep more of it, or "
        f"store it as fp32 if its values are tiny"
        for name, one in made["feature_report"].items()
        if one["relative_error"] > POOR
    ]
    lines += [
        f"warning: {count:,} values of '{name}' overflow {made['codec']['features'][name]['store']}; their rows are "
        f"quarantined; store it as int8, bf16 or fp32"
        for name, count in made["overflow"].items()
        if count
    ]
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
