"""The comparison as one HTML page that needs nothing beside it: tables, plots, and where each of them is from."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd_dist.checkpoint import BEST, RESULT, read_record, write_atomic
from kd_dist.page import plots
from kd_dist.page.markup import code, document, figure, folded, paragraph, table, text
from kd_dist.page.plots import Series
from kd_dist.report import measured_on, spread
from kd_dist.tasks import METRICS
from kd_dist.tasks.classification import BINS

PACKAGE = Path("package/deployment_info.json")  # of a stage's folder, once it has been exported
SHORT = 12  # characters of a digest, where it is not all that is asked for
PARTS = 40  # classes that are drawn
RARE = 0.01  # of all examples; a bin with fewer says little
SHEET_BYTES = 800_000  # of a picture of examples
MEGA = 1e6
SMALL = 1e-3  # below it a number is told by its leading digits

Model = Mapping[str, Any]


class Run(NamedTuple):
    """A model of a comparison, and what lies in its folder."""

    model: Model
    outcomes: dict[str, Any]  # see `compare.Outcomes`
    result: dict[str, Any] | None  # None: no stage of the recipe has trained it
    package: dict[str, Any] | None  # None: it has not been exported

    @property
    def name(self) -> str:
        return f"{self.model['stage']}, seed {self.model['seed']}"


class Page(NamedTuple):
    """What every section is made from."""

    content: Mapping[str, Any]  # as compare.json holds it
    runs: list[Run]
    numbers: dict[str, int]  # stage -> its colour, the same in every plot

    @property
    def metric(self) -> str:
        return self.content["summary"][0]["metric"]

    def of(self, stage: str) -> list[Run]:
        """The runs of a stage."""
        return [run for run in self.runs if run.model["stage"] == stage]


def write(path: Path, content: Mapping[str, Any], sheets: Mapping[str, np.ndarray]) -> None:
    """Write the page of what compare.json holds, and of what the folders that it names hold.

    `sheets` are pictures of examples, (H, W, 3) uint8 by recipe and seed. Raises TrainingError for a file that is
    damaged.
    """
    runs = [_read(model) for model in content["models"]]
    page = Page(content, runs, {row["stage"]: number for number, row in enumerate(content["summary"])})
    with plots.settled():
        found = [
            ("table", "All metrics", _table(page)),
            ("cost", f"{page.metric} and what it takes", _cost(page)),
            ("parts", "By class" if content["task"] != "regression" else "By output", _parts(page)),
            ("outcomes", "What the models say", _outcomes(page) + _sheets(page, sheets)),
            ("training", "Training", _training(page)),
            ("losses", "Terms of the loss", _losses(page)),
            ("files", "Exported files", _files(page)),
            ("sources", "Where all this is from", _sources(page)),
        ]
    introduction = paragraph(text(measured_on(content["split"]).replace("`", "'")))
    whole = document(f"{content['title']}: teacher and students", introduction, [one for one in found if one[2]])
    write_atomic(path, whole)


def _read(model: Model) -> Run:
    folder = Path(model["folder"])
    outcomes = read_record(Path(model["record"]), "outcomes")["outcomes"]
    result = read_record(folder / RESULT, "history", "identity") if (folder / RESULT).is_file() else None
    wanted = ("files", "student", "metrics", "examples")
    package = read_record(folder / PACKAGE, *wanted) if (folder / PACKAGE).is_file() else None
    return Run(model, outcomes, result, package)


def _source(runs: Sequence[Run]) -> str:
    """The line below a figure, and a line a run in it."""
    lines = "".join(f"<li>{_origin(run)}</li>" for run in runs)
    examples = ", ".join(dict.fromkeys(run.model["examples"][:SHORT] for run in runs))
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return folded(f"Source: {count}, examples {code(examples)}", f"<ul>{lines}</ul>", "source")


def _origin(run: Run) -> str:
    one = run.model
    step = f", step {one['best_step']:,}" if "best_step" in one else ""
    digests = f"weights {code(one['weights'][:SHORT])}{step}, examples {code(one['examples'][:SHORT])}"
    return f"{text(one['recipe'])}: {text(run.name)}, {code(one['folder'])}, {digests}"


# ------------------------------------------------------------------------------------------------ sections


def _table(page: Page) -> str:
    """The table of compare.md, a line a stage with links to its runs; then a line a run."""
    head, *lines = zip(*page.content["table"], strict=True)
    head, *rows = [[text(one) for one in line] for line in (head, *lines)]
    for stage, row in zip(page.numbers, rows, strict=True):
        row.append(", ".join(_link(page, run, f"seed {run.model['seed']}") for run in page.of(stage)))
    said = paragraph(
        "± is half of the 95 % interval over the seeds; in brackets the share of the teacher's metric kept."
    )
    metrics = list(page.runs[0].model["metrics"])
    each = [
        [text(run.name), *(_number(run.model["metrics"].get(metric)) for metric in metrics), *_where(run)]
        for run in page.runs
    ]
    columns = ["run", *map(text, metrics), "folder", "weights", "step", "examples"]
    return said + table(["stage", *head[1:], "runs"], rows) + "<h3>Each run</h3>" + table(columns, each)


def _cost(page: Page) -> str:
    """The metric against parameters, bytes of the weights, and latency."""
    marks: dict[str, list[dict[str, Any]]] = {"parameters, millions": [], "weights on disk, MB": [], "latency, ms": []}
    for row in page.content["summary"]:
        runs = page.of(row["stage"])
        weights = [path for run in runs if (path := Path(run.model["folder"]) / BEST).is_file()]
        taken = {
            "parameters, millions": [row["parameters"] / MEGA],
            "weights on disk, MB": [path.stat().st_size / MEGA for path in weights],
            "latency, ms": [run.model["latency_ms"] for run in runs],
        }
        one = {"name": row["stage"], "number": page.numbers[row["stage"]], "teacher": row["role"] == "teacher"}
        one |= {"y": row["mean"], "half": row["interval"]}
        for axis, values in taken.items():
            if values:
                marks[axis].append({**one, "x": [min(values), statistics.median(values), max(values)]})
    pictures = [plots.against(found, page.metric, axis) for axis, found in marks.items() if found]
    better = "" if METRICS[page.metric] else " (lower is better)"
    caption = (
        f"{text(page.metric)}{better}: the mean over the seeds with its 95 % interval; the star is a teacher. "
        f"Latency: the median, the least and the most of the seeds, of one example on one CPU thread."
    )
    return figure(pictures, caption, _source(page.runs))


def _parts(page: Page) -> str:
    """Bars by class or output, and the numbers."""
    found = ""
    for quantity, parts in page.content["by_part"].items():
        if not parts:
            continue
        shown = sorted(parts, key=lambda one: statistics.fmean(mean for mean, _ in one["stages"].values()))[:PARTS]
        shown = [one for one in parts if one in shown]
        few = "" if len(shown) == len(parts) else f"; drawn are the {len(shown)} of {len(parts)} that come out lowest"
        rows = [
            [text(one["name"]), *(spread(*one["stages"].get(stage, (None, None))) for stage in page.numbers)]
            for one in parts
        ]
        found += figure(
            [plots.bars(quantity, shown, page.numbers)],
            f"{text(quantity)}, the mean over the seeds with its 95 % interval{few}.",
            _source(page.runs) + folded("The numbers", table([quantity, *map(text, page.numbers)], rows)),
        )
    return found


def _outcomes(page: Page) -> str:
    """ROC curves, reliability, confusion and scatter, of what the records of the evaluation hold."""
    drawn = [run for run in page.runs if run.model.get("roc")]
    found = ""
    if drawn:
        every = [_series(page, run, run.model["roc"]) for run in drawn]
        areas = "; ".join(f"{run.name} {run.model['metrics']['auc']:.4f}" for run in drawn)
        alt = f"ROC curves. Area under each: {areas}."
        picture = plots.square(every, ("false positive rate", "true positive rate"), alt)
        found += figure([picture], "ROC curves, a line a seed.", _source(drawn))
    binned = [run for run in page.runs if "reliability" in run.outcomes]
    if binned:
        every = [_reliability(page, stage) for stage in page.numbers]
        alt = f"Reliability diagram: accuracy against the probability of the top class, in {BINS} bins, by model."
        picture = plots.square(every, ("mean probability of the top class", "accuracy"), alt, dots=True)
        caption = (
            f"Reliability: those of {BINS} bins of equal width that hold more than {RARE:.0%} of the examples, all "
            f"seeds together; on the diagonal a model is calibrated."
        )
        found += figure([picture], caption, _source(binned))
    judged = [run for run in page.runs if run.outcomes.get("confusion")]
    if judged:
        pictures = [
            plots.confusion(
                stage, np.sum([run.outcomes["confusion"] for run in page.of(stage)], axis=0), page.content["names"]
            )
            for stage in page.numbers
        ]
        found += figure(pictures, "Confusion matrices, all seeds together; the numbers are examples.", _source(judged))
    return found + _scatter(page)


def _scatter(page: Page) -> str:
    """Predictions against the truth, a figure an output and a plot a stage, all of one scale."""
    paired = [run for run in page.runs if run.outcomes.get("pairs")]
    names, found = page.content["names"], ""
    for place, output in enumerate(names if paired else ()):
        pairs = {
            stage: np.array([row for run in page.of(stage) for row in run.outcomes["pairs"]], float)[
                :, place :: len(names)
            ]
            for stage in page.numbers
        }
        every = np.concatenate(list(pairs.values()))
        limits = float(np.nanmin(every)), float(np.nanmax(every))
        pictures = [plots.scatter(stage, output, pair, limits, page.numbers[stage]) for stage, pair in pairs.items()]
        found += figure(
            pictures, f"{text(output)}: predictions against the truth, all seeds together.", _source(paired)
        )
    return found


def _series(page: Page, run: Run, points: Sequence[tuple[float, float]]) -> Series:
    return Series(run.model["stage"], page.numbers[run.model["stage"]], points)


def _reliability(page: Page, stage: str) -> Series:
    """Mean probability and accuracy of each bin of a stage with RARE of its rows, over its seeds."""
    bins = np.sum([np.array(run.outcomes["reliability"], float) for run in page.of(stage)], axis=0)
    least = RARE * bins[:, 0].sum()
    return Series(
        stage, page.numbers[stage], [(p / rows, right / rows) for rows, right, p in bins.tolist() if rows > least]
    )


def _sheets(page: Page, sheets: Mapping[str, np.ndarray]) -> str:
    """Pictures of examples."""
    found = ""
    for name, pixels in sheets.items():
        recipe = name.partition(",")[0]
        runs = [run for run in page.runs if run.model["recipe"] == recipe]
        picture = plots.sheet(name, pixels, SHEET_BYTES)
        caption = (
            f"{text(name)}: the first examples of the split, their masks, and what each model says; white is ignored."
        )
        found += figure([picture], caption, _source(runs), wide=True)
    return found


def _training(page: Page) -> str:
    """Loss, validation metric and learning rate by epoch."""
    runs = [run for run in page.runs if run.result]
    if not runs:
        return ""
    axes = {"training loss": "loss", f"validation {page.metric}": f"val_{page.metric}", "learning rate": "lr"}
    pictures = []
    for label, name in axes.items():
        every = [_series(page, run, _history(run, name)) for run in runs]
        last = "; ".join(f"{run.name} {_number(run.result['history'][-1].get(name))}" for run in runs)
        pictures.append(plots.epochs(every, label, "", f"{label} by epoch. At the end: {last}."))
    return figure(pictures, f"A line a seed; of long runs {plots.POINTS} epochs.", _source(runs))


def _losses(page: Page) -> str:
    """The terms of the loss by epoch, a plot a stage."""
    pictures, runs = [], []
    for stage in page.numbers:
        trained = [run for run in page.of(stage) if run.result]
        every = []
        for run in trained:
            terms = run.result["identity"]["stage"]["losses"]
            every += [Series(term, number, _history(run, term)) for number, term in enumerate(sorted(terms))]
        if every:
            names = ", ".join(dict.fromkeys(one.name for one in every))
            alt = f"Terms of the loss of {stage} by epoch, before they are weighted: {names}."
            pictures.append(plots.epochs(every, "term of the loss", stage, alt))
            runs += trained
    caption = "Each term before it is weighted, the mean over an epoch; a line a seed."
    return figure(pictures, caption, _source(runs)) if pictures else ""


def _history(run: Run, name: str) -> list[tuple[float, float]]:
    return [(record["epoch"] + 1, record.get(name)) for record in run.result["history"]]


def _files(page: Page) -> str:
    """What has been exported: a table a package, and accuracy against size and latency of all files."""
    runs = [run for run in page.runs if run.package]
    marks: dict[str, list[dict[str, Any]]] = {"size, MB": [], "latency on one thread, ms": []}
    tables, formats = "", list(dict.fromkeys(name for run in runs for name in run.package["files"]))
    for run in runs:
        package, wrong = run.package, _stale(run)
        for name, one in package["files"].items() if wrong is None else ():
            taken = {
                "size, MB": one["bytes"] / MEGA,
                "latency on one thread, ms": one["latency_ms"]["one_thread"]["median"],
            }
            for axis, x in taken.items():
                marks[axis].append({"package": run.name, "format": name, "x": x, "y": one["metrics"][page.metric]})
        old = "" if wrong is None else paragraph(f"<strong>{wrong}: export the stage again.</strong>")
        left = "".join(f"<li>{code(name)}: {text(why)}</li>" for name, why in package.get("not_written", {}).items())
        tables += f"<h3>{text(run.name)}</h3>{old}" + table(
            _file_head(page), [_file(page, *pair) for pair in package["files"].items()]
        )
        tables += f"<p>Not written:</p><ul>{left}</ul>" if left else ""
    pictures = [plots.files(found, page.metric, axis, formats) for axis, found in marks.items() if found]
    if not pictures:
        return tables
    drawn = [run for run in runs if _stale(run) is None]
    where = ", ".join(code(Path(run.model["folder"]) / PACKAGE) for run in drawn)
    return tables + figure(pictures, f"A mark a format, a filling a package. From {where}.", _source(drawn))


def _stale(run: Run) -> str | None:
    """Why the figures of a run's package are not of what is compared, as HTML."""
    weights, split = run.package["student"]["weights_sha256"], run.package["metrics"]["split"]
    if weights != run.model["weights"]:
        return f"Of other weights, {code(weights[:SHORT])}"
    examples = run.package["examples"][split]
    if examples != run.model["examples"]:
        return f"Judged on other examples, {code(examples[:SHORT])} of the {text(split)} split"
    return None


