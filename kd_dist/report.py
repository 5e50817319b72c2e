"""What a recipe came to: one table and one picture, from the results that its stages left behind."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from kd_dist.checkpoint import write_atomic
from kd_dist.tasks import retention

ROLES = ("teacher", "student_alone", "student_kd")
COST = ("parameters", "MACs", "latency ms", "memory MB")


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % confidence interval (Student's t); None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def summarise(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a stage, over its seeds, in the order of first appearance; retention is against the teacher that a stage
    listens to (`taught_by`), else the mean of the rows of its own recipe's first, those that are not `further`.

    `parts` of a model are what its metric is made of, such as each class's IoU, as (name, value); those of a row
    are (name, mean, interval). `metrics` of a row are all that the task has: mean, interval and retention of each, None
    where a seed has no such number.
    """
    stages = list(dict.fromkeys((model["role"], model["stage"]) for model in models))
    rows = []
    for role, stage in sorted(stages, key=lambda one: ROLES.index(one[0])):
        group = [model for model in models if model["stage"] == stage]
        mean, half = interval([model["value"] for model in group])
        latency = statistics.median(model["latency_ms"] for model in group)
        same = {name: group[0][name] for name in ("name", "metric", "parameters", "macs", "memory_mb")}
        rows.append({"role": role, "stage": stage, **same, "seeds": len(group), "mean": mean, "interval": half})
        rows[-1]["latency_ms"] = latency
        parts = list(dict.fromkeys(part for model in group for part, _ in model["parts"]))
        values = {part: [value for model in group for name, value in model["parts"] if name == part] for part in parts}
        rows[-1]["parts"] = [(part, *interval(values[part])) for part in parts]
        every = {metric: [model["metrics"][metric] for model in group] for metric in group[0]["metrics"]}
        known = {metric: (None, None) if None in of else interval(of) for metric, of in every.items()}
        rows[-1]["metrics"] = {metric: {"mean": mean, "interval": half} for metric, (mean, half) in known.items()}
    heard = {model["stage"]: model.get("taught_by") for model in models}
    further = {model["stage"] for model in models if model.get("further")}
    homes = {model["stage"]: model.get("recipe") for model in models}
    for row in rows:
        own, home = heard[row["stage"]], homes[row["stage"]]
        teachers = [one for one in rows if one["role"] == "teacher" and one["stage"] not in further]
        teachers = [one for one in teachers if homes[one["stage"]] == home]
        if own is not None:
            teachers = [one for one in rows if one["stage"] == own]
        row["retention"] = kept(row["metric"], row["mean"], [teacher["mean"] for teacher in teachers])
        for metric, one in row["metrics"].items():
            one["retention"] = kept(metric, one["mean"], [teacher["metrics"][metric]["mean"] for teacher in teachers])
    return rows


def kept(metric: str, value: float | None, teachers: Sequence[float | None]) -> float | None:
    """The retention of a metric against the mean of the teachers'; None where one of them is not known."""
    if value is None or not teachers or None in teachers:
        return None
    return retention(metric, value, statistics.fmean(teachers))


