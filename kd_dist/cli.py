"""`kd-dist`: every command explains itself with an example (`kd-dist COMMAND --help`)."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kd_dist.errors import KdError, one_sentence
from kd_dist.preempt import stoppable

# Libraries load inside the commands: `--help` answers at once.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value", metavar="[KEY.PATH=VALUE]...")]
Processes = Annotated[
    int | None,
    typer.Option("--num-processes", "--gpus", min=1, help="Processes to start with `accelerate launch`, else 1."),
]
LaunchConfig = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A file for `accelerate launch`, as in launch/."),
]
GO_ON = ("run", "pack", "index", "train", "train-gan", "cache-teacher")  # what a signal stops nothing of for good
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def kd_dist(context: typer.Context) -> None:
    """Offline knowledge distillation: the teacher runs once, students train from shards."""
    name = context.invoked_subcommand
    context.with_resource(stoppable("kd-dist" if name in GO_ON else f"kd-dist {name}", goes_on=name in GO_ON))


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train every student stage with so many seeds.")] = 1,
    num_processes: Processes = None,
    launch_config: LaunchConfig = None,
) -> None:
    """Everything in order: pack, teacher, cache, students, evaluate, report. What is done is skipped.

    Example: kd-dist run configs/digits.yaml --seeds 3
    """
    from kd_dist import journey

    journey.run(recipe, overrides or [], seeds, journey.launcher_options(num_processes, launch_config))


@app.command()
def pack(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write the raw data set as example shards.

    Example: kd-dist pack configs/digits.yaml data.shard_size=512
    """
    from kd_dist import journey
    from kd_dist.config import load

    manifests = journey.pack_recipe(load(recipe, overrides or []))
    if as_json:
        typer.echo(json.dumps(manifests))


