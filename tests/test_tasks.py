"""The table of tasks: each is a value with the same interface, and every metric has a direction."""

import inspect
import math

import numpy as np
import pytest
import torch

from kd_dist.evaluation import numbers
from kd_dist.inputs.images import Images
from kd_dist.inputs.spectrograms import LogMel, Spectrograms
from kd_dist.tasks import (
    METRICS,
    TASKS,
    Classification,
    Regression,
    Segmentation,
    is_better,
    metrics_of,
    packed_for,
    retention,
    undefined,
)

MADE = {
    "classification": Classification(3),
    "segmentation": Segmentation(3),
    "regression": Regression(("valence", "arousal", "dominance")),
}


def interface(task: type) -> dict[str, list[str]]:
    """The parameters' names of every public method."""
    found = inspect.getmembers(task, inspect.isfunction)
    return {name: list(inspect.signature(one).parameters) for name, one in found if name[0] != "_"}


def test_every_task_has_the_same_interface():
    assert set(TASKS) == {"classification", "segmentation", "regression"}
    first, *others = (interface(task) for task in TASKS.values())
    assert len(first) == 12
    assert all(other == first for other in others)
    for name, task in TASKS.items():
        one = MADE[name]
        assert (task.name, one.classes) == (name, 3) and isinstance(one, task)
        assert isinstance(task.maps, bool) and isinstance(task.canonical_whole, bool) and task.shown >= 0
        assert one.input == Images()


def test_every_metric_of_a_task_is_measured_and_has_a_direction():
    logits = {**dict.fromkeys(TASKS, torch.eye(3)), "segmentation": torch.eye(3)[:, :, None, None]}
    targets = {"classification": torch.tensor([0, 1, 1]), "segmentation": torch.tensor([0, 1, 1]).byte().view(3, 1, 1)}
    targets["regression"] = torch.eye(3) / 2
    logits["classification"], targets["classification"] = torch.eye(3)[:, :2], torch.tensor([0, 1, 1])
    for name, task in {**MADE, "classification": Classification(2)}.items():
        groups = torch.tensor([[1, 1], [2, 2], [3, 3]])
        sizes = torch.ones(3, 2, dtype=torch.int64)
        metrics = task.metrics()
        task.update(metrics, logits[name], targets[name], sizes if task.maps else None, groups)
        measured = numbers(metrics.compute())
        assert {metric for metric in measured if "/" not in metric} == set(task.metrics_known) <= set(METRICS)
        assert all(np.isfinite(measured[metric]) for metric in task.metrics_known)
    assert [kind.metrics_known[0] for kind in TASKS.values()] == ["accuracy", "miou", "ccc"]
    assert len(METRICS) == sum(len(kind.metrics_known) for kind in TASKS.values()) == 10


@pytest.mark.parametrize(
    ("metric", "student", "teacher", "kept"),
    [
        ("accuracy", 0.72, 0.9, 0.8),
        ("accuracy", 0.95, 0.5, 1.9),
        ("accuracy", 0.5, 0.0, None),
        ("nll", 0.5, 0.4, 0.8),
        ("nll", 0.2, 0.4, 2.0),
        ("nll", 0.0, 0.4, None),
        ("miou", 0.6, 0.8, 0.75),
        ("ccc", 0.6, 0.8, 0.75),
        ("mae", 0.4, 0.2, 0.5),
        ("auc", 0.8, 1.0, 0.8),
        ("video_auc", 0.8, 1.0, 0.8),
        ("eer", 0.4, 0.1, 0.25),
        ("eer", 0.1, 0.0, None),
        ("eer", 0.0, 0.0, None),
        ("ece", 0.2, 0.1, 0.5),
    ],
)
def test_retention_is_one_when_all_is_kept_and_less_when_not(metric, student, teacher, kept):
    assert retention(metric, student, teacher) == (None if kept is None else pytest.approx(kept))
    assert retention(metric, 0.3, 0.3) == 1.0


@pytest.mark.parametrize(
    ("metric", "value", "best", "better"),
    [
        ("accuracy", 0.5, None, True),
        ("accuracy", 0.5, 0.4, True),
        ("accuracy", 0.4, 0.4, False),
        ("nll", 0.3, 0.4, True),
        ("nll", 0.5, 0.4, False),
        ("nll", math.nan, 0.4, False),
        ("accuracy", math.nan, 0.4, False),
        ("nll", 0.4, math.nan, True),
        ("miou", 0.5, 0.4, True),
        ("pixel_accuracy", 0.4, 0.5, False),
        ("auc", 0.6, 0.5, True),
        ("eer", 0.6, 0.5, False),
        ("ece", 0.4, 0.5, True),
        ("auc", math.nan, 0.5, False),
    ],
)
def test_what_counts_as_better(metric, value, best, better):
    assert is_better(metric, value, best) is better


def test_what_a_manifest_says_of_a_task():
    assert packed_for(Classification(3)) == {"task": "classification", "classes": 3}
    about = packed_for(Regression(("valence",), (0, 5), Spectrograms(LogMel(mels=64), 2.0)))
    assert {name: about[name] for name in ("task", "classes", "outputs", "range")} == {
        "task": "regression",
        "classes": 1,
        "outputs": ["valence"],
        "range": [0, 5],
    }
    assert about["input"]["mels"] == 64 and about["input"]["shortest"] == 2.0 and about["input"]["db"] == [-60.0, 40.0]


def test_two_classes_have_metrics_of_their_own():
    assert metrics_of("classification", 2) == ("accuracy", "nll", "ece", "auc", "eer", "video_auc")
    assert metrics_of("classification", 3) == ("accuracy", "nll", "ece")
    assert metrics_of("segmentation", 2) == metrics_of("segmentation", 9) == ("miou", "pixel_accuracy")
    assert metrics_of("regression", None) == ("ccc", "mae")


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("ccc", "label its examples"),
        ("auc", "give it examples of both classes"),
        ("video_auc", "give it videos of both classes, named by its source"),
    ],
)
def test_a_metric_without_a_value_is_one_sentence(metric, remedy):
    assert undefined(metric, "a/val") == f"a/val: {metric} is undefined there; {remedy}, or choose another"