def _file_head(page: Page) -> list[str]:
    kept = ["retention", "kept of the student"]
    return [
        "format",
        "file",
        "MB",
        "largest difference",
        text(page.metric),
        *kept,
        "ms, one thread",
        "ms, all threads",
        "memory MB",
    ]


def _file(page: Page, name: str, one: Mapping[str, Any]) -> list[str]:
    """A line of a package's table."""
    shares = ["-" if one[share] is None else f"{one[share]:.1%}" for share in ("retention", "kept")]
    alone, together = one["latency_ms"]["one_thread"], one["latency_ms"]["all_threads"]
    times = [f"{alone['median']:.3f}", f"{together['median']:.3f} ({together['threads']})"]
    size = f"{one['bytes'] / MEGA:.3f}"
    figures = [f"{one['max_difference']:.2e}", _number(one["metrics"][page.metric])]
    return [code(name), code(one["file"]), size, *figures, *shares, *times, f"{one['memory_mb']:.1f}"]


def _sources(page: Page) -> str:
    """All runs with their files, and the command that made the page."""
    head = ["run", "recipe", "role", "weights, sha256", "best step of", "examples", "result", "evaluation"]
    rows = []
    for number, run in enumerate(page.runs):
        one = run.model
        steps = f"{one['best_step']:,} of {one['steps']:,}" if "best_step" in one else "-"
        result = "-" if run.result is None else code(Path(one["folder"]) / RESULT)
        name = f'<span id="run-{number}">{text(run.name)}</span>'
        digests = [code(one["weights"]), steps, code(one["examples"])]
        rows.append([name, text(one["recipe"]), text(one["role"]), *digests, result, code(one["record"])])
    return paragraph(f"Made by {code(page.content['command'])}") + table(head, rows)


def _link(page: Page, run: Run, words: str) -> str:
    return f'<a href="#run-{page.runs.index(run)}">{text(words)}</a>'


def _where(run: Run) -> list[str]:
    one = run.model
    step = f"{one['best_step']:,}" if "best_step" in one else "-"
    return [code(one["folder"]), code(one["weights"][:SHORT]), step, code(one["examples"][:SHORT])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) >= SMALL else f"{value:.2e}"
