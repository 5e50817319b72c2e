"""What a recipe came to: one table and one picture, from the results that its stages left behind."""

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from kd_dist.checkpoint import write_atomic
from kd_dist.models import Network
from kd_dist.tasks import retention

ROLES = ("teacher", "student_alone", "student_kd")
LATENCY_RUNS, LATENCY_SECONDS = 30, 10.0  # as many, or what fits into that time, but at least 3


def measure(network: Network, size: tuple[int, int]) -> dict[str, Any]:
    """Parameters, multiply-accumulates of one image, and the median latency in ms of one image on one CPU thread."""
    network = network.cpu().eval()
    image = torch.zeros(1, network.channels, *size, dtype=torch.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            with FlopCounterMode(display=False) as counter:
                network(image)
            seconds = []
            while len(seconds) < (LATENCY_RUNS if sum(seconds) < LATENCY_SECONDS else 3):
                start = time.perf_counter()
                network(image)
                seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return {
        "parameters": sum(value.numel() for value in network.parameters()),
        "macs": counter.get_total_flops() // 2,
        "latency_ms": statistics.median(seconds) * 1e3,
    }


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half-width of its 95 % confidence interval (Student's t); None for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def summarise(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a stage, over its seeds, in the order of first appearance; retention is against the mean teacher.

    `parts` of a model are what its metric is made of, such as each class's IoU, as (name, value); those of a row
    are (name, mean, interval).
    """
    stages = list(dict.fromkeys((model["role"], model["stage"]) for model in models))
    rows = []
    for role, stage in sorted(stages, key=lambda one: ROLES.index(one[0])):
        group = [model for model in models if model["stage"] == stage]
        mean, half = interval([model["value"] for model in group])
        latency = statistics.median(model["latency_ms"] for model in group)
        same = {name: group[0][name] for name in ("name", "metric", "parameters", "macs")}
        rows.append({"role": role, "stage": stage, **same, "seeds": len(group), "mean": mean, "interval": half})
        rows[-1]["latency_ms"] = latency
        parts = list(dict.fromkeys(part for model in group for part, _ in model["parts"]))
        values = {part: [value for model in group for name, value in model["parts"] if name == part] for part in parts}
        rows[-1]["parts"] = [(part, *interval(values[part])) for part in parts]
    teachers = [row["mean"] for row in rows if row["role"] == "teacher"]
    for row in rows:
        row["retention"] = retention(row["metric"], row["mean"], statistics.fmean(teachers)) if teachers else None
    return rows


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


def spread(mean: float, half: float | None) -> str:
    """A mean and its interval as a table shows them."""
    return f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}")


def cells(row: dict[str, Any]) -> list[str]:
    """A summary row as a table shows it."""
    value = spread(row["mean"], row["interval"])
    kept = "" if row["retention"] is None else f"{row['retention']:.1%}"
    label = row["role"].replace("_kd", " + KD").replace("_", " ")
    size, macs = f"{row['parameters'] / 1e6:.3f} M", f"{row['macs'] / 1e6:.2f} M"
    return [label, row["name"], row["stage"], str(row["seeds"]), value, size, macs, f"{row['latency_ms']:.2f}", kept]


def headings(metric: str) -> list[str]:
    return ["role", "model", "stage", "seeds", metric, "parameters", "MACs", "latency ms", "retention"]


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The summary for a terminal."""
    shown = Table(title=title)
    for heading in headings(rows[0]["metric"] if rows else "metric"):
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def markdown(
    rows: Sequence[dict[str, Any]], differences: Sequence[dict[str, Any]], title: str, split: str, pictured: bool
) -> str:
    """The table and the gains as a page; the pictures lie beside it."""
    names = headings(rows[0]["metric"])
    lines = [f"# {title}", "", f"Measured on the `{split}` split; latency is one example on one CPU thread.", ""]
    lines += ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += ["", *(gain_sentence(one, rows[0]["metric"]) for one in differences)]
    lines += part_lines(rows)
    lines += ["", "![curves](curves.png)", *(["", "![examples](examples.png)"] if pictured else [])]
    return "\n".join([*lines, ""])


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
    """Write `report.json`, `report.md`, `curves.png` and the picture of some `examples`, if any; return the summary.

    `histories`: epoch records by run; `examples`: (height, width, 3) uint8.
    """
    rows, differences = summarise(models), gains(models)
    content = {"split": split, "models": models, "summary": rows, "gains": differences}
    write_atomic(folder / "report.json", json.dumps(content, indent=1, sort_keys=True))
    write_atomic(folder / "report.md", markdown(rows, differences, title, split, examples is not None))
    if examples is not None:
        Image.fromarray(examples).save(folder / "examples.png")
    plot(folder / "curves.png", histories, rows[0]["metric"])
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
