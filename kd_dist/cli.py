"""`kd-dist`: every command explains itself with an example (`kd-dist COMMAND --help`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kd_dist.errors import one_sentence
from kd_dist.recipe import Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value", metavar="[KEY.PATH=VALUE]...")]
Processes = Annotated[int, typer.Option(min=1, help="Processes to start with `accelerate launch`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def kd_dist() -> None:
    """Offline knowledge distillation: the teacher runs once, students train from shards."""


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train every student stage with so many seeds.")] = 1,
    num_processes: Processes = 1,
) -> None:
    """Everything in order: pack, teacher, cache, students, evaluate, report. What is done is skipped.

    Example: kd-dist run configs/digits.yaml --seeds 3
    """
    from kd_dist import assemble
    from kd_dist.config import load

    loaded = load(recipe, overrides or [])
    pack_recipe(loaded)
    every = [
        (load(recipe, [*(overrides or []), f"seed={loaded.seed + n}"]), f"seed={loaded.seed + n}") for n in range(seeds)
    ]
    cached = False
    for name, stage in loaded.stages.items():
        if stage.model == "student" and not cached:
            cache(loaded, recipe, overrides or [], num_processes)
            cached = True
        for one, seed in every if stage.model == "student" else every[:1]:
            if assemble.stage_result(one, name) is not None:
                typer.echo(f"{name} ({assemble.stage_folder(one, name).name}): done before")
                continue
            script = str(Path(__file__).with_name("train.py"))
            launch([script, str(recipe), "--stage", name, *(overrides or []), seed], num_processes)
    measured = [row for one, _ in every for row in evaluate_recipe(one)]
    write_report(loaded, [one for one, _ in every], unique(measured))


@app.command()
def pack(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write the raw data set as example shards.

    Example: kd-dist pack configs/digits.yaml data.shard_size=512
    """
    from kd_dist.config import load

    manifests = pack_recipe(load(recipe, overrides or []))
    if as_json:
        typer.echo(json.dumps(manifests))


@app.command()
def cache_teacher(recipe: RecipePath, overrides: Overrides = None, num_processes: Processes = 1) -> None:
    """Run the teacher once over every view and write its signals.

    Example: kd-dist cache-teacher configs/digits.yaml --num-processes 2
    """
    from kd_dist.config import load

    load(recipe, overrides or [])  # a mistake is told before processes start
    launch(["-m", "kd_dist.cache_teacher", str(recipe), *(overrides or [])], num_processes)


