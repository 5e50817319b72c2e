"""`kd-dist export`: a trained student becomes a folder for an app, each file of it proven to be the student.

The folder appears whole, or not at all: it is filled under another name and then takes its place. `SHA256SUMS`, which
`sha256sum -c` reads too, lists every other file of it.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kd_dist import assemble, caches, deploy, journey, manifest, places, proof
from kd_dist.batch import valid_rows
from kd_dist.checkpoint import read_record
from kd_dist.choose import imported
from kd_dist.config import to_dict
from kd_dist.deploy import front_end
from kd_dist.disk import alone, file_digest, replaced
from kd_dist.doctor import installed
from kd_dist.errors import DataError, ExportError, TrainingError
from kd_dist.folders import read_examples
from kd_dist.formats import CONFIG, FORMATS, Format, Graph, missing
from kd_dist.loader import batches
from kd_dist.models import Network
from kd_dist.policies import split_policy, task
from kd_dist.progress import progress
from kd_dist.recipe import Recipe
from kd_dist.tasks import undefined

VERSION = 1  # of deployment_info.json
SUMS = "SHA256SUMS"  # `digest  path` of every other file of a package; written last
RESIZE = "Pillow's antialiased bilinear filter, across, then down"
CASES = 4  # examples that a package shows every step of
LIBRARIES = ("torch", "safetensors", "onnx", "onnxscript", "onnxruntime", "executorch", "torchao")


class Student(NamedTuple):
    """What is exported: a stage's best weights in its network."""

    stage: str
    network: Network  # on the CPU, in evaluation mode
    graph: Graph
    weights_sha256: str


def export(recipe: Recipe) -> dict[str, Any]:
    """Write the package of the recipe's student; returns what its deployment_info.json holds.

    A format that cannot be written, or whose file is not the student, is left out and told of in `not_written`. Raises
    ExportError when none is left, or a library is not installed, and TrainingError for a stage that has not ended.
    """
    forms, student = chosen(recipe), trained(recipe)
    examples = calibration(recipe, student)
    own_row, teacher_row = rows(recipe, student.stage)
    folder = places.package_folder(recipe, student.stage)
    with alone(folder.parent), replaced(folder) as fresh:
        files, refused = written(forms, student.graph, examples, fresh)
        own, heard = heard_of(recipe, student, {name: fresh / forms[name].file for name in files})
        taken, failed = measured(recipe, student, files, own, heard)
        refused |= failed
        if not taken:
            raise unwritten(refused)
        info = told(recipe, student, own, own_row, teacher_row)
        info["files"] = {name: described(info, name, files[name], heard[name], own) | taken[name] for name in taken}
        info["not_written"] = refused
        if recipe.audio is not None:
            runtimes = [one for one in front_end.WRITTEN if any(name.startswith(one) for name in taken)]
            spectrograms = task(recipe).input.front_end
            info["front_end"] = front_end.write(fresh, spectrograms, recipe.views.shape[1], runtimes)
        deploy.write(fresh, info, cases(recipe, student))
        list_sums(fresh)
    return info


def chosen(recipe: Recipe) -> dict[str, Format]:
    """The formats that the recipe wants, in the order of FORMATS. Raises ExportError when a library is not there."""
    forms = {name: form for name, form in FORMATS.items() if name in (recipe.export.formats or FORMATS)}
    lacking = {name: missing(form) for name, form in forms.items() if missing(form)}
    if lacking:
        libraries = ", ".join(dict.fromkeys(library for needed in lacking.values() for library in needed))
        raise ExportError(
            f"export.formats: {', '.join(lacking)} cannot be written without {libraries}; run "
            f"pip install 'kd_dist[export]', or choose other formats"
        )
    return forms


