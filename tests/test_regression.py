"""Regression: labels that may enter a shard, metrics against plain formulas, what is said of a teacher."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from test_images import PNG

from kd_dist.errors import DataError, RecipeError
from kd_dist.signals import add_sums
from kd_dist.tasks.regression import Regression

TASK = Regression(("valence", "arousal"))
LABEL = json.dumps({"label": [0.5, -1]}).encode()


def spoken(rows: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What a model says, and the truth, both (rows, 2) float32."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(-1, 1, (rows, 2))
    return (0.7 * truth + 0.1 + rng.normal(0, 0.2, (rows, 2))).astype(np.float32), truth.astype(np.float32)


def concordance(x: np.ndarray, y: np.ndarray) -> float:
    """Lin's own form: Pearson's correlation times what shift and scale leave of it."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return 2 * pearsonr(x, y)[0] * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def measured(*batches: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    metrics = TASK.metrics()
    for said, truth in batches:
        TASK.update(metrics, torch.from_numpy(said), torch.from_numpy(truth), None)
    return {name: float(value) for name, value in metrics.compute().items()}


def test_an_example_and_back():
    members = TASK.encode(PNG, "png", (0.5, -1), {"name": "a"})
    assert members == {"png": PNG, "json": b'{"label":[0.5,-1.0],"metadata":{"name":"a"}}'}
    example = TASK.decode("a", members)
    assert (example.key, example.target.dtype, example.target.tolist()) == ("a", np.float32, [0.5, -1.0])
    assert TASK.replay_target(example.target, None, (5, 5)) is example.target


def test_an_example_without_a_label():
    example = TASK.decode("a", TASK.encode(PNG, "png", None, {}))
    assert np.isnan(example.target).tolist() == np.isnan(TASK.no_target((3, 4))).tolist() == [True, True]
    targets, sizes = TASK.collate([example.target, np.zeros(2, np.float32)])
    assert (targets.dtype, targets.shape, sizes) == (np.float32, (2, 2), None)


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ((0.5,), r"label \(0.5,\) is not one number for each of valence, arousal"),
        (0.5, "label 0.5 is not one number for each of valence, arousal"),
        ("ab", "label 'ab' is not one number for each of valence, arousal"),
        ((0.5, math.nan), "has no label arousal"),
        ((1.01, 0), "label valence = 1.01 is outside -1 to 1, the task's range"),
        ((0.5, "high"), "label arousal = 'high' is no number"),
        ((True, 0), "label valence = True is no number"),
    ],
)
def test_labels_that_are_refused(label, problem):
    with pytest.raises(DataError, match=f"^{problem}$"):
        TASK.encode(PNG, "png", label, {})


def test_an_error_names_the_example():
    with pytest.raises(DataError, match="^example 'a': label valence = 2 is outside -1 to 1, the task's range; "):
        TASK.decode("a", {"png": PNG, "json": b'{"label":[2,0]}'})


@pytest.mark.parametrize(
    ("outputs", "limits", "problem"),
    [((), (-1, 1), "task.outputs: must"), (("a", "a"), (-1, 1), "task.outputs: "), (("a",), (1, 1), "task.range: ")],
)
def test_a_task_that_cannot_be(outputs, limits, problem):
    with pytest.raises(RecipeError, match=f"^{problem}"):
        Regression(outputs, limits)


def test_metrics_are_those_of_plain_formulas():
    said, truth = spoken()
    values = measured((said, truth))
    expected = [concordance(said[:, one], truth[:, one]) for one in range(2)]
    errors = np.abs(said.astype(np.float64) - truth).mean(axis=0)
    assert [values["ccc/valence"], values["ccc/arousal"]] == pytest.approx(expected, rel=1e-9)
    assert [values["mae/valence"], values["mae/arousal"]] == pytest.approx(errors, rel=1e-9)
    assert values["ccc"] == pytest.approx(np.mean(expected), rel=1e-9)
    assert values["mae"] == pytest.approx(np.mean(errors), rel=1e-9)


def test_ccc_is_that_of_all_rows_and_not_a_mean_over_batches():
    said, truth = spoken()
    parts = [(said[start : start + 4], truth[start : start + 4]) for start in range(0, 40, 4)]
    assert measured(*parts)["ccc"] == pytest.approx(measured((said, truth))["ccc"], rel=1e-9)
    assert abs(np.mean([measured(part)["ccc"] for part in parts]) - measured((said, truth))["ccc"]) > 0.02


def test_rows_without_a_label_do_not_count():
    said, truth = spoken()
    longer = np.concatenate([said, said[:5]]), np.concatenate([truth, np.full((5, 2), np.nan, np.float32)])
    assert measured(longer) == measured((said, truth))
    assert math.isnan(measured((said[:3], np.full((3, 2), np.nan, np.float32)))["ccc"])


def test_a_perfect_model_and_a_constant_one():
    _, truth = spoken()
    assert measured((truth, truth))["ccc"] == pytest.approx(1.0) and measured((truth, truth))["mae"] == 0
    assert measured((np.zeros_like(truth), truth))["ccc"] == 0


def test_a_teachers_sums_add_up_to_its_report():
    said, truth = spoken()
    truth[7] = np.nan
    parts = [TASK.teacher_sums(said[a:b], truth[a:b], None) for a, b in ((0, 8), (8, 8), (8, 40))]
    sums = None
    for part in parts:
        sums = add_sums(sums, json.loads(json.dumps(part)))
    report, whole = TASK.teacher_report(sums), TASK.teacher_report(TASK.teacher_sums(said, truth, None))
    assert report == pytest.approx(whole)
    assert (report["rows"], report["labelled"]) == (40, 39)
    assert report["ccc"] == pytest.approx(measured((said, truth))["ccc"])
    errors = ((said - truth) ** 2).mean(axis=1)
    assert report["largest_error"] == pytest.approx(np.nanmax(errors), rel=1e-6)
    first, second = TASK.teacher_sentences(report)
    assert first == f"ccc {report['ccc']:.4f}, mae {report['mae']:.4f} of 39 labelled rows in 40"
    assert second.startswith(f"  ccc / mae by output: valence {report['ccc/valence']:.4f} / ")


def test_a_teacher_of_unlabelled_rows():
    report = TASK.teacher_report(TASK.teacher_sums(*spoken(3)[:1], np.full((3, 2), np.nan, np.float32), None))
    assert report["ccc"] is None and TASK.teacher_sentences(report) == ["3 rows without a label"]


def test_a_picture_is_a_scatter_plot_for_each_output_and_model():
    said, truth = spoken()
    truth[0] = np.nan
    sheet = TASK.picture(None, list(truth), {"teacher": list(said), "student": list(said[::-1]), "third": list(said)})
    assert sheet.dtype == np.uint8 and sheet.shape == (800, 1200, 3)
    changed = TASK.picture(None, list(truth), {"teacher": list(said), "student": list(said), "third": list(said)})
    differs = (sheet != changed).any(axis=2)
    assert differs[:, 420:780].any() and not differs[:, :380].any()


def test_the_parts_of_a_metric():
    values = measured(spoken())
    parts = TASK.table({**values, "mae/arousal": math.nan}, [])
    assert [name for name, _ in parts] == ["ccc", "mae", "ccc/valence", "mae/valence", "ccc/arousal"]
