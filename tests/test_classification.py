"""Classification: what may enter a shard, what comes out of it, and numbers that agree with scikit-learn."""

import io
import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, log_loss

from kd_dist.errors import DataError
from kd_dist.evaluation import numbers
from kd_dist.tasks.classification import BINS, HIGHER_IS_BETTER, Classification, check_label
from kd_dist.views import ImageViews

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
TASK = Classification(3)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PNG = encoded(Image.fromarray(PIXELS))


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("label", [2, 2.0, np.int64(2), np.uint8(2), np.float32(2)])
def test_labels_that_are_class_indices(label):
    index = check_label(label, 3)
    assert index == 2
    assert type(index) is int


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (float("nan"), "label nan is not a whole number"),
        (float("inf"), "label inf is not a whole number"),
        (np.float32("nan"), "label nan is not a whole number"),
        (0.5, "label 0.5 is not a whole number"),
        (True, "label True is not a class index"),
        ("1", "label '1' is not a class index"),
        (None, "label None is not a class index"),
        ([1], "label [1] is not a class index"),
        (3, "label 3 is outside 0..2, the task's 3 classes"),
        (-1, "label -1 is outside 0..2, the task's 3 classes"),
        (1e300, f"label {int(1e300)} is outside 0..2, the task's 3 classes"),
    ],
)
def test_labels_that_are_not(label, sentence):
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}$"):
        check_label(label, 3)


def test_a_numpy_truth_value_is_no_class_index():
    with pytest.raises(DataError, match="is not a class index"):
        check_label(np.bool_(True), 3)


# ------------------------------------------------------------------------------------------------ one example


def test_an_example_through_its_members():
    members = TASK.encode(PNG, "png", 2.0, {"name": "ä/1.png"})
    assert sorted(members) == ["json", "png"]
    assert members["png"] == PNG
    assert json.loads(members["json"]) == {"label": 2, "metadata": {"name": "ä/1.png"}}
    example = TASK.decode("1", members)
    assert (example.key, example.target) == ("1", 2)
    assert np.array_equal(example.image, PIXELS)
    assert TASK.decode("1", {**members, "teacher.npy": b"", "mask.png": b"x"}).target == 2


LABEL = b'{"label":1}'


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({"png": PNG}, "it has no json member, only png"),
        ({"json": LABEL, "npy": b""}, "expected one image, found json, npy"),
        ({"png": PNG, "jpg": PNG, "json": LABEL}, "expected one image, found jpg, json, png"),
        ({"png": PNG, "json": b"[1]"}, "its json member has no 'label'"),
        ({"png": PNG, "json": b'{"class":1}'}, "its json member has no 'label'"),
        ({"png": PNG, "json": b'{"label"'}, "Expecting ':' delimiter"),
        ({"png": PNG, "json": b"\xff"}, "'utf-8' codec can't decode"),
        ({"png": PNG, "json": b'{"label":3}'}, "label 3 is outside 0..2"),
        ({"png": PNG, "json": b'{"label":NaN}'}, "label nan is not a whole number"),
        ({"png": PNG[:60], "json": LABEL}, "the image cannot be decoded"),
    ],
)
def test_an_example_that_cannot_be_used(members, sentence):
    sentence = f"^example 'a/b': {re.escape(sentence)}.*; correct the source and pack again$"
    with pytest.raises(DataError, match=sentence):
        TASK.decode("a/b", members)


@pytest.mark.parametrize(
    ("image", "extension", "label", "sentence"),
    [
        (PNG, "gif", 1, "the extension 'gif' is none of jpg, jpeg, png, bmp, webp, ppm, pgm"),
        (PNG, "png", 3, "label 3 is outside 0..2, the task's 3 classes"),
        (PNG[:60], "png", 1, "the image cannot be decoded"),
        (b"", "png", 1, "the image is of no known format"),
    ],
)
def test_what_may_not_enter_a_shard(image, extension, label, sentence):
    with pytest.raises(DataError, match=f"^{re.escape(sentence)}"):
        TASK.encode(image, extension, label, {})


