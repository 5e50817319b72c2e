"""Run a teacher once over every (example, view) and write its signals.

Batch size, dtype and thread count are fixed and recorded, so any number of processes writes the same bytes. They meet
in the folder alone: each waits for the files that the others write, and none can hang in a collective call.
`accelerate launch -m kd_dist.cache_teacher RECIPE`.
"""

import argparse
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kd_dist import assemble, guard, manifest, places
from kd_dist.calibrate import calibrate, planned_codecs
from kd_dist.compress import Basis, save_bases
from kd_dist.config import load
from kd_dist.data import BASES, feature_codecs
from kd_dist.disk import published
from kd_dist.errors import ContactError, ModelError, Preempted, ShardError, cause, is_out_of_memory, one_sentence
from kd_dist.extract import STEM, Extraction, extract
from kd_dist.loader import on_device
from kd_dist.losses import LOSSES, suits
from kd_dist.pack import refuse_other, refuse_writing
from kd_dist.preempt import Notice, noticed
from kd_dist.progress import progress
from kd_dist.recipe import Recipe
from kd_dist.shards import Shard, is_committed, shard_path
from kd_dist.signals import add_sums, codec_of, dtype_to_json
from kd_dist.tasks import Task
from kd_dist.teacher import Teacher, repeatable

POOR = 0.5  # relative error of a feature that is worth a warning
LAST_SHARD = 10  # times the slowest shard of this process, that another may take for one
LONGEST_LOOK = 2.0  # seconds between two looks for the files of others


def identity(work: Extraction, recipe: Recipe, split: str, teacher: Teacher, device: torch.device) -> dict[str, Any]:
    """What the manifest must say for the shards in the folder to be this extraction's."""
    classes, wanted = work.codec.classes, assemble.codec_identity(recipe, split)
    exact = [name for name, row in LOSSES.items() if row.against != "features" and suits(row, work.task.name, classes)]
    features = {name: {**one, "shape": work.features[name].shape} for name, one in wanted["features"].items()}
    return manifest.plain(
        {
            "kind": "signals",
            "examples_fingerprint": work.examples.fingerprint,
            "teacher": assemble.teacher_identity(recipe, teacher.network),
            "views": assemble.views_identity(recipe, split),
            "task": work.task.name,
            "classes": classes,
            "codec": {"logits": work.codec.name, "grid": work.codec.grid, "features": features},
            "execution": {
                "batch_size": work.batch_size,
                "threads": work.threads,
                "device": device.type,
                "dtype": "float32",
                "tf32": False,
            },
            "exact_losses": sorted(exact),
        }
    )


def finish(work: Extraction, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest that completes the folder, with the codec's measured error and the teacher's report."""
    paths = [shard_path(work.folder, STEM, number) for number in range(len(work.examples.paths))]
    shards = [Shard(path) for path in paths]
    error = work.codec.report(functools.reduce(add_sums, [shard.note("error") for shard in shards], None))
    sums = functools.reduce(add_sums, [shard.note("teacher") for shard in shards], None)
    final = {
        **content,
        "complete": True,
        "examples": sum(len(shard) for shard in shards),
        "row_bytes": work.dtype.itemsize,
        "bytes_per_view": sum(path.stat().st_size for path in paths) / max(1, len(work.examples) * work.rows),
        "codec_error": {"logits": error},
        "overflow": functools.reduce(add_sums, [shard.note("overflow") for shard in shards], None) or {},
        "teacher_report": sums and work.task.teacher_report(sums),
        "shards": [manifest.shard_entry(shard) for shard in shards],
        "quarantined": [row for shard in shards for row in shard.note("quarantined")],
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


def extraction(recipe: Recipe, split: str, teacher: Teacher) -> Extraction:
    """What a split's cache is made of; the features that are reduced have no basis yet."""
    grid, shapes = teacher.shapes(recipe.views.shape)
    wanted, task = assemble.codec_identity(recipe, split)["features"], assemble.task(recipe)
    return Extraction(
        examples=assemble.examples(recipe, split),
        folder=places.signals_folder(recipe, split),
        task=task,
        teacher=recipe.teacher.name,
        policy=assemble.view_policy(recipe),
        views=places.stored_views(recipe, split),
        codec=codec_of(task.name, recipe.cache.logits, task.classes, grid[1:] or None),
        features=planned_codecs(recipe.cache.features, shapes) if wanted else {},
        batch_size=recipe.cache.batch_size,
        threads=recipe.cache.threads,
    )


def prepare_codecs(
    work: Extraction, content: dict[str, Any], recipe: Recipe, teacher: Teacher, device: torch.device
) -> None:
    """Fit the bases, measure the codecs and begin the folder with its manifest so far. For one process.

    A run that goes on keeps the bases of the one before: half the rows may be written with them. Generated examples are
    reduced with the bases of the packed ones, as they are trained on together.
    """
    if (work.folder / manifest.FILE_NAME).is_file():
        return
    torch.set_num_threads(work.threads)  # as for the rows: the last bits of the bases depend on it
    bases, report = {}, {}
    if work.features and work.folder == places.signals_folder(recipe, manifest.GENERATED):
        given = bases_of(places.signals_folder(recipe, places.TRAINING_SPLIT), work.features)
        bases, report = calibrate(work, recipe.cache.features, teacher, device, given)
    elif work.features:
        bases, report = calibrate(work, recipe.cache.features, teacher, device)
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
    }
    manifest.write_manifest(work.folder, {**begun, "complete": False})


