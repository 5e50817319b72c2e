"""`kd-dist check`: an exported package against the limits of its recipe, line by line."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_dist import assemble, caches, deploy, places, proof
from kd_dist.choose import imported
from kd_dist.config import to_dict
from kd_dist.disk import file_digest
from kd_dist.errors import ExportError, MismatchError, TrainingError
from kd_dist.export import SUMS, VERSION
from kd_dist.formats import FORMATS, missing
from kd_dist.manifest import first_difference, plain
from kd_dist.recipe import Limits, Recipe

GOLDEN = "golden/golden.json"  # lists the golden examples of a package
PACKAGE = "package"  # the subject of what is about no format alone
NAMED = 3  # files in a sentence
SUM = re.compile(r"([0-9a-f]{64})  (\S.*)")
SECTIONS = ("task", "audio", "evaluate")  # of a recipe, which have to be those that the package was made with
BEGINNINGS = ("weights", "taps")  # keys of `student` that say what it learnt from, not what it is
SLACK = 1e-5  # of a range, by which float32 arithmetic may pass its ends


class Check(NamedTuple):
    """One line."""

    subject: str  # a format, or `package`
    what: str
    ok: bool
    measured: Any  # a number, or None where there is none
    limit: Any  # None: it is measured, and not judged
    says: str


def check(recipe: Recipe) -> list[Check]:
    """Every check of the recipe's package; golden examples are run again, the rest was measured when it was exported.

    Raises ExportError where there is no package, and MismatchError for one of other weights, or another recipe.
    """
    name = places.exported_stage(recipe)
    folder = places.package_folder(recipe, name)
    found = changes(folder)
    if deploy.INFO in found:  # what it says means nothing
        return [_files(folder, found)]
    info = json.loads((folder / deploy.INFO).read_bytes())
    refuse_other(recipe, name, folder, info)
    lines = [_files(folder, found), _present(folder, info)]
    for form in (one for one in FORMATS if one in info["files"]):
        lines += measured(form, info, recipe.export.limits)
        lines.append(golden(form, folder, info, recipe.export.limits, found))
    for form, why in (info["front_end"] or {}).get("not_written", {}).items():
        lines.append(Check("front_end", form, False, None, None, why))
    for form in recipe.export.formats or info["recipe"]["export"]["formats"] or FORMATS:
        if form not in info["files"]:
            why = info["not_written"].get(form, "was not asked for when the package was made; export it again")
            lines.append(Check(form, "written", False, None, None, why))
    return lines


def changes(folder: Path) -> dict[str, str]:
    """The files of a package that are not as they were written, by relative path: `changed`, `missing` or `foreign`.
    Raises ExportError when there is no package, or its list of digests is damaged."""
    sums = folder / SUMS
    if not sums.is_file():
        raise ExportError(f"{folder}: holds no finished package; run `kd-dist export` first")
    lines = [SUM.fullmatch(line) for line in sums.read_text(errors="replace").splitlines()]
    if None in lines:
        raise ExportError(f"{sums}: is damaged; run `kd-dist export` again")
    listed = {line[2]: line[1] for line in lines}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {SUMS}
    found = dict.fromkeys(sorted(there - listed.keys()), "foreign")
    for path, digest in {deploy.INFO: "", **listed}.items():
        if path not in there:
            found[path] = "missing"
        elif file_digest(folder / path) != digest:
            found[path] = "changed"
    return found


def refuse_other(recipe: Recipe, name: str, folder: Path, info: Mapping[str, Any]) -> None:
    """Raise a MismatchError, naming both values, for a package that is not of this stage's weights, or whose recipe had
    another student, input or measure."""
    again = "run `kd-dist export` again, or restore the recipe"
    if info["version"] != VERSION:
        raise MismatchError(
            f"{folder}: has version {info['version']!r} and this kd_dist reads version {VERSION}; run `kd-dist export` "
            f"again"
        )
    if not (places.stage_folder(recipe, name) / places.RESULT).is_file():
        raise TrainingError(
            f"{places.stage_folder(recipe, name)}: the stage has not been trained to its end, so what it will end "
            f"with is not in the package; run `kd-dist train RECIPE --stage {name}`, then `kd-dist export`"
        )
    difference = first_difference(_essence(plain(to_dict(recipe)), name), _essence(info["recipe"], info["stage"]))
    if difference is not None:
        place, ours, its = difference
        raise MismatchError(f"{folder}: was made with {place} = {its!r}, the recipe says {ours!r}; {again}")
    weights, theirs = caches.best_sha256(recipe, name), info["student"]["weights_sha256"]
    if weights != theirs:
        raise MismatchError(
            f"{folder}: was made of weights with sha256 {theirs[:12]}, the stage has ended with {weights[:12]}; run "
            f"`kd-dist export` again"
        )
    refuse_other_measure(recipe, name, folder, info)


def refuse_other_measure(recipe: Recipe, name: str, folder: Path, info: Mapping[str, Any]) -> None:
    """Raise a MismatchError for a package whose metrics are of other examples, or whose retention is of another
    teacher, than are at hand now; what is not at hand is not compared."""
    split = recipe.evaluate.split
    local = places.shards_folder(recipe) / split
    if isinstance(local, Path) and local.is_dir():
        packed, theirs = assemble.examples(recipe, split).fingerprint, info["examples"][split]
        if packed != theirs:
            raise MismatchError(
                f"{folder}: was judged on {split} examples with fingerprint {theirs[:12]}, those of now have "
                f"{packed[:12]}; run `kd-dist export` again, or restore the examples"
            )
    names = recipe.teachers_of(recipe.stages[name])
    weights, theirs = caches.weights_sha256(recipe, recipe.teacher.weights), info["teacher"]["weights_sha256"]
    if names == [recipe.teacher.name] and None not in (weights, theirs) and weights != theirs:
        raise MismatchError(
            f"{folder}: was held to a teacher with sha256 {theirs[:12]}, that of now has {weights[:12]}; cache it, "
            f"train {name} and run `kd-dist export` again, or restore the teacher"
        )


def _essence(recipe: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """What of a recipe, as plain values, a package depends on, but for the weights."""
    student = {key: one for key, one in recipe["student"].items() if key not in BEGINNINGS}
    size = recipe["views"]["size"]
    views = {"size": [size, size] if isinstance(size, int) else size}
    return {"stage": stage, "student": student, "views": views, **{one: recipe[one] for one in SECTIONS}}


# ---------------------------------------------------------------------------------------------- the checks


def _files(folder: Path, found: Mapping[str, str]) -> Check:
    """Whether every file is as it was written."""
    if not found:
        count = len((folder / SUMS).read_text().splitlines())
        return Check(PACKAGE, "files", True, 0, 0, f"all {count} are as they were written")
    first = [f"{path} is {state}" for path, state in list(found.items())[:NAMED]]
    rest = f", and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return Check(PACKAGE, "files", False, len(found), 0, f"{', '.join(first)}{rest}; run `kd-dist export` again")


def _present(folder: Path, info: Mapping[str, Any]) -> Check:
    """Whether all that belongs to a package is in it."""
    wanted = [deploy.CARD, GOLDEN, *(one["file"] for one in info["files"].values())]
    sound = info["front_end"] or {"files": {}, "golden": []}
    wanted += [one["file"] for one in sound["files"].values()]
    wanted += [one[name] for one in sound["golden"] for name in ("waveform", "levels")]
    lost = [name for name in wanted if not (folder / name).is_file()]
    lost += [] if any((folder / "android").glob("*")) else ["android/"]
    said = f"lacks {', '.join(lost)}" if lost else "model files, model card, example code and golden examples are there"
    return Check(PACKAGE, "complete", not lost, len(lost), 0, said)


def measured(name: str, info: Mapping[str, Any], limits: Limits) -> Iterator[Check]:
    """A file's figures, as they were measured at its export, against these limits."""
    one, known, bounds = info["files"][name], info["metrics"], info["output"]["range"]
    heard = proof.Outcome(one["metrics"], tuple(one["range"]), one["max_difference"])
    own = proof.Outcome(known["student"], (-one["largest_output"], one["largest_output"]))
    kept = _bounded(name, "retention", one["retention"], limits.retention, "of the teacher's " + known["metric"], True)
    if not kept.ok and one["retention"] is None:
        why = f"{kept.says}; train the teacher and export again, or set export.limits.retention=null"
        kept = kept._replace(says=why)
    yield kept
    yield _bounded(name, "size", one["bytes"] / 1e6, limits.size_mb, "MB")
    why = proof.verdict(FORMATS[name], heard, own, known["metric"], limits.parity, limits.int8)
    if FORMATS[name].int8:
        said = _bounded(name, "parity", one["kept"], limits.int8, "of the student's " + known["metric"], True)
    else:
        most = proof.allowed(limits.parity, one["largest_output"])
        said = _bounded(name, "parity", one["max_difference"], most, "from the student")
    yield said._replace(ok=why is None)
    low, high = one["range"]
    if bounds is None:
        held, limit = math.isfinite(low) and math.isfinite(high), "finite"
    else:
        slack = SLACK * (bounds[1] - bounds[0])
        held, limit = bounds[0] - slack <= low <= high <= bounds[1] + slack, f"within {bounds[0]:g} to {bounds[1]:g}"
    yield Check(name, "range", held, [low, high], bounds, f"{low:.4g} to {high:.4g}, to be {limit}")
    yield _bounded(name, "latency", one["latency_ms"]["one_thread"]["median"], limits.latency_ms, "ms")
    yield _bounded(name, "memory", one["memory_mb"], limits.memory_mb, "MB")