def test_targets_of_views_and_batches():
    assert TASK.replay_target(2, ImageViews((5, 5)).canonical((5, 5)), (5, 5)) == 2
    targets, sizes = TASK.collate([2, 0])
    assert (targets.dtype, targets.tolist(), sizes) == (np.int64, [2, 0], None)


# ------------------------------------------------------------------------------------------------ numbers


def rows(count: int = 200, classes: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    targets = random.integers(0, classes, count)
    logits = random.normal(size=(count, classes)).astype(np.float32) * 3
    logits[np.arange(count), targets] += 2
    return logits, targets


def measured(logits: np.ndarray, targets: np.ndarray, cuts: list[int]) -> dict[str, float]:
    task = Classification(logits.shape[1])
    collection = task.metrics()
    for part, labels in zip(np.split(logits, cuts), np.split(targets, cuts), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            task.update(collection, torch.from_numpy(part), torch.from_numpy(labels), None)
    return numbers(collection.compute())


def test_metrics_agree_with_scikit_learn():
    logits, targets = rows()
    found = measured(logits, targets, [])
    p = softmax(logits.astype(np.float64), axis=1)
    assert set(found) == set(HIGHER_IS_BETTER)
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, logits.argmax(1)), abs=1e-7)
    assert found["nll"] == pytest.approx(log_loss(targets, p, labels=range(7)), rel=1e-12)
    assert found["ece"] == pytest.approx(calibration_by_hand(p, targets), rel=1e-12)


def calibration_by_hand(p: np.ndarray, targets: np.ndarray) -> float:
    """Guo et al. 2017, bin by bin: ((m - 1) / 15, m / 15]."""
    top, right, total = p.max(1), p.argmax(1) == targets, 0.0
    for m in range(1, BINS + 1):
        inside = (top > (m - 1) / BINS) & (top <= m / BINS)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - top[inside].mean())
    return total / len(p)


@pytest.mark.parametrize(("classes", "scale"), [(2, 1.0), (2, 30.0), (7, 0.1), (7, 10.0)])
def test_the_calibration_error_is_the_sum_over_bins(classes, scale):
    logits, targets = rows(classes=classes)
    logits = (logits * scale).astype(np.float32)
    p = softmax(logits.astype(np.float64), axis=1)
    assert measured(logits, targets, [])["ece"] == pytest.approx(calibration_by_hand(p, targets), rel=1e-12)


def test_calibration_errors_that_can_be_read_off():
    """One bin's distance does not make up for another's: 0.59 lies in (8/15, 9/15], 0.61 above it; 1 in the last."""
    sure = np.array([[50, 0], [50, 0], [0, 50], [0, 50]], np.float32)
    assert measured(sure, np.array([0, 0, 1, 1]), [])["ece"] == pytest.approx(0, abs=1e-15)
    assert measured(sure, np.array([0, 0, 0, 0]), [])["ece"] == pytest.approx(0.5)
    edge = np.log(np.array([[0.59, 0.41], [0.61, 0.39]])).astype(np.float32)
    assert measured(edge, np.array([0, 1]), [])["ece"] == pytest.approx((0.41 + 0.61) / 2, abs=1e-6)
    assert measured(np.zeros((4, 2), np.float32), np.array([0, 0, 0, 1]), [])["ece"] == 0.25


def test_accuracy_is_over_examples_and_not_over_classes():
    logits, targets = np.eye(3, dtype=np.float32)[[0, 0, 0, 0]], np.array([0, 0, 0, 2])
    assert measured(logits, targets, [])["accuracy"] == 0.75


