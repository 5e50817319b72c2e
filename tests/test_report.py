"""The numbers of a report, and the page, table and picture that show them."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats

from kd_dist.report import (
    gain_sentence,
    gains,
    headings,
    interval,
    markdown,
    metrics_table,
    plot_roc,
    summarise,
    table,
    write,
)


def row(role: str, stage: str, seed: int, value: float, metric: str = "accuracy", **other) -> dict:
    about = {"role": role, "stage": stage, "seed": seed, "metric": metric, "value": value, "parts": []}
    cost = {"name": f"timm/{role}", "parameters": 1000, "macs": 2000, "latency_ms": 1.5, "memory_mb": 0.25}
    return {**about, "metrics": {metric: value}, **cost, **other}


THREE = [
    row("student_kd", "distill", 0, 0.84),
    row("student_kd", "distill", 1, 0.86),
    row("student_kd", "distill", 2, 0.80, latency_ms=9.0),
    row("student_alone", "pretrain", 0, 0.80),
    row("student_alone", "pretrain", 1, 0.83),
    row("student_alone", "pretrain", 2, 0.77),
    row("teacher", "teacher", 0, 0.90),
]


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("values", [[0.8, 0.9], [0.71, 0.74, 0.69], [1.0, 1.0, 1.0], np.arange(30.0).tolist()])
def test_the_interval_agrees_with_scipy(values):
    mean, half = interval(values)
    error = stats.sem(values)
    assert mean == pytest.approx(np.mean(values))
    if error == 0:
        assert half == 0
    else:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
        assert (mean - half, mean + half) == pytest.approx((low, high))


def test_one_value_has_no_interval():
    assert interval([0.5]) == (0.5, None)


def test_the_interval_holds_the_truth_in_19_of_20_cases():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(4000):
        mean, half = interval(random.normal(size=3).tolist())
        held += abs(mean) <= half
    assert 0.94 < held / 4000 < 0.96


def test_a_summary_has_a_row_for_each_stage_teacher_first():
    rows = summarise(THREE)
    assert [(one["role"], one["stage"], one["seeds"]) for one in rows] == [
        ("teacher", "teacher", 1),
        ("student_alone", "pretrain", 3),
        ("student_kd", "distill", 3),
    ]
    assert [one["mean"] for one in rows] == pytest.approx([0.9, 0.8, 2.5 / 3])
    assert [one["interval"] is None for one in rows] == [True, False, False]
    assert rows[2]["interval"] == pytest.approx(interval([0.84, 0.86, 0.80])[1])
    assert rows[2]["latency_ms"] == 1.5  # the median over the seeds
    assert [one["retention"] for one in rows] == pytest.approx([1.0, 0.8 / 0.9, 2.5 / 3 / 0.9])


def test_stages_of_a_role_keep_their_order():
    models = [row("student_kd", name, 0, 0.5) for name in ("z", "a", "m")]
    assert [one["stage"] for one in summarise(models)] == ["z", "a", "m"]


def test_retention_of_nll_is_the_teachers_share():
    models = [row("teacher", "teacher", 0, 0.2, "nll"), row("student_kd", "distill", 0, 0.25, "nll")]
    assert [one["retention"] for one in summarise(models)] == pytest.approx([1.0, 0.8])


def test_without_a_teacher_nothing_is_retained():
    assert [one["retention"] for one in summarise(THREE[:6])] == [None, None]


def test_gains_are_over_the_same_seeds():
    [gain] = gains(THREE)
    mean, half = interval([0.04, 0.03, 0.03])
    assert (gain["stage"], gain["against"], gain["seeds"]) == ("distill", "pretrain", 3)
    assert (gain["mean"], gain["interval"]) == (pytest.approx(mean), pytest.approx(half))
    [less] = gains([*THREE[:1], *THREE[3:6]])
    assert (less["seeds"], less["mean"], less["interval"]) == (1, pytest.approx(0.04), None)


def test_gains_of_every_pair_and_of_none():
    models = [row("student_kd", name, 0, 0.5) for name in ("a", "b")]
    models += [row("student_alone", name, 0, 0.25) for name in ("c", "d", "e")]
    assert [(one["stage"], one["against"]) for one in gains(models)] == [
        ("a", "c"), ("a", "d"), ("a", "e"), ("b", "c"), ("b", "d"), ("b", "e"),
    ]  # fmt: skip
    assert {one["mean"] for one in gains(models)} == {0.25}
    assert gains(models[:2]) == gains(models[2:]) == gains([]) == []
    assert gains([row("student_kd", "a", 0, 0.5), row("student_alone", "c", 1, 0.25)]) == []  # no seed in common


def test_a_gain_in_words():
    [gain] = gains(THREE)
    words = gain_sentence(gain, "accuracy")
    assert words == "`distill` against `pretrain`: +0.0333 accuracy (± 0.0143, 95 % over 3 seeds)."
    worse = {**gain, "mean": -0.01, "interval": None}
    assert gain_sentence(worse, "nll") == "`distill` against `pretrain`: -0.0100 nll (one seed)."
    for steps, said in (([9, 9], "9 steps"), ([9, 8], "9 steps against 8")):
        twin = gain_sentence({**worse, "generated": True, "steps": steps}, "nll")
        assert twin == f"`distill` against `pretrain`, which has no generated examples, {said}: -0.0100 nll (one seed)."


def two(seed: int, auc: float | None, nll: float, **other) -> dict:
    metrics = {"accuracy": 0.5, "nll": nll, "auc": auc}
    return row("student_kd", "distill", seed, 0.5, metrics=metrics, **other)


def test_every_metric_has_an_interval_and_a_retention():
    teacher = row("teacher", "teacher", 0, 0.9, metrics={"accuracy": 0.9, "nll": 0.2, "auc": 0.96})
    [taught, found] = summarise([teacher, two(0, 0.7, 0.5), two(1, 0.74, 0.3)])
    assert taught["metrics"]["auc"] == {"mean": 0.96, "interval": None, "retention": 1.0}
    mean, half = interval([0.7, 0.74])
    assert found["metrics"]["auc"] == {"mean": mean, "interval": half, "retention": pytest.approx(0.72 / 0.96)}
    assert found["metrics"]["nll"]["retention"] == pytest.approx(0.5)  # the teacher's is half of it
    assert found["retention"] == pytest.approx(0.5 / 0.9) == found["metrics"]["accuracy"]["retention"]


def test_a_student_is_held_to_the_teachers_that_it_listens_to():
    """Those of no stage beside the first one; a student alone, and one of the first, is held to the first."""
    teachers = [row("teacher", "teacher", 0, 0.8)]
    teachers += [row("teacher", stage, 0, value, further=True) for stage, value in (("wide", 0.6), ("both", 0.9))]
    students = [row("student_alone", "pretrain", 0, 0.6), row("student_kd", "first", 0, 0.6, taught_by=None)]
    students += [row("student_kd", name, 0, 0.6, taught_by=name[2:]) for name in ("byboth", "bywide", "bylost")]
    found = {one["stage"]: one for one in summarise([*teachers, *students])}
    kept = {"pretrain": 0.75, "first": 0.75, "byboth": 0.6 / 0.9, "bywide": 1.0}
    for stage, value in kept.items():
        assert found[stage]["retention"] == found[stage]["metrics"]["accuracy"]["retention"] == pytest.approx(value)
    assert found["bylost"]["retention"] is None and found["teacher"]["retention"] == 1
    assert list(found)[:3] == ["teacher", "wide", "both"]


def test_a_metric_that_a_seed_has_not_has_no_mean():
    teacher = row("teacher", "teacher", 0, 0.9, metrics={"accuracy": 0.9, "nll": 0.2, "auc": None})
    for rows in ([teacher, two(0, 0.7, 0.5)], [two(0, None, 0.5), two(1, 0.7, 0.5)], [two(0, 0.7, 0.5)]):
        assert summarise(rows)[-1]["metrics"]["auc"]["retention"] is None
    assert summarise([two(0, None, 0.5), two(1, 0.7, 0.5)])[0]["metrics"]["auc"]["mean"] is None


def test_the_table_of_all_metrics_has_a_row_a_stage():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(metrics_table(summarise([two(0, None, 0.5), two(1, 0.7, 0.25)])))
    lines = [re.split(r" *[│┃] *", line.strip("│┃ ")) for line in console.export_text().splitlines() if "│" in line]
    assert lines == [["distill", "0.5000 ± 0.0000", f"0.3750 ± {interval([0.5, 0.25])[1]:.4f}", "-"]]


def test_parts_have_intervals_too():
    models = [
        {**row("student_kd", "a", seed, value), "parts": [("mae", value / 2)]} for seed, value in enumerate((0.4, 0.6))
    ]
    [found] = summarise(models)
    assert found["parts"] == [("mae", *interval([0.2, 0.3]))]
    assert f"| mae | 0.2500 ± {interval([0.2, 0.3])[1]:.4f} |" in markdown([found], [], "x", "test", [])


# ------------------------------------------------------------------------------------------------ what is shown


def test_the_page_holds_every_row_and_gain():
    page = markdown(summarise(THREE), gains(THREE), "pets", "test", ["curves"])
    lines = page.splitlines()
    assert lines[0] == "# pets"
    assert "Measured on the `test` split" in page
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len(cells) == 2 + 3
    assert {len(line) for line in cells} == {len(headings("accuracy"))}
    distill = dict(zip(cells[0], cells[4], strict=True))
    assert distill["accuracy"] == "0.8333 ± 0.0759"
    assert "92.6%" in distill.values() and "distill" in " ".join(distill.values())
    assert "0.9000" in cells[2] and "100.0%" in cells[2]
    assert gain_sentence(gains(THREE)[0], "accuracy") in lines
    assert "![curves](curves.png)" in lines


def test_the_table_shows_what_the_page_shows():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(summarise(THREE), "pets"))
    shown = console.export_text()
    assert re.search(r"distill.*0\.8333 ± 0\.0759.*92\.6%", shown)
    assert all(heading in shown for heading in headings("accuracy"))


def test_what_is_written(tmp_path):
    history = [{"step": 5 * (n + 1), "loss": 1 / (n + 1), "val_accuracy": n / 3} for n in range(3)]
    histories = {"pretrain seed-0": history, "distill seed-0": history[:1], "teacher seed-0": history}
    rows = write(tmp_path, "pets", "test", THREE, histories, None)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content == {"split": "test", "models": THREE, "summary": rows, "gains": gains(THREE)}
    assert rows == summarise(THREE)
    assert (tmp_path / "report.md").read_text() == markdown(rows, gains(THREE), "pets", "test", ["curves"])
    curves = Image.open(tmp_path / "curves.png")
    assert curves.size == (1200, 480)
    assert len(np.unique(np.asarray(curves.convert("L")))) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "report.json", "report.md"]


CURVES = {"roc": [[0.0, 0.0], [0.2, 0.7], [1.0, 1.0]]}


def test_curves_of_two_classes_are_drawn(tmp_path):
    pictures = []
    for height in (0.7, 0.9):
        models = [two(0, 0.7, 0.5, roc=[[0.0, 0.0], [0.2, height], [1.0, 1.0]]), two(1, 0.8, 0.5, **CURVES)]
        history = {"distill seed-0": [{"step": 5, "loss": 0.5, "val_accuracy": 0.3}]}
        write(tmp_path, "pets", "test", models, history, None)
        pictures.append(np.asarray(Image.open(tmp_path / "roc-test.png").convert("L")))
    assert pictures[0].shape == (600, 600) and not np.array_equal(*pictures)
    assert "![roc-test](roc-test.png)" in (tmp_path / "report.md").read_text().splitlines()


def test_without_a_curve_there_is_no_picture(tmp_path):
    assert plot_roc(tmp_path / "roc-test.png", [two(0, None, 0.5), *THREE], "test") is False
    assert not list(tmp_path.iterdir())
    assert plot_roc(tmp_path / "roc-test.png", [two(0, 0.7, 0.5, **CURVES), *THREE], "test") is True


def test_the_picture_shows_the_histories(tmp_path):
    pictures = []
    for value in (0.2, 0.9):
        history = [{"step": 5, "loss": value, "val_nll": 0.3}, {"step": 10, "loss": 0.1, "val_nll": value}]
        models = [row("teacher", "teacher", 0, 0.5, "nll")]
        write(tmp_path, "pets", "test", models, {"teacher seed-0": history}, None)
        pictures.append(np.asarray(Image.open(tmp_path / "curves.png").convert("L")))
    half = pictures[0].shape[1] // 2
    assert not np.array_equal(pictures[0][:, :half], pictures[1][:, :half])
    assert not np.array_equal(pictures[0][:, half:], pictures[1][:, half:])