@app.command()
def evaluate(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Measure the best weights of every trained stage on the evaluation split.

    Example: kd-dist evaluate configs/digits.yaml evaluate.split=val --json
    """
    from rich.console import Console

    from kd_dist import report
    from kd_dist.config import load

    loaded = load(recipe, overrides or [])
    rows = evaluate_recipe(loaded)
    if as_json:
        typer.echo(json.dumps(rows))
    elif rows:
        Console().print(report.table(report.summarise(rows), f"{loaded.name}, {loaded.evaluate.split}"))


def pack_recipe(recipe: Recipe) -> dict[str, Any]:
    """Pack what the recipe needs and say what came of it."""
    from kd_dist import assemble
    from kd_dist.pack import pack as pack_data

    manifests = pack_data(
        assemble.shards_folder(recipe),
        source=recipe.data.source,
        root=recipe.data.root,
        options=recipe.data.options,
        fractions=recipe.data.splits,
        required=assemble.splits(recipe),
        classes=recipe.task.classes,
        shard_size=recipe.data.shard_size,
    )
    for split, made in manifests.items():
        typer.echo(f"pack {split}: {made['examples']:,} examples in {len(made['shards'])} shards", err=True)
        for row in made["quarantined"]:
            typer.echo(f"  quarantined '{row['name']}': {row['reason']}", err=True)
    return manifests


def cache(recipe: Recipe, path: Path, overrides: list[str], num_processes: int) -> None:
    """Cache the teacher's signals for every split unless they are there and are this recipe's."""
    from kd_dist import assemble, manifest

    folders = [assemble.signals_folder(recipe, split) for split in assemble.splits(recipe)]
    if all(
        (folder / manifest.FILE_NAME).is_file() and manifest.read_manifest(folder)["complete"] for folder in folders
    ):
        for split in assemble.splits(recipe):
            assemble.signals(recipe, split, assemble.examples(recipe, split))  # refuses another teacher's
        typer.echo(f"cache {recipe.teacher.name}: done before")
        return
    launch(["-m", "kd_dist.cache_teacher", str(path), *overrides], num_processes)


def launch(arguments: list[str], num_processes: int) -> None:
    """`accelerate launch` with so many processes; its exit status becomes ours."""
    import torch

    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    command += ["--num_processes", str(num_processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = dict(os.environ)
    if num_processes > 1:
        command.append("--multi_gpu")
        if not torch.cuda.is_available():
            environment["ACCELERATE_USE_CPU"] = "true"  # with --cpu, the launcher would start ONE process
    status = subprocess.run([*command, *arguments], env=environment).returncode
    if status:
        raise typer.Exit(status if status > 0 else 1)


def evaluate_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """One row for each trained stage of the recipe's seed. What was measured before on the same weights is kept."""
    import torch

    from kd_dist import assemble, report
    from kd_dist.checkpoint import write_atomic
    from kd_dist.data import batches
    from kd_dist.evaluation import evaluate as measure_metrics

    split, metric = recipe.evaluate.split, recipe.evaluate.metric
    rows = []
    for name, stage in recipe.stages.items():
        folder = assemble.stage_folder(recipe, name)
        weights = folder / assemble.BEST
        if not weights.is_file():
            continue
        record = folder / f"evaluation-{split}.json"
        digest = assemble.file_digest(weights)
        known = json.loads(record.read_text()) if record.is_file() else {}
        if known.get("weights_sha256") != digest:
            section = getattr(recipe, stage.model)
            network = assemble.network(recipe, stage.model, str(weights), recipe.seed).eval()
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            network.to(device)
            corridor = assemble.evaluation_corridor(recipe, split, 0, 1, cached=False)
            stream = batches(corridor, 0, len(corridor), 0, pin=False)
            values = measure_metrics(lambda batch, net=network: net(batch.images), stream, recipe.task.classes, device)
            known = {"weights_sha256": digest, "metrics": values, "name": section.model}
            known |= report.measure(network, recipe.views.shape)
            write_atomic(record, json.dumps(known, indent=1, sort_keys=True))
        cost = {field: known[field] for field in ("name", "parameters", "macs", "latency_ms")}
        where = {"role": assemble.role(recipe, name), "stage": name, "seed": assemble.stage_seed(recipe, name)}
        rows.append({**where, "metric": metric, "value": known["metrics"][metric], **cost})
    return rows


def unique(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each (stage, seed) once: the teacher is the same for every student's seed."""
    return list({(row["stage"], row["seed"]): row for row in rows}.values())


def write_report(recipe: Recipe, every: list[Recipe], models: list[dict[str, Any]]) -> None:
    """Write and print the report of a recipe over its seeds."""
    from rich.console import Console

    from kd_dist import assemble, report

    histories = {}
    for one in every:
        for name in one.stages:
            folder = assemble.stage_folder(one, name)
            result = json.loads((folder / assemble.RESULT).read_text())
            histories[f"{name} {folder.name}"] = result["history"]
    folder = Path(recipe.runs) / recipe.name
    shown = report.write(folder, recipe.name, recipe.evaluate.split, models, histories)
    console = Console()
    console.print(shown)
    for one in report.gains(models):
        console.print(report.gain_sentence(one, recipe.evaluate.metric), markup=False)
    console.print(f"{folder}/report.md, report.json, curves.png", markup=False)


def main() -> None:
    """The `kd-dist` entry point."""
    with one_sentence():
        app()


if __name__ == "__main__":
    main()