@pytest.mark.parametrize("cuts", [[1], [50, 100, 150], [3, 199], list(range(1, 200))])
def test_metrics_do_not_depend_on_the_batches(cuts):
    logits, targets = rows()
    whole, parts = measured(logits, targets, []), measured(logits, targets, cuts)
    assert parts["accuracy"] == whole["accuracy"]
    assert parts["nll"] == pytest.approx(whole["nll"], rel=1e-13)


def test_nll_is_summed_in_double_precision():
    logits, targets = np.zeros((1, 2), np.float32), np.zeros(1, np.int64)
    nll = Classification(2).metrics()["nll"]
    nll.total += 2**24  # one more nat would be lost in float32
    nll.update(torch.from_numpy(logits), torch.from_numpy(targets))
    assert float(nll.total) - 2**24 == pytest.approx(np.log(2), abs=1e-8)


def said(logits: np.ndarray, targets: np.ndarray) -> dict:
    task = Classification(logits.shape[1])
    return task.teacher_report(task.teacher_sums(logits, targets, None))


def test_what_a_teacher_said():
    logits, targets = rows(count=300, classes=5)
    logits[:30] *= 20
    p = softmax(logits.astype(np.float64), axis=1)
    log_p = log_softmax(logits.astype(np.float64), axis=1)  # log_loss would clip what is below 2e-16
    report = said(logits, targets)
    assert report["rows"] == 300
    assert report["accuracy"] == accuracy_score(targets, logits.argmax(1))
    assert report["nll"] == pytest.approx(-log_p[np.arange(300), targets].mean(), rel=1e-9)
    assert report["entropy"] == pytest.approx(entropy(p, axis=1).mean(), rel=1e-9)
    assert report["saturated"] == (p.max(1) > 0.99).mean() > 0
    assert report["labelled_per_class"] == np.bincount(targets, minlength=5).tolist()
    assert report["predicted_per_class"] == np.bincount(logits.argmax(1), minlength=5).tolist()
    json.dumps(report, allow_nan=False)


def test_a_teachers_sums_add_up():
    logits, targets = rows(count=100, classes=5)
    whole, one, two = (
        Classification(5).teacher_sums(logits[cut], targets[cut], None)
        for cut in (slice(None), slice(0, 33), slice(33, None))
    )
    for name in ("rows", "right", "saturated"):
        assert one[name] + two[name] == whole[name]
    for name in ("nll", "entropy"):
        assert one[name] + two[name] == pytest.approx(whole[name], rel=1e-12)
    for name in ("labelled_per_class", "predicted_per_class"):
        assert np.add(one[name], two[name]).tolist() == whole[name]


def test_a_teacher_beyond_doubt_and_a_teacher_that_said_nothing():
    sure = said(np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32), np.array([0, 0]))
    assert (sure["entropy"], sure["saturated"], sure["accuracy"], sure["nll"]) == (0.0, 1.0, 0.5, 1e4)
    silent = said(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    assert (silent["rows"], silent["accuracy"], silent["predicted_per_class"]) == (0, 0.0, [0, 0, 0])


def test_a_teachers_report_in_words():
    logits, targets = rows(count=1200, classes=2)
    first, second = TASK.teacher_sentences(report := said(logits, targets))
    assert first == (
        f"accuracy {report['accuracy']:.4f}, nll {report['nll']:.4f}, entropy {report['entropy']:.4f} nat, "
        f"saturated {100 * report['saturated']:.1f}% of 1,200 rows"
    )
    assert second.startswith("  rows per class, labelled / predicted: [") and second.count("[") == 2
    *_, warning = TASK.teacher_sentences(said(logits * 1e4, targets))
    assert warning.startswith("warning: the teacher's mean entropy is 0.00")


def test_nothing_is_drawn_or_told_by_class():
    assert TASK.picture(np.zeros((1, 4, 4, 3), np.uint8), [1], {}) is None
    assert TASK.table({"accuracy": 1.0, "iou/0": 1.0}, ["a", "b", "c"]) == []
