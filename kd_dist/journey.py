"""The whole journey of a recipe, step by step, each skipped when it is done: what `kd-dist run` does."""

import contextlib
import functools
import json
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from kd_dist import assemble, caches, compare, cost, manifest, page, places, report, trial
from kd_dist.checkpoint import read_record, write_atomic
from kd_dist.config import load, to_dict
from kd_dist.disk import alone
from kd_dist.errors import INTERRUPTED, DataError, MismatchError, Preempted, RecipeError
from kd_dist.evaluation import first_examples, judge, numbers, picture
from kd_dist.launch import PATIENCE, killed, tied
from kd_dist.link import SOURCE, link
from kd_dist.loader import split_batches
from kd_dist.models.ensemble import together
from kd_dist.pack import pack
from kd_dist.preempt import SIGNALS, noticed
from kd_dist.recipe import Recipe
from kd_dist.remote import Remote
from kd_dist.rules import GIVEN
from kd_dist.tasks import METRICS, undefined
from kd_dist.tasks.binary import ROC
from kd_dist.train_gan import train_gan

# What a model is and takes, in the record of its evaluation.
COST = ("name", "parameters", "macs", "latency_ms", "memory_mb")
RECORD_VERSION = 4  # of that record; 1 knew neither memory nor curves, 3 no outcomes
ROC_DIGITS = 6  # of a rate in the record
OF_A_SEED = ("seed", "order", "start")  # parts of a stage's identity
DRAWN_AT_ONCE = 32  # examples of a picture in a forward pass


def run(path: Path, overrides: Sequence[str], seeds: int, options: Sequence[str]) -> None:
    """Pack, train the teacher, cache it, train every student stage with each seed, evaluate, report."""
    first = load(path, overrides)
    per_seed = [[*overrides, f"seed={first.seed + number}"] for number in range(seeds)]
    recipes = [load(path, one) for one in per_seed]
    trial.check_models(first)
    pack_recipe(first)
    cached = False
    for name, stage in first.stages.items():
        student = stage.model == "student"
        ready = places.weights_ready(first, first.teacher.weights)
        if student and not cached and (ready or assemble.reads_cache(stage)):
            if manifest.GENERATED in places.cached_splits(first):
                train_gan(first)
            cache(first, path, overrides, options)
            for one in filter(lambda one: assemble.reads_cache(first.stages[one]), first.stages):
                assemble.training_corridor(first, one, rank=0, world=1)  # refuses a loss that the cache does not serve
            cached = True
        for recipe, words in list(zip(recipes, per_seed, strict=True))[: seeds if student else 1]:
            train(recipe, path, name, words, options)
    rows = [row for recipe in recipes for row in evaluate_recipe(recipe)]
    write_report(recipes, unique(rows))


def train(recipe: Recipe, path: Path, name: str, overrides: Sequence[str], options: Sequence[str]) -> None:
    """Train one stage in processes of its own, started with the launcher's `options`, unless it is done."""
    folder = places.stage_folder(recipe, name)
    if assemble.stage_result(recipe, name) is not None:
        print(f"{name} ({folder.name}): done before", file=sys.stderr)
        return
    with alone(folder):
        came = launch([str(Path(__file__).with_name("train.py")), str(path), "--stage", name, *overrides], options)
    if came or assemble.stage_result(recipe, name) is None:
        raise stopped(f"{name} ({folder.name})", came)


def pack_recipe(recipe: Recipe, thorough: bool = False) -> dict[str, Any]:
    """Pack what the recipe needs, or index what it has, and say what came of it; see `link` for `thorough`."""
    folder = places.shards_folder(recipe)
    remote = isinstance(folder, Remote)  # what is there has been finished elsewhere
    there = [] if remote else [path.parent for path in folder.glob(f"*/{manifest.FILE_NAME}")]
    before = {path.name for path in there if manifest.finished(path) is not None}
    d = recipe.data
    known = {"root": d.root, "options": d.options, "fractions": d.splits, "required": places.splits(recipe)}
    task = assemble.task(recipe)
    if d.source == SOURCE:
        manifests = link(folder, **known, task=task, thorough=thorough)
    else:
        manifests = pack(folder, **known, source=d.source, task=task, shard_size=d.shard_size)
    for split, made in manifests.items():
        done = "done before, " if remote or split in before else ""
        print(f"pack {split}: {done}{made['examples']:,} examples in {len(made['shards'])} shards", file=sys.stderr)
        for row in made["quarantined"]:
            print(f"  quarantined '{row['name']}': {row['reason']}", file=sys.stderr)
    return manifests