def gains(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each student_kd stage is from each student_alone stage, and from the one that differs from it in having
    no generated examples: the mean difference over the seeds of both, and the steps that each took."""
    steps = {model["stage"]: model.get("steps") for model in models}
    found, twins = [], {model["stage"]: model.get("without_generated") for model in models}
    values = {role: {} for role in ROLES}
    for model in models:
        values[model["role"]].setdefault(model["stage"], {})[model["seed"]] = model["value"]
    for taught, with_kd in values["student_kd"].items():
        twin = {name: one for name, one in values["student_kd"].items() if name == twins[taught]}
        for alone, without in {**values["student_alone"], **twin}.items():
            seeds = sorted(with_kd.keys() & without.keys())
            if seeds:
                mean, half = interval([with_kd[seed] - without[seed] for seed in seeds])
                pair = {"stage": taught, "against": alone, "generated": alone in twin}
                pair["steps"] = [steps[taught], steps[alone]]
                found.append({**pair, "seeds": len(seeds), "mean": mean, "interval": half})
    return found


def spread(mean: float | None, half: float | None) -> str:
    """A mean and its interval as a table shows them; a dash where there is none."""
    if mean is None:
        return "-"
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


def cells(row: dict[str, Any]) -> list[str]:
    """A summary row as a table shows it."""
    share = "" if row["retention"] is None else f"{row['retention']:.1%}"
    value = spread(row["mean"], row["interval"])
    return [role_in_words(row), row["name"], row["stage"], str(row["seeds"]), value, *cost(row), share]


def role_in_words(row: dict[str, Any]) -> str:
    return row["role"].replace("_kd", " + KD").replace("_", " ")


def cost(row: dict[str, Any]) -> list[str]:
    """What a model takes, as COST heads it."""
    size, macs = f"{row['parameters'] / 1e6:.3f} M", f"{row['macs'] / 1e6:.2f} M"
    return [size, macs, f"{row['latency_ms']:.2f}", f"{row['memory_mb']:.2f}"]


def headings(metric: str) -> list[str]:
    return ["role", "model", "stage", "seeds", metric, *COST, "retention"]


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The summary for a terminal."""
    shown = Table(title=title)
    for heading in headings(rows[0]["metric"] if rows else "metric"):
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def metrics_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Every metric of each stage, for a terminal."""
    names = list(rows[0]["metrics"])
    shown = Table(title="all metrics")
    for heading in ("stage", *names):
        shown.add_column(heading, overflow="fold")
    for row in rows:
        found = [row["metrics"][name] for name in names]
        shown.add_row(row["stage"], *(spread(one["mean"], one["interval"]) for one in found))
    return shown


def markdown(
    rows: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
    title: str,
    split: str,
    pictures: Sequence[str],
) -> str:
    """The table and the gains as a page; the `pictures`, named without their `.png`, lie beside it."""
    names = headings(rows[0]["metric"])
    lines = [f"# {title}", "", measured_on(split), ""]
    lines += ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += ["", *(gain_sentence(one, rows[0]["metric"]) for one in differences)]
    lines += part_lines(rows)
    lines += [line for name in pictures for line in ("", f"![{name}]({name}.png)")]
    return "\n".join([*lines, ""])


def measured_on(split: str) -> str:
    """What the numbers of a table are."""
    return (
        f"Measured on the `{split}` split; latency is one example on one CPU thread; memory is the weights and the "
        f"most that one example's activations take at once."
    )


def part_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what the metric is made of, one column a stage; empty where it has no parts."""
    names = list(dict.fromkeys(name for row in rows for name, *_ in row["parts"]))
    if not names:
        return []
    columns = [{name: spread(*one) for name, *one in row["parts"]} for row in rows]
    lines = ["", "| part | " + " | ".join(row["stage"] for row in rows) + " |", "|" + " --- |" * (len(rows) + 1)]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(column.get(name, "") for column in columns) + " |")
    return lines


def gain_sentence(one: dict[str, Any], metric: str) -> str:
    """A row of `gains` in words."""
    sure = "one seed" if one["interval"] is None else f"± {one['interval']:.4f}, 95 % over {one['seeds']} seeds"
    mine, others = one["steps"]
    taken = f", {others} steps" if mine == others else f", {mine} steps against {others}"
    what = f", which has no generated examples{taken}" if one["generated"] else ""
    return f"`{one['stage']}` against `{one['against']}`{what}: {one['mean']:+.4f} {metric} ({sure})."


def write(
    folder: Path,
    title: str,
    split: str,
    models: list[dict[str, Any]],
    histories: dict[str, list],
    examples: np.ndarray | None,
) -> list[dict]:
    """Write `report.json`, `report.md`, `curves.png`, `roc-<split>.png` where there are such curves, and the
    picture of some `examples`, if any; return the summary.

    `histories`: epoch records by run; `examples`: (height, width, 3) uint8.
    """
    rows, differences = summarise(models), gains(models)
    content = {"split": split, "models": models, "summary": rows, "gains": differences}
    write_atomic(folder / "report.json", json.dumps(content, indent=1, sort_keys=True))
    roc = f"roc-{split}"
    pictures = ["curves", *([roc] if plot_roc(folder / f"{roc}.png", models, split) else [])]
    if examples is not None:
        Image.fromarray(examples).save(folder / "examples.png")
        pictures.append("examples")
    plot(folder / "curves.png", histories, rows[0]["metric"])
    write_atomic(folder / "report.md", markdown(rows, differences, title, split, pictures))
    return rows


def plot(path: Path, histories: dict[str, list[dict[str, Any]]], metric: str) -> None:
    """Training loss and validation metric of every run over its epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, history in histories.items():
        epochs = [record["step"] / history[0]["step"] for record in history]
        left.plot(epochs, [record["loss"] for record in history], label=name)
        right.plot(epochs, [record[f"val_{metric}"] for record in history], label=name)
    for axes, label in ((left, "training loss"), (right, f"validation {metric}")):
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_roc(path: Path, models: Sequence[dict[str, Any]], split: str) -> bool:
    """The ROC curves of all models that have one, a colour a stage, its area in the legend; returns whether any has."""
    from matplotlib.figure import Figure

    drawn = [model for model in models if model.get("roc")]
    if not drawn:
        path.unlink(missing_ok=True)  # of models that are no more
        return False
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for number, stage in enumerate(dict.fromkeys(model["stage"] for model in drawn)):
        group = [model for model in drawn if model["stage"] == stage]
        label = f"{stage}, AUC {spread(*interval([model['metrics']['auc'] for model in group]))}"
        for place, model in enumerate(group):
            false, true = zip(*model["roc"], strict=True)
            axes.plot(false, true, color=f"C{number}", linewidth=1, label=None if place else label)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=split)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)
    return True