def trained(recipe: Recipe) -> Student:
    """The student that is to be exported, with the best weights of its stage."""
    name = places.exported_stage(recipe)
    if assemble.stage_result(recipe, name) is None:
        raise TrainingError(
            f"{places.stage_folder(recipe, name)}: the stage has not been trained to its end; run `kd-dist train "
            f"RECIPE --stage {name}` first"
        )
    network = assemble.network(recipe, "student", places.STAGE_REFERENCE + name, recipe.seed).eval()
    section, channels = recipe.student, network.channels
    config = {"model": section.model, "classes": network.classes, "channels": channels, "maps": network.maps}
    config |= {"bounds": network.bounds, "head": to_dict(section.head), "options": section.options}
    config |= {"image_size": section.image_size, "mean": network.mean.flatten().tolist()}
    metadata = {"made_with": f"kd_dist {manifest.versions()['kd_dist']}", "recipe": recipe.name, "stage": name}
    metadata[CONFIG] = json.dumps({**config, "std": network.std.flatten().tolist()}, sort_keys=True)
    input_name = "image" if recipe.audio is None else "spectrogram"
    output = "values" if recipe.task.name == "regression" else "logits"
    graph = Graph(network, (channels, *recipe.views.shape), input_name, output, metadata)
    return Student(name, network, graph, caches.best_sha256(recipe, name))


def calibration(recipe: Recipe, student: Student) -> Tensor:
    """`export.calibration` of the examples that the student learns from, as it sees them, in the order of its training,
    which is a shuffled one: (N, C, H, W) float32 in [0, 1]."""
    corridor, wanted = assemble.training_corridor(recipe, student.stage, 0, 1), recipe.export.calibration
    found: list[Tensor] = []
    for batch in batches(corridor, 0, len(corridor), 0, pin=False):
        if batch.valid.any():
            rows = valid_rows(batch)
            with torch.inference_mode():
                proof.refuse_senseless(student.network(rows.images), rows.keys)
            found.append(rows.images)
        if sum(map(len, found)) >= wanted:
            break
    if not found:
        raise DataError(f"{corridor.examples.folder}: no example of it can be read; pack it again")
    return torch.cat(found)[:wanted].float() / 255


def written(
    forms: Mapping[str, Format], graph: Graph, examples: Tensor, folder: Path
) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Write every format into `folder`: the files of each, and why others could not be written."""
    files, refused = {}, {}
    for name, form in forms.items():
        path, before, start = folder / form.file, set(folder.iterdir()), time.monotonic()
        try:
            imported(form.write)(graph, examples, path)
        except Exception as error:  # every exporter has exceptions of its own
            why = proof.reason(error).removeprefix(f"{path}: ")
            refused[name] = left_out(name, why, set(folder.iterdir()) - before)
            continue
        files[name] = sorted(set(folder.iterdir()) - before)
        size, seconds = sum(one.stat().st_size for one in files[name]), time.monotonic() - start
        print(f"export {name}: {size / 1e6:,.2f} MB in {seconds:.1f} s", file=sys.stderr, flush=True)
    return files, refused


def left_out(name: str, why: str, paths: Iterable[Path]) -> str:
    """Delete what there is of a format, say why, and return that."""
    for path in paths:
        path.unlink()
    print(f"export {name}: not written: {why}", file=sys.stderr, flush=True)
    return why


def heard_of(
    recipe: Recipe, student: Student, files: Mapping[str, Path]
) -> tuple[proof.Outcome, dict[str, proof.Outcome]]:
    """What the student and each file say of the whole evaluation split."""
    corridor = assemble.evaluation_corridor(recipe, recipe.evaluate.split, 0, 1, cached=False)
    threads = len(os.sched_getaffinity(0))
    runs, broken = {}, {}
    for name, path in files.items():
        try:
            run = imported(FORMATS[name].open)(path, threads)
            runs[name] = proof.one_by_one(run) if FORMATS[name].int8 else run
        except Exception as error:  # every runtime has exceptions of its own
            broken[name] = proof.Outcome({}, (math.nan, math.nan), failure=proof.reason(error))
    with progress("export proof", len(corridor.examples), "examples") as advance:

        def stream() -> Iterator:
            for batch in batches(corridor, 0, len(corridor), 0, pin=False):
                yield batch
                advance(len(batch.keys))

        with torch.inference_mode():
            own, heard = proof.compare(student.network, runs, stream(), corridor.task, recipe.data.error_limit)
    if own.metrics[recipe.evaluate.metric] is None:
        raise DataError(f"{undefined(recipe.evaluate.metric, corridor.examples.folder)} evaluate.split")
    return own, heard | broken


def measured(
    recipe: Recipe, student: Student, files: Mapping[str, list[Path]], own: proof.Outcome, heard: Mapping
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What each file takes that is the student, and why others are not; these are deleted."""
    limits, taken, refused = recipe.export.limits, {}, {}
    for name, paths in files.items():
        form, start = FORMATS[name], time.monotonic()
        why = proof.verdict(form, heard[name], own, recipe.evaluate.metric, limits.parity, limits.int8)
        if why is None:
            try:
                [path] = [one for one in paths if one.name == form.file]
                taken[name] = proof.cost(name, path, student.graph.shape)
            except ExportError as error:
                why = str(error)
        if why is not None:
            refused[name] = left_out(name, why, paths)
            continue
        one, seconds = taken[name]["latency_ms"]["one_thread"]["median"], time.monotonic() - start
        print(f"export {name}: {one:.2f} ms an example, measured in {seconds:.1f} s", file=sys.stderr, flush=True)
    return taken, refused