def index_recipe(recipe: Recipe) -> dict[str, Any]:
    """Index the recipe's tars, or compare those that are indexed with their digests. Raises RecipeError when it has
    none of its own."""
    if recipe.data.source != SOURCE:
        raise RecipeError(
            f"data.source {recipe.data.source}: has no tars to be indexed; run `kd-dist pack`, which writes some"
        )
    return pack_recipe(recipe, thorough=True)


def cache(recipe: Recipe, path: Path, overrides: Sequence[str], options: Sequence[str]) -> None:
    """Cache every teacher's signals for every split unless they are there and are this recipe's."""
    splits, every = places.cached_splits(recipe), places.cached_teachers(recipe)
    names = ", ".join(one.teacher.name for one in every)
    # Weights that are no file are known by the network alone, which the launched command builds.
    from_file = all(places.weights_file(one, one.teacher.weights) is not None for one in every)
    finished = all(caches.is_cached(one, split) for one in every for split in splits)
    if from_file and finished:
        for split in splits:
            packed = assemble.examples(recipe, split)
            for one in every:
                caches.signals(one, split, packed)  # refuses another teacher's
        print(f"cache {names}: done before", file=sys.stderr)
        return
    folder = places.shards_folder(recipe)
    # Nobody writes under a URL, nor where all is finished: that may lie where no lock can be written.
    with contextlib.nullcontext() if finished or isinstance(folder, Remote) else alone(folder):
        came = launch(["-m", "kd_dist.cache_teacher", str(path), *overrides], options)
    if came or not all(caches.is_cached(one, split) for one in every for split in splits):
        raise stopped(f"cache {names}", came)


def stopped(what: str, came: str | None) -> Preempted:
    """What to raise when the processes have ended well but before their end; `came` is the signal, if it is known."""
    return Preempted(f"{what}: stopped by {came or 'a signal to its processes'}; the same command goes on")


def launcher_options(num_processes: int | None, config: Path | None) -> list[str]:
    """What the launcher is told: a configuration file of accelerate's, or one machine; and how many processes."""
    number = [] if num_processes is None else ["--num_processes", str(num_processes)]
    if config is not None:
        return ["--config_file", str(config), *number]
    several = ["--multi_gpu"] if (num_processes or 1) > 1 else []
    one_machine = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*several, *one_machine, *(number or ["--num_processes", "1"])]


def launch(arguments: list[str], options: Sequence[str]) -> str | None:
    """`accelerate launch` with `options`; its exit status becomes ours unless it is 0.

    SIGTERM and SIGUSR1 are handed on; returns the name of the last that came.
    """
    with noticed() as notice:
        started = subprocess.Popen(tied([sys.executable, "-m", "kd_dist.launch", *options, *arguments]))
        told = None
        try:
            while started.poll() is None:
                if notice.name != told:
                    told = notice.name
                    started.send_signal(signal.Signals[told])
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(0.2)
        except KeyboardInterrupt:  # from a terminal the processes had it too, and say so
            started.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(PATIENCE + 1)
            raise SystemExit(INTERRUPTED) from None
    status = started.returncode
    if status < 0 and -status not in SIGNALS:  # a launcher that has hardly begun dies of them
        print(killed("the launcher", -status), file=sys.stderr)
        raise SystemExit(1)
    if status > 0:
        raise SystemExit(status)  # it has said why
    return notice.name  # not `told`: the last may have come when there was nobody left to tell


def evaluate_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """One row for each trained stage of the recipe's seed, and those of `given_rows`; teachers first.

    What was measured before on the same weights is kept.
    """
    trained = [name for name in recipe.stages if (places.stage_folder(recipe, name) / places.RESULT).is_file()]
    if not trained:
        folder = places.stage_folder(recipe, next(iter(recipe.stages))).parent.parent
        raise DataError(f"{folder}: no stage has been trained yet; run `kd-dist run` or `kd-dist train` first")
    rows = []
    for name in trained:
        folder, which = places.stage_folder(recipe, name), recipe.stages[name].model
        where = {"role": places.role(recipe, name), "stage": name, "seed": places.stage_seed(recipe, name)}
        where["taught_by"] = taught_by(recipe, name)
        where["without_generated"] = places.without_generated(recipe, name)
        result = read_record(folder / places.RESULT, "steps", "history", "best_epoch")
        where["steps"], where["best_step"] = result["steps"], result["history"][result["best_epoch"]]["step"]
        build = functools.partial(assemble.network, recipe, which, places.STAGE_REFERENCE + name, recipe.seed)
        rows.append({**where, **measured(recipe, folder, which, caches.best_sha256(recipe, name), build)})
    return sorted([*rows, *given_rows(recipe)], key=lambda row: row["role"] != "teacher")


