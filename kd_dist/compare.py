"""Teacher and students side by side: every metric, what each model takes, and what is kept of the teacher."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kd_dist.checkpoint import write_atomic
from kd_dist.report import COST, cost, measured_on, plot_roc, role_in_words, spread, summarise
from kd_dist.tasks import METRICS


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Summary rows turned on their side: a line a quantity, its name and then a cell for each stage. The first line
    has the stages. A student's metric has its retention in brackets."""
    found = [["", *(row["stage"] for row in rows)]]
    found.append(["role", *map(role_in_words, rows)])
    found.append(["model", *(row["name"] for row in rows)])
    found.append(["seeds", *(str(row["seeds"]) for row in rows)])
    for metric in rows[0]["metrics"]:
        name = metric if METRICS[metric] else f"{metric} (lower is better)"
        found.append([name, *(cell(row["metrics"][metric], row["role"]) for row in rows)])
    found += [[name, *values] for name, *values in zip(COST, *map(cost, rows), strict=True)]
    return found


def cell(one: dict[str, Any], role: str) -> str:
    """A metric with its interval and what it keeps of the teacher's."""
    kept = "" if one["retention"] is None or role == "teacher" else f" [{one['retention']:.1%}]"
    return spread(one["mean"], one["interval"]) + kept


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The comparison for a terminal."""
    first, *others = lines(rows)
    shown = Table(title=title)
    for heading in first:
        shown.add_column(heading, overflow="fold")
    for line in others:
        shown.add_row(*(one.replace("[", "\\[") for one in line))  # else rich takes brackets for a style
    return shown


def markdown(rows: Sequence[dict[str, Any]], title: str, split: str, pictured: bool) -> str:
    """The comparison as a page; the ROC curves, if any, lie beside it."""
    first, *others = lines(rows)
    page = [f"# {title}", "", f"{measured_on(split)} In brackets: the share of the teacher's metric that is kept.", ""]
    page += ["| " + " | ".join(first) + " |", "|" + " --- |" * len(first)]
    page += ["| " + " | ".join(line) + " |" for line in others]
    page += ["", f"![roc-{split}](roc-{split}.png)"] if pictured else []
    return "\n".join([*page, ""])


def write(folder: Path, title: str, split: str, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Write `compare.json`, `compare.md` and, of two classes, `roc-<split>.png`; return what the JSON holds."""
    rows = summarise(models)
    content = {"split": split, "models": models, "summary": rows}
    pictured = plot_roc(folder / f"roc-{split}.png", models, split)
    write_atomic(folder / "compare.json", json.dumps(content, indent=1, sort_keys=True))
    write_atomic(folder / "compare.md", markdown(rows, title, split, pictured))
    return content