def _bounded(
    subject: str, what: str, value: float | None, limit: float | None, unit: str, least: bool = False
) -> Check:
    """A figure that is to be at most, or at `least`, its limit. One that is not known passes no limit."""
    shown = "unknown" if value is None else f"{value:.4g} {unit}"
    if limit is None:
        return Check(subject, what, True, value, None, f"{shown}, no limit")
    ok = value is not None and (value >= limit if least else value <= limit)
    return Check(subject, what, ok, value, limit, f"{shown}, {'at least' if least else 'at most'} {limit:.4g}")


def golden(name: str, folder: Path, info: Mapping[str, Any], limits: Limits, found: Mapping[str, str]) -> Check:
    """A file run again on the golden examples: it must be as near to the student as when it was exported."""
    form, one = FORMATS[name], info["files"][name]
    most = proof.allowed(limits.parity, one["largest_output"])
    most += one["max_difference"] if form.int8 else 0.0
    changed = [path for path in found if path == form.file or path.startswith("golden/")]
    lacking = missing(form)
    if changed or lacking:
        why = f"{changed[0]} is {found[changed[0]]}" if changed else f"{', '.join(lacking)} is not installed"
        return Check(name, "golden", False, None, most, f"not run: {why}")
    listed = folder / GOLDEN
    cases = json.loads(listed.read_bytes())["cases"]
    try:
        run = imported(form.open)(folder / form.file, len(os.sched_getaffinity(0)))
        off = [_difference(run, listed.parent, case) for case in cases]
    except Exception as error:  # every runtime has exceptions of its own
        return Check(name, "golden", False, None, most, f"not run: {proof.reason(error)}")
    if not np.isfinite(off).all():
        return Check(name, "golden", False, None, most, f"{len(cases)} examples run again: outputs are not finite")
    said = _bounded(name, "golden", max(off), most, "from the student")
    return said._replace(says=f"{len(cases)} examples run again: {said.says}")


def _difference(run: Any, folder: Path, case: Mapping[str, Any]) -> float:
    """The largest difference of what a file says now to what the student said; NaN where it says nothing finite."""
    given, expected = (
        np.fromfile(folder / case[step]["file"], "<f4").reshape(case[step]["shape"]) for step in ("input", "output")
    )
    return float(np.abs(run(given[None].astype(np.float32))[0] - expected).max())


def sentences(found: list[Check]) -> list[str]:
    """The checks in lines of four columns, and how many failed."""
    wide, narrow = (max(len(getattr(one, name)) for one in found) for name in ("subject", "what"))
    lines = [f"{'pass' if one.ok else 'FAIL'}  {one.subject:{wide}}  {one.what:{narrow}}  {one.says}" for one in found]
    failed = sum(not one.ok for one in found)
    return [*lines, f"{len(found)} checks, {failed} failed"]
