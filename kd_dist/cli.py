"""`kd-dist`: every command explains itself with an example (`kd-dist COMMAND --help`)."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kd_dist.errors import one_sentence
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
GO_ON = ("run", "pack", "train", "train-gan", "cache-teacher")  # what a signal stops nothing of for good
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
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    budget: Annotated[str | None, typer.Option(help="Disk space for all signals: propose codecs that fit.")] = None,
    as_json: Json = False,
) -> None:
    """Say what caching the teacher will take on the disk; with a budget, how to store its features within it.

    Example: kd-dist plan configs/camvid.yaml --budget 200MB
    """
    from kd_dist import budget as before
    from kd_dist.config import load
    from kd_dist.recipe import parse_bytes

    room = None if budget is None else parse_bytes(budget)
    found = before.plan(load(recipe, overrides or []), room)
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
    """Run the teacher once over every view and write its signals.

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
    """Re-run the live teacher on a sample and compare it with the cache; exits with 1 when they differ.

    Example: kd-dist verify configs/digits.yaml --examples 64
    """
    from kd_dist import places
    from kd_dist import verify as proof
    from kd_dist.config import load

    loaded = load(recipe, overrides or [])
    found = [proof.verify(loaded, split, examples) for split in places.cached_splits(loaded)]
    typer.echo(json.dumps(found) if as_json else "\n".join(map(proof.sentence, found)))
    if not all(one["ok"] for one in found):
        raise typer.Exit(1)


@app.command()
def inspect(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what a cache holds: its teacher, its bytes, what each codec keeps, what is quarantined.

    Example: kd-dist inspect configs/digits.yaml --json
    """
    from kd_dist import assemble, manifest, places
    from kd_dist.cache_teacher import summary
    from kd_dist.config import load
    from kd_dist.data import feature_codecs

    loaded = load(recipe, overrides or [])
    folders = {split: places.signals_folder(loaded, split) for split in places.cached_splits(loaded)}
    found = {split: manifest.read_manifest(folder) for split, folder in folders.items()}
    if as_json:
        typer.echo(json.dumps(found))
        return
    for split, made in found.items():
        feature_codecs(folders[split], made["codec"])  # refuses a folder that has lost its bases
        teacher, digest = made["teacher"], made["teacher"]["weights_sha256"][:12]
        typer.echo(f"{folders[split]}: {teacher['model']}, weights {teacher['weights']}, sha256 {digest}")
        said = summary(split, made, assemble.task(loaded)) if made["complete"] else None
        typer.echo(said or "not finished; run `kd-dist cache-teacher` again")


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
def compare(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Teacher and students side by side, over every seed that has been trained: metrics, cost, what is kept of the
    teacher. Written to compare.md and compare.json, of two classes roc-SPLIT.png too, in the recipe's folder of runs.

    Example: kd-dist compare configs/digits.yaml
    """
    from kd_dist import compare as comparison
    from kd_dist import journey

    loaded, found = journey.compare_recipe(recipe, overrides or [])
    if as_json:
        typer.echo(json.dumps(found))
    else:
        journey.on_terminal(comparison.table(found["summary"], journey.heading(loaded)))


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
    sys.path.insert(0, os.getcwd())  # a recipe may name a user's own module
    with one_sentence():
        app()


if __name__ == "__main__":
    main()