def unwritten(refused: Mapping[str, str]) -> ExportError:
    """What to raise for formats that were not written."""
    return ExportError("not written: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))


def cases(recipe: Recipe, student: Student) -> list[deploy.Case]:
    """Examples of the evaluation split, spread over it, with every step from the decoded input to the output."""
    shards = assemble.examples(recipe, recipe.evaluate.split)
    policy = split_policy(recipe, recipe.evaluate.split)
    ids = np.linspace(0, len(shards) - 1, num=min(CASES, len(shards)), dtype=np.int64)
    found = []
    for number, example in enumerate(read_examples(shards, ids, task(recipe).decode)):
        pixels = policy.replay(example.image, policy.canonical(example.image.shape[:2]))
        given = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float() / 255
        with torch.inference_mode():
            output = student.network(given[None])[0]
        image = example.image if policy.channels > 1 else example.image[..., 0]
        found.append(deploy.Case(f"case-{number}", image, given.numpy(), output.numpy()))
    return found


# ---------------------------------------------------------------------------------------------- what is told


def rows(recipe: Recipe, name: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What `kd-dist evaluate` says of the stage, and of the teacher that it is held to; None where there is none."""
    every, label = journey.evaluate_recipe(recipe), journey.taught_by(recipe, name)
    [own] = [row for row in every if row["stage"] == name]
    teachers = [row for row in every if row["role"] == "teacher"]
    held_to = [row for row in teachers if (row["stage"] == label if label else not row.get("further"))]
    return own, next(iter(held_to), None)


def told(
    recipe: Recipe, student: Student, own: proof.Outcome, own_row: Mapping, teacher_row: Mapping | None
) -> dict[str, Any]:
    """What deployment_info.json says beside the files."""
    judged, metric, e = assemble.examples(recipe, recipe.evaluate.split), recipe.evaluate.metric, recipe.export
    regression = recipe.task.name == "regression"
    versions = {name: installed(name) for name in LIBRARIES}
    taught = {} if teacher_row is None else read_record(Path(teacher_row["record"]), "metrics")["metrics"]
    return {
        "version": VERSION,
        "name": recipe.name,
        "stage": student.stage,
        "seed": recipe.seed,
        "task": recipe.task.name,
        "made_with": manifest.versions() | {name: one for name, one in versions.items() if one is not None},
        "machine": {
            "processor": proof.processor(),
            "threads": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],  # of the last minute
        },
        "model": {name: own_row[name] for name in ("name", "parameters", "macs")},
        **inputs_and_outputs(recipe, student),
        "class_names": None if regression else judged.manifest["class_names"],
        "outputs": list(recipe.task.outputs) if regression else None,
        "front_end": None,
        "metrics": {
            "split": recipe.evaluate.split,
            "examples": len(judged),
            "metric": metric,
            "student": own.metrics,
            "teacher": taught,
            "retention": proof.share(metric, own.metrics, taught),
        },
        "teacher": teacher_identity(recipe, student.stage),
        "student": {"weights_sha256": student.weights_sha256},
        "examples": {split: assemble.examples(recipe, split).fingerprint for split in places.splits(recipe)},
        "licences": {"weights": e.license, "teacher": e.teacher_license, "data": e.data_license},
        "recipe": manifest.plain(to_dict(recipe)),
    }


def inputs_and_outputs(recipe: Recipe, student: Student) -> dict[str, Any]:
    """`input` and `output`: what the student takes and gives."""
    network, (channels, height, width) = student.network, student.graph.shape
    with torch.inference_mode():
        said = network(torch.zeros(1, channels, height, width))
    resized = network.image_size is not None and (height, width) != (network.image_size, network.image_size)
    normalisation = {"mean": network.mean.flatten().tolist(), "std": network.std.flatten().tolist()}
    given = {
        "name": student.graph.input,
        "shape": [1, channels, height, width],
        "dtype": "float32",
        "range": [0, 1],
        "layout": "NCHW",
        "channels": "RGB" if recipe.audio is None else "level",
        "view": "whole" if task(recipe).canonical_whole else "centre",
        "resize": RESIZE if recipe.audio is None else None,
        "normalisation": {**normalisation, "in_graph": True},
        "resized_in_graph_to": network.image_size if resized else None,
    }
    bounds = None if network.bounds is None else list(network.bounds)
    return {"input": given, "output": {"name": student.graph.output, "shape": list(said.shape), "range": bounds}}


def teacher_identity(recipe: Recipe, name: str) -> dict[str, Any]:
    """Who taught a stage: of several teachers their names, and a digest of who they are; and its caches, by split."""
    each = [recipe.with_teacher(one) for one in recipe.teachers_of(recipe.stages[name])]
    identities = [manifest.plain(caches.teacher_identity(one)) for one in each]
    cached = {}
    for one in each:
        for split in places.cached_splits(recipe):
            if caches.is_cached(one, split):
                signals = caches.signals(one, split, assemble.examples(recipe, split))
                cached[places.beside(recipe, one.teacher.name, split)] = signals.fingerprint
    return {
        "name": " + ".join(one["name"] for one in identities),
        "model": " + ".join(one["model"] for one in identities),
        "weights_sha256": manifest.digest(identities) if identities[1:] else identities[0]["weights_sha256"],
        "cache": cached,
    }


def described(
    info: Mapping[str, Any], name: str, paths: list[Path], heard: proof.Outcome, own: proof.Outcome
) -> dict[str, Any]:
    """What deployment_info.json says of one file, beside what it takes."""
    form, known = FORMATS[name], info["metrics"]
    [path] = [one for one in paths if one.name == form.file]
    return {
        "file": form.file,
        "bytes": path.stat().st_size,
        "sha256": file_digest(path),
        "int8": form.int8,
        "note": form.note,
        "max_difference": heard.max_difference,
        "largest_output": own.largest,
        "range": list(heard.range),
        "metrics": heard.metrics,
        "retention": proof.share(known["metric"], heard.metrics, known["teacher"]),
        "kept": proof.share(known["metric"], heard.metrics, known["student"]),
    }


# ---------------------------------------------------------------------------------------------- the folder


def list_sums(folder: Path) -> None:
    """Write SHA256SUMS of all that is in a package."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{file_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines))