def given_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """A row for each teacher that no stage trains: the first one, if so, every further one, and the mean of each group
    that a stage listens to."""
    first, stages = recipe.teacher.name, recipe.stages.values()
    groups = [[name] for name in (first, *recipe.teachers)]
    if any(stage.model == "teacher" for stage in stages):
        groups.remove([first])
    if places.weights_ready(recipe, recipe.teacher.weights):
        groups += [recipe.teachers_of(stage) for stage in stages if len(stage.teachers) > 1]
    rows = []
    for names in dict.fromkeys(map(tuple, groups)):
        own = [recipe.with_teacher(name) for name in names]
        built = [assemble.teacher_network(one) for one in own]
        identities = [caches.teacher_identity(*pair) for pair in zip(own, built, strict=True)]
        weights = manifest.digest(manifest.plain(identities)) if identities[1:] else identities[0]["weights_sha256"]
        folder, label = Path(recipe.runs) / recipe.name / "given-teacher", GIVEN
        if names != (first,):
            folder, label = folder / "+".join(names), " + ".join(names)
        where = {"role": "teacher", "stage": label, "seed": own[0].teacher.seed, "further": label != GIVEN}
        rows.append({**where, **measured(own[0], folder, "teacher", weights, functools.partial(together, built))})
    return rows


def taught_by(recipe: Recipe, name: str) -> str | None:
    """The row of `given_rows` that a stage's student is held to; None: the first teacher."""
    names = recipe.teachers_of(recipe.stages[name])
    return None if names == [recipe.teacher.name] else " + ".join(names)


def measured(recipe: Recipe, folder: Path, which: str, weights: str, build: Callable[[], nn.Module]) -> dict[str, Any]:
    """The metrics and the cost of the `teacher` or `student` whose weights have the digest `weights`, from the record
    in `folder` or measured now and recorded there; of two classes the ROC curve too. And where all this is from: the
    recipe, the folder, the record, the digests of weights and examples."""
    split, metric, task = recipe.evaluate.split, recipe.evaluate.metric, assemble.task(recipe)
    record, section = folder / f"evaluation-{split}.json", getattr(recipe, which)
    corridor = assemble.evaluation_corridor(recipe, split, 0, 1, cached=False)
    identity = {"weights": weights, "examples": corridor.examples.fingerprint, "model": to_dict(section)}
    identity["views"], identity["version"] = caches.views_identity(recipe, split), RECORD_VERSION
    known = read_record(record, "identity") if record.is_file() else {"identity": None}
    fresh = known["identity"] != manifest.plain(identity)
    if not fresh:
        known = read_record(record, "metrics", *COST)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = build().eval().to(device)
        outcomes = compare.Outcomes(task)
        with split_batches(corridor, recipe.data.workers, device) as stream:
            found = judge(outcomes.counting(network), stream, task, device, recipe.data.error_limit)
        values = {name: value if math.isfinite(value) else None for name, value in numbers(found).items()}
        known = {"identity": identity, "metrics": values, "name": network.label, "outcomes": outcomes.record()}
        known |= cost.measure(network, recipe.views.shape)
        if ROC in found:
            known[ROC] = [[round(rate, ROC_DIGITS) for rate in point] for point in found[ROC].tolist()]
    values = known["metrics"]
    if values[metric] is None:
        raise DataError(f"{undefined(metric, corridor.examples.folder)} evaluate.split")
    if fresh:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(known, indent=1, sort_keys=True))
    every = {name: values[name] for name in METRICS if name in values}
    defined = {name: one for name, one in values.items() if one is not None}
    parts = task.table(defined, corridor.examples.manifest["class_names"])
    taken = {field: known[field] for field in (*COST, ROC) if field in known}
    origin = {"recipe": recipe.name, "folder": str(folder), "record": str(record), "weights": weights}
    origin["examples"] = corridor.examples.fingerprint
    return {"metric": metric, "value": values[metric], "metrics": every, "parts": parts, **taken, **origin}


def unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each (stage, seed) once: the teacher is the same for every student's seed."""
    return list({(row["stage"], row["seed"]): row for row in rows}.values())


def write_report(recipes: Sequence[Recipe], models: list[dict[str, Any]]) -> None:
    """Write and print the report of a recipe over its seeds."""
    first, histories = recipes[0], {}
    for recipe in recipes:
        for name in recipe.stages:
            folder = places.stage_folder(recipe, name)
            histories[f"{name} {folder.name}"] = read_record(folder / places.RESULT, "history")["history"]
    folder = Path(first.runs) / first.name
    rows = report.write(folder, first.name, first.evaluate.split, models, histories, draw(first))
    show(rows, first)
    for one in report.gains(models):
        print(report.gain_sentence(one, first.evaluate.metric))
    print(f"{folder}/report.md and what lies beside it")