@app.command()
def index(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Use an existing webdataset as it is: make indexes for its tars, say what cannot be used of them and why. Tars
    that are indexed already are compared, byte for byte.

    Example: kd-dist index pets.yaml data.root=/data/pets-wds
    """
    from kd_dist import journey
    from kd_dist.config import load

    manifests = journey.index_recipe(load(recipe, overrides or []))
    if as_json:
        typer.echo(json.dumps(manifests))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="Disk space for all signals: propose codecs that fit.")] = None,
    num_processes: Processes = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds with which every student stage is to be trained.")] = 1,
    examples: Annotated[int | None, typer.Option(min=1, help="Think of a training split of so many examples.")] = None,
    bytes_only: Annotated[bool, typer.Option("--bytes-only", help="Measure no time.")] = False,
    as_json: Json = False,
) -> None:
    """Before anything is spent: the bytes and the hours of caching, what a training run reads, and the epoch after
    which caching has paid for itself; with a budget, how to store signals within it.

    Examples need not be packed nor the teacher trained. Some examples are cached and trained on for seconds.

    Example: kd-dist plan configs/camvid.yaml --budget 200MB
    """
    from kd_dist import budget as before
    from kd_dist.config import load
    from kd_dist.forecast import Timing
    from kd_dist.recipe import parse_bytes

    room = None if budget is None else parse_bytes(budget)
    timing = None if bytes_only else Timing(num_processes or 1, seeds)
    found = before.plan(load(recipe, overrides or []), room, timing, examples=examples)
    typer.echo(json.dumps(found) if as_json else "\n".join(before.sentences(found)))


@app.command()
def train(
    recipe: RecipePath,
    stage: Annotated[str, typer.Option(help="A stage of the recipe.")],
    overrides: Overrides = None,
    num_processes: Processes = None,
    launch_config: LaunchConfig = None,
) -> None:
    """Train one stage, as `accelerate launch kd_dist/train.py RECIPE --stage STAGE` does, unless it is done.

    Example: kd-dist train configs/digits.yaml --stage distill train.lr=1e-3
    """
    from kd_dist import journey
    from kd_dist.config import load

    options = journey.launcher_options(num_processes, launch_config)
    journey.train(load(recipe, overrides or [], stage), recipe, stage, overrides or [], options)


@app.command()
def train_gan(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train a generator of spectrograms on the packed recordings, and pack what it makes for the teacher to label.

    Example: kd-dist train-gan configs/emotion_vgmidi.yaml gan.epochs=50
    """
    from kd_dist import train_gan as generator
    from kd_dist.config import load

    generator.train_gan(load(recipe, overrides or []))


@app.command()
def cache_teacher(
    recipe: RecipePath,
    overrides: Overrides = None,
    num_processes: Processes = None,
    launch_config: LaunchConfig = None,
) -> None:
    """Run each teacher once over every view and write its signals.

    Example: kd-dist cache-teacher configs/digits.yaml --num-processes 2
    """
    from kd_dist import journey
    from kd_dist.config import load

    options = journey.launcher_options(num_processes, launch_config)
    journey.cache(load(recipe, overrides or []), recipe, overrides or [], options)


@app.command()
def verify(
    recipe: RecipePath,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples to compare in each split.")] = 64,
    as_json: Json = False,
) -> None:
    """Re-run each live teacher on a sample and compare it with its cache; exits with 1 when they differ.

    Example: kd-dist verify configs/digits.yaml --examples 64
    """
    from kd_dist import places
    from kd_dist import verify as proof
    from kd_dist.config import load

    loaded = load(recipe, overrides or [])
    every = places.cached_teachers(loaded)
    found = [proof.verify(one, split, examples) for one in every for split in places.cached_splits(loaded)]
    lines = [(f"{one['teacher']}, " if every[1:] else "") + proof.sentence(one) for one in found]
    typer.echo(json.dumps(found) if as_json else "\n".join(lines))
    if not all(one["ok"] for one in found):
        raise typer.Exit(1)


@app.command()
def inspect(
    recipe: RecipePath,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="One split; else all, and a sheet of `train`.")] = None,
    sheet: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw views of some examples: a PNG.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples on the sheet.")] = 8,
    views: Annotated[int, typer.Option(min=1, help="Views of each, at most.")] = 8,
    key: Annotated[list[str] | None, typer.Option(help="An example for the sheet; may be given several times.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a cache holds: its teacher, its views, its bytes, what each codec keeps, what is quarantined; and draw
    stored views with their labels and what the teacher said of them.

    Example: kd-dist inspect configs/digits.yaml --split train --sheet sheet.png
    """
    from kd_dist import contents
    from kd_dist.config import load
    from kd_dist.places import TRAINING_SPLIT

    loaded = load(recipe, overrides or [])
    folders = contents.folders(loaded, split)
    found = {name: one.made for name, one in folders.items()}
    if sheet is not None:
        at = split or TRAINING_SPLIT
        shown = contents.seen(loaded, at, examples, views, key or [])
        contents.sheet(sheet, shown, f"{loaded.name}, {at}, {loaded.teacher.name}")
        found[at]["sheet"] = contents.records(shown)
    if as_json:
        typer.echo(json.dumps(found))
        return
    for one in folders.values():
        typer.echo("\n".join(contents.in_words(loaded, one)))
    if sheet is not None:
        typer.echo(f"{sheet}: {len(shown)} examples of {at}")


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, whose needs are looked at too.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look at versions, devices, the launcher, folders and extras, and say what to do; exits with 1 when something is
    missing that is needed.

    Example: kd-dist doctor configs/digits.yaml
    """
    from kd_dist import doctor as examination

    found = examination.examine(recipe, overrides or [])
    lines = [json.dumps([one._asdict() for one in found])] if as_json else examination.sentences(found)
    typer.echo("\n".join(lines))
    if not examination.healthy(found):
        raise typer.Exit(1)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Measure the best weights of every trained stage on the evaluation split: all metrics, and what a model takes.

    Example: kd-dist evaluate configs/digits.yaml evaluate.split=val --json
    """
    from kd_dist import journey, report
    from kd_dist.config import load

    loaded = load(recipe, overrides or [])
    rows = journey.evaluate_recipe(loaded)
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        found = report.summarise(rows)
        journey.show(found, loaded)
        journey.on_terminal(report.metrics_table(found))


@app.command()
def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            help="Recipes, YAML files; a word with = in it is an override of all.",
            metavar="RECIPE... [KEY.PATH=VALUE]...",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Teacher and students side by side, over every seed that has been trained, of one recipe or of several that are
    judged on the same examples: metrics, cost, what is kept of the teacher. Written to compare.html, which needs
    nothing beside it, to compare.md and compare.json, of two classes roc-SPLIT.png too, in the first recipe's folder of
    runs.

    Example: kd-dist compare configs/digits.yaml
    """
    from kd_dist import compare as comparison
    from kd_dist import journey

    overrides = [word for word in words if "=" in word]
    recipes = [Path(word) for word in words if "=" not in word]
    if not recipes:
        raise KdError("compare: no recipe is named, only overrides; name a YAML file")
    found = journey.compare_recipes(recipes, overrides)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        journey.on_terminal(comparison.table(found["summary"], f"{found['title']}, {found['split']} split"))


@app.command()
def export(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write a trained student as a package for an app: model files, each proven to be the student on every held-out
    example, what they take and give, a model card, example code. A file that is not the student is left out, and the
    exit status is 1.

    Example: kd-dist export configs/digits.yaml export.formats=[onnx,executorch_int8]
    """
    from kd_dist import export as packaging
    from kd_dist import journey, proof
    from kd_dist.config import load
    from kd_dist.places import package_folder

    loaded = load(recipe, overrides or [])
    with contextlib.redirect_stdout(sys.stderr):  # a user's model prints what it likes
        info = packaging.export(loaded)
    if as_json:
        typer.echo(json.dumps(info))
    else:
        journey.on_terminal(proof.table(info))
        typer.echo(f"{package_folder(loaded, info['stage'])}/MODEL_CARD.md and what lies beside it")
    sound = (info["front_end"] or {}).get("not_written", {})
    refused = info["not_written"] | {f"front_end {name}": why for name, why in sound.items()}
    if refused:
        raise packaging.unwritten(refused)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Hold an exported package to the recipe's `export.limits`, line by line; exits with 1 when it fails one.

    Example: kd-dist check configs/digits.yaml export.limits.size_mb=1
    """
    from kd_dist import check as judgement
    from kd_dist.config import load

    with contextlib.redirect_stdout(sys.stderr):
        found = judgement.check(load(recipe, overrides or []))
    lines = [json.dumps([one._asdict() for one in found])] if as_json else judgement.sentences(found)
    typer.echo("\n".join(lines))
    if not all(one.ok for one in found):
        raise typer.Exit(1)


@app.command()
def import_config(
    config: Annotated[Path, typer.Argument(help="The configuration, a JSON file.", metavar="CONFIG")],
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="The recipe to write, else CONFIG.yaml.")] = None,
) -> None:
    """Turn an older JSON configuration for distilling a deepfake detector into a recipe.

    Example: kd-dist import-config config_SBI.json --out sbi.yaml
    """
    from kd_dist import import_config as older

    typer.echo(f"{older.import_config(config, out)}: written; its first lines say what {config} does not")


def main() -> None:
    """The `kd-dist` entry point."""
    with one_sentence():
        try:
            sys.path.insert(0, os.getcwd())  # a recipe may name a user's own module
        except FileNotFoundError as error:
            raise KdError("the folder that this was started in is gone; go to another") from error
        app()


if __name__ == "__main__":
    main()