def bases_of(folder: Path, features: Iterable[str]) -> dict[str, Basis]:
    """What these features, or those of them that are reduced, are reduced with in another folder."""
    codecs = feature_codecs(folder, manifest.read_manifest(folder)["codec"])
    return {name: codecs[name].basis for name in features if codecs[name].basis is not None}


def cache_split(
    recipe: Recipe, split: str, teacher: Teacher, accelerator: Accelerator, notice: Notice | None = None
) -> dict[str, Any]:
    """Cache one split with all processes; returns its manifest. What is committed already is kept.

    Raises Preempted at the teacher's next batch once a signal is noticed, and ContactError when the other processes
    write nothing for long.
    """
    work = extraction(recipe, split, teacher)
    content = identity(work, recipe, split, teacher, accelerator.device)
    path, patience, notice = work.folder / manifest.FILE_NAME, 60 * recipe.cache.patience, notice or Notice()
    if not accelerator.is_main_process:
        wait_for([path], Path.is_file, patience, notice)
    done = manifest.finished(work.folder)
    if path.is_file():
        there = manifest.read_manifest(work.folder)
        codec = there["codec"] = {name: value for name, value in there["codec"].items() if name != "bases_sha256"}
        if done is not None:  # more features than the recipe names do no harm
            codec["features"] = {name: one for name, one in codec["features"].items() if name in work.features}
        refuse_other(work.folder, there, content)
    if done is not None:
        feature_codecs(work.folder, done["codec"])  # refuses a folder that has lost its bases
        accelerator.print(f"cache {split}: done before, {done['examples']:,} examples x {work.rows} views")
        return done
    refuse_writing(work.folder)
    if accelerator.is_main_process:
        prepare_codecs(work, content, recipe, teacher, accelerator.device)
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


def stopped(recipe: Recipe, split: str, signal: str) -> str:
    """What is said when a signal has stopped the work at a split."""
    folder, count = places.signals_folder(recipe, split), len(assemble.examples(recipe, split).paths)
    done = sum(is_committed(shard_path(folder, STEM, number)) for number in range(count))
    return f"cache {split}: stopped by {signal} after {done} of {count} shards; the same command goes on"


def too_large(recipe: Recipe, split: str, error: Exception) -> str:
    """What is said when a teacher needs more memory than there is."""
    return (
        f"cache {split}: out of memory ({cause(error)}); run the same command where there is more, or lower "
        f"cache.batch_size (now {recipe.cache.batch_size}) or views.size or take a smaller teacher, and delete "
        f"{places.signals_folder(recipe, split)}, which was begun with the old ones"
    )


def cache_teacher(recipe: Recipe) -> None:
    """Run the recipe's teacher over every split that it needs and report what it said."""
    accelerator = Accelerator()
    guard.check_world(accelerator.num_processes)
    repeatable()
    for split in places.cached_splits(recipe):
        assemble.examples(recipe, split)  # one that is not there is told before the first takes its time
    teacher = assemble.teacher(recipe, recipe.cache.features).to(accelerator.device)
    read = {feature for name in recipe.stages for feature in assemble.stage_features(recipe, name)}
    for feature in sorted(recipe.cache.features.keys() - read):
        accelerator.print(f"warning: no stage reads the feature '{feature}', which is cached all the same")
    with noticed() as notice, interruptible(teacher, notice):
        for split in places.cached_splits(recipe):
            try:
                made = cache_split(recipe, split, teacher, accelerator, notice)
            except Preempted:
                raise Preempted(stopped(recipe, split, notice.name)) from None
            except Exception as error:
                if is_out_of_memory(error):
                    raise ModelError(too_large(recipe, split, error)) from error
                raise
            if accelerator.is_main_process:
                print(summary(split, made, assemble.task(recipe)), flush=True)
    accelerator.end_training()


def feature_sentence(name: str, one: dict[str, Any]) -> str:
    """What is kept of a feature, in words."""
    return (
        f"  {name}: {one['bytes']:,} bytes a row, 1/{one['fp16_bytes'] / one['bytes']:.1f} of fp16; relative error "
        f"{one['relative_error']:.3f}, cosine {one['cosine']:.4f}, gradient cosine {one['gradient_cosine']:.4f}"
    )


def summary(split: str, made: dict[str, Any], task: Task) -> str:
    """The teacher's report and the cost of its signals, with warnings."""
    said, error = made["teacher_report"], made["codec_error"]["logits"]
    grid = made["codec"]["grid"]
    stored = codec_of(task.name, made["codec"]["logits"], task.classes, grid and tuple(grid))
    first, *more = ["no rows"] if said is None else task.teacher_sentences(said)
    lines = [f"teacher on {split}: {first}", *more]
    lines.append(
        f"  {made['row_bytes']:,} bytes a row, {made['bytes_per_view']:,.0f} a view on disk; {stored.words(error)}"
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