def draw(recipe: Recipe) -> np.ndarray | None:
    """Some examples of the evaluation split, and what the model of each stage that has ended makes of them; None where
    the task has no such picture."""
    task = assemble.task(recipe)
    if not task.shown:
        return None
    batch = first_examples(assemble.evaluation_corridor(recipe, recipe.evaluate.split, 0, 1, cached=False))
    names = (recipe.teacher.name, *recipe.teachers)
    networks = {name: assemble.teacher(recipe.with_teacher(name)).network for name in names}
    for name, stage in recipe.stages.items():
        reference = places.STAGE_REFERENCE + name
        if stage.model == "student" and places.weights_ready(recipe, reference):
            networks[name] = assemble.network(recipe, "student", reference, recipe.seed).eval()
    with torch.inference_mode():
        said = {
            name: torch.cat([network(images) for images in batch.images.split(DRAWN_AT_ONCE)])
            for name, network in networks.items()
        }
    return picture(task, batch, said)


def compare_recipes(paths: Sequence[Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Measure all that has been trained of some recipes, with every seed that is found, and write the comparison and
    its page into the first one's folder of runs; returns what its JSON holds.

    Stages of a further recipe are called `<recipe>/<stage>`. Raises MismatchError for recipes that cannot be compared.
    """
    firsts = [load(path, overrides) for path in paths]
    if firsts[1:]:
        compare.refuse_incomparable(paths, [judged_by(one) for one in firsts])
    models, pictures = [], {}
    for number, (path, first) in enumerate(zip(paths, firsts, strict=True)):
        recipes = [load(path, [*overrides, f"seed={seed}"]) for seed in trained_seeds(first)] or [first]
        refuse_unlike(recipes)
        rows = unique([row for recipe in recipes for row in evaluate_recipe(recipe)])
        models += compare.named_after(first.name, rows) if number else rows
        if assemble.task(first).maps and places.weights_ready(first, first.teacher.weights):
            pictures[f"{first.name}, seed {recipes[0].seed}"] = draw(recipes[0])
    first, title = firsts[0], " and ".join(recipe.name for recipe in firsts)
    names = first.task.outputs or assemble.examples(first, first.evaluate.split).manifest["class_names"]
    command = shlex.join(["kd-dist", "compare", *map(str, paths), *overrides])
    about = compare.Subject(title, first.evaluate.split, first.task.name, tuple(names), command)
    folder = Path(first.runs) / first.name
    content = compare.write(folder, about, models)
    page.write(folder / "compare.html", content, pictures)
    print(f"{folder}/compare.html and what lies beside it", file=sys.stderr)
    return content


def judged_by(recipe: Recipe) -> dict[str, Any]:
    """What two recipes must have in common to be compared, as plain values, and their names."""
    packed = assemble.examples(recipe, recipe.evaluate.split)
    said = {"task": to_dict(recipe.task), "evaluate": to_dict(recipe.evaluate), "examples": packed.fingerprint}
    return manifest.plain({**said, "name": recipe.name, "class_names": packed.manifest["class_names"]})


def refuse_unlike(recipes: Sequence[Recipe]) -> None:
    """Raise a MismatchError when a stage was trained otherwise with one seed than with another: they have no mean."""
    for name in recipes[0].stages if recipes else ():
        known: list[tuple[Path, dict[str, Any]]] = []
        for recipe in recipes:
            folder = places.stage_folder(recipe, name)
            if (folder / places.RESULT).is_file():
                said = read_record(folder / places.RESULT, "identity")["identity"]
                known.append((folder, {what: one for what, one in said.items() if what not in OF_A_SEED}))
        for folder, said in known[1:]:
            difference = manifest.first_difference(said, known[0][1])
            if difference is not None:
                place, its, other = difference
                raise MismatchError(
                    f"{folder}: was trained with {place} = {its!r}, {known[0][0]} with {other!r}; train them alike, or "
                    f"delete one of the two"
                )


def trained_seeds(recipe: Recipe) -> list[int]:
    """The seeds with which a student's stage of the recipe has been trained to its end, in order."""
    stages = [name for name, stage in recipe.stages.items() if stage.model == "student"]
    folders = [places.stage_folder(recipe, name).parent for name in stages]
    found = {path.parent.name.removeprefix("seed-") for folder in folders for path in folder.glob(f"*/{places.RESULT}")}
    return sorted(int(seed) for seed in found if seed.isdecimal())


def show(rows: Sequence[dict[str, Any]], recipe: Recipe) -> None:
    """Print summary rows as a table."""
    on_terminal(report.table(rows, heading(recipe)))


def heading(recipe: Recipe) -> str:
    return f"{recipe.name}, {recipe.evaluate.split} split"


def on_terminal(*tables: Table) -> None:
    """Print tables, wide enough where nothing says how wide the output is."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for one in tables:
        console.print(one)
