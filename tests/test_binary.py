"""Metrics of two classes: equal to scikit-learn's and to what counting by hand gives, on any number of processes."""

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import done, ranks
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score, roc_curve

from kd_dist.tasks import Classification
from kd_dist.tasks.binary import POINTS, Ranking

TASK = Classification(2)


def logits_of(margins: np.ndarray) -> torch.Tensor:
    """Logits (B, 2) float32 with these margins, which are exact where float32 has them."""
    return torch.tensor(np.stack([np.zeros(len(margins)), margins], axis=1), dtype=torch.float32)


def ranked(margins, labels, groups=None) -> dict[str, torch.Tensor]:
    metric = Ranking()
    given = None if groups is None else torch.tensor(groups)
    metric.update(logits_of(np.asarray(margins, np.float64)), torch.tensor(labels), given)
    return metric.compute()


def drawn(seed: int, rows: int = 60, step: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Margins in whole steps, so that many are equal, higher for class 1; and labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, rows)
    labels[:2] = 0, 1
    return np.round((random.normal(size=rows) + labels) / step) * step, labels


def pairs_won(margins: np.ndarray, labels: np.ndarray) -> float:
    """AUC by its definition: every positive against every negative, half for a tie."""
    pairs = list(itertools.product(margins[labels == 1], margins[labels == 0]))
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs)


def where_rates_meet(margins: np.ndarray, labels: np.ndarray) -> float:
    """The equal error rate by scikit-learn's curve: where the line from (0, 1) to (1, 0) cuts it."""
    false, true, _ = roc_curve(labels, margins, drop_intermediate=False)
    along = np.arange(len(false), dtype=float)
    place = brentq(lambda x: interp1d(along, false + true)(x) - 1, 0, along[-1], xtol=1e-14)
    return float(interp1d(along, false)(place))


CASES = {
    "few ties": drawn(0, step=1e-3),
    "many ties": drawn(1),
    "all equal": (np.zeros(7), np.array([0, 1, 1, 0, 1, 1, 1])),
    "apart": (np.array([-3.0, -2, 1, 5]), np.array([0, 0, 1, 1])),
    "upside down": (np.array([3.0, 2, -1, -5]), np.array([0, 0, 1, 1])),
    "one of each": (np.array([1.0, 2.0]), np.array([1, 0])),
    "far out": (np.array([40.0, 50, -1e4, 1e4, 40, 50, 1e4, -1e4]), np.array([0, 1, 0, 1, 0, 1, 0, 1])),
    "far out and mixed": (np.array([50.0, 40, 1e4, 9e3, -40, -50]), np.array([1, 0, 0, 1, 1, 0])),
    "uneven": (np.arange(50.0) % 7, np.arange(50) % 10 == 3),
}


@pytest.mark.parametrize("name", CASES)
def test_auc_and_eer_agree_with_scikit_learn_and_with_counting(name):
    margins, labels = CASES[name][0], CASES[name][1].astype(int)
    found = ranked(margins, labels)
    assert float(found["auc"]) == pytest.approx(roc_auc_score(labels, margins), rel=1e-14)
    assert float(found["auc"]) == pytest.approx(pairs_won(margins, labels), rel=1e-14)
    assert float(found["eer"]) == pytest.approx(where_rates_meet(margins, labels), abs=1e-12)
    assert found["auc"].dtype == found["eer"].dtype == torch.float64


def test_equal_error_rates_that_can_be_read_off():
    """3 of 4 and 1 of 4: a corner of the curve. Then the line between (0, 0) and (1, 1), and one between corners."""
    assert float(ranked([4.0, 3, 2, 1, 0, -1, -2, -3], [1, 1, 1, 0, 1, 0, 0, 0])["eer"]) == 0.25
    assert float(ranked([0.0, 0, 0, 0], [0, 1, 1, 1])["eer"]) == 0.5
    # (0, 0), (0, 1/2), (1, 1): the second stretch, y = (1 + x) / 2, meets y = 1 - x at x = 1/3.
    assert float(ranked([2.0, 1, 1], [1, 1, 0])["eer"]) == pytest.approx(1 / 3, rel=1e-15)


def test_margins_far_out_are_no_tie():
    """A sigmoid, of float32 from 17 on and of float64 from 37 on, is 1 for all of them."""
    assert float(ranked([40.0, 50.0], [0, 1])["auc"]) == 1.0
    assert float(ranked([50.0, 40.0], [0, 1])["auc"]) == 0.0
    assert float(ranked([1e4, 1e4 + 1e-3], [0, 1])["auc"]) == 1.0  # float32 can tell these apart
    # Differences that float32 knows to 1e-3 only: in float64 they are exact.
    metric = Ranking()
    metric.update(torch.tensor([[-1e4, 1.0], [-1e4, 1.0001]]), torch.tensor([0, 1]))
    assert float(metric.compute()["auc"]) == 1.0


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_a_missing_class_leaves_no_number(labels):
    found = ranked([1.0, 2.0, 2.0], labels, [[5, 1], [6, 1], [7, 1]])
    assert all(math.isnan(found[name]) for name in ("auc", "eer", "video_auc")) and "roc" not in found


def test_a_score_that_is_no_number_leaves_no_number():
    found = ranked([1.0, math.nan, 2.0], [0, 1, 1], [[5, 1], [6, 1], [7, 1]])
    assert all(math.isnan(found[name]) for name in ("auc", "eer", "video_auc"))


def test_rows_given_twice_change_nothing():
    margins, labels = CASES["many ties"]
    once, twice = ranked(margins, labels), ranked(np.tile(margins, 2), np.tile(labels, 2))
    for name in ("auc", "eer"):
        assert float(once[name]) == float(twice[name])
    assert torch.equal(once["roc"], twice["roc"])


# ------------------------------------------------------------------------------------------------ the curve


def test_a_short_curve_is_scikit_learns():
    margins, labels = CASES["many ties"]
    false, true, _ = roc_curve(labels, margins, drop_intermediate=False)
    roc = ranked(margins, labels)["roc"].numpy()
    assert {tuple(point) for point in roc} <= set(zip(false, true, strict=True)) and len(roc) < len(false)
    assert np.interp(false, roc[:, 0], roc[:, 1])[-1] == 1.0 and roc[0].tolist() == [0, 0]
    assert np.trapezoid(roc[:, 1], roc[:, 0]) == pytest.approx(roc_auc_score(labels, margins), rel=1e-12)


@pytest.mark.parametrize("step", [1e-6, 1e-2])
def test_a_long_curve_keeps_some_of_its_points(step):
    margins, labels = drawn(3, rows=20_000, step=step)
    false, true, _ = roc_curve(labels, margins)
    roc = ranked(margins, labels)["roc"].numpy()
    assert len(false) > POINTS >= len(roc) > POINTS // 2
    false, true, _ = roc_curve(labels, margins, drop_intermediate=False)
    assert {tuple(point) for point in roc} <= set(zip(false, true, strict=True))
    assert roc[0].tolist() == [0, 0] and roc[-1].tolist() == [1, 1] and (np.diff(roc, axis=0) >= 0).all()
    assert np.trapezoid(roc[:, 1], roc[:, 0]) == pytest.approx(roc_auc_score(labels, margins), abs=1e-3)


# ------------------------------------------------------------------------------------------------ videos


def filmed(seed: int, videos: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, labels and (video, frame) of faces: up to 4 frames a video, up to 3 faces a frame, in any order."""
    random = np.random.default_rng(seed)
    rows = [
        (random.normal() * 2 + video % 2, video % 2, 100 + video, 10 * video + frame)
        for video in range(videos)
        for frame in range(random.integers(1, 5))
        for _ in range(random.integers(1, 4))
    ]
    random.shuffle(rows)
    table = np.array(rows)
    return table[:, 0].astype(np.float32).astype(np.float64), table[:, 1].astype(int), table[:, 2:].astype(int)


def by_hand(margins: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """The highest face of a frame, the mean over the frames of a video, scikit-learn's AUC over the videos."""
    faces, label = defaultdict(list), {}
    for margin, one, (video, frame) in zip(margins, labels, groups.tolist(), strict=True):
        faces[video, frame].append(1 / (1 + math.exp(-margin)))
        label[video] = one
    frames = defaultdict(list)
    for (video, _), found in faces.items():
        frames[video].append(max(found))
    return roc_auc_score([label[video] for video in frames], [np.mean(found) for found in frames.values()])


@pytest.mark.parametrize("seed", range(5))
def test_the_auc_of_videos_is_what_counting_by_hand_gives(seed):
    margins, labels, groups = filmed(seed)
    assert len(margins) > len({tuple(one) for one in groups.tolist()}) > 12  # several faces, several frames
    found = ranked(margins, labels, groups)
    assert float(found["video_auc"]) == pytest.approx(by_hand(margins, labels, groups), rel=1e-12)
    order = np.random.default_rng(seed).permutation(len(margins))
    assert float(ranked(margins[order], labels[order], groups[order])["video_auc"]) == float(found["video_auc"])


def test_videos_with_the_same_faces_tie_in_whatever_order_they_came():
    """A sum of the same three numbers in another order may differ in its last bit."""
    faces = [0.1, 0.7, -1.3]
    for order in itertools.permutations(faces):
        groups = [[1, 1], [1, 2], [1, 3], [2, 4], [2, 5], [2, 6]]
        assert float(ranked([*faces, *order], [0, 0, 0, 1, 1, 1], groups)["video_auc"]) == 0.5


def test_it_is_the_highest_face_and_the_mean_frame():
    """The positive video has frames of 0.9 (faces 0.9 and 0.1) and 0.5, mean 0.7; the mean over its faces would be 0.5,
    below the 0.6 of a negative one. The other negative one has a face of 0.95, more than any, and a mean of 0.45."""
    p = np.array([0.9, 0.1, 0.5, 0.6, 0.95, 0.2, 0.2])
    labels, groups = [1, 1, 1, 0, 0, 0, 0], [[1, 1], [1, 1], [1, 2], [2, 3], [3, 4], [3, 5], [3, 6]]
    assert float(ranked(np.log(p / (1 - p)), labels, groups)["video_auc"]) == 1.0


def test_examples_of_no_video_are_left_out_and_without_any_there_is_no_number():
    margins, labels, groups = filmed(0)
    more = [np.append(margins, [99.0, -99.0]), np.append(labels, [0, 1]), np.append(groups, [[0, 0], [0, 0]], axis=0)]
    assert float(ranked(*more)["video_auc"]) == float(ranked(margins, labels, groups)["video_auc"])
    assert float(ranked(*more)["auc"]) < float(ranked(margins, labels)["auc"])
    assert math.isnan(ranked(margins, labels)["video_auc"])
    assert math.isnan(ranked(margins, labels, np.zeros_like(groups))["video_auc"])


def test_a_video_of_both_classes_is_positive():
    assert float(ranked([1.0, 3.0, 0.5], [0, 1, 0], [[1, 1], [1, 2], [2, 3]])["video_auc"]) == 1.0


# ------------------------------------------------------------------------------------------------ processes


def metrics_of(rows: list[int]) -> dict[str, list]:
    """All metrics of two classes over some rows, in batches of three; in a distributed run over those of all ranks."""
    margins, labels, groups = filmed(7)
    metrics = TASK.metrics()
    for start in range(0, len(rows), 3):
        batch = rows[start : start + 3]
        known = None if start == 0 else torch.tensor(groups[batch])  # the first batch names no video
        TASK.update(metrics, logits_of(margins[batch]), torch.tensor(labels[batch]), None, known)
    return {name: value.tolist() for name, value in metrics.compute().items()}


def count_a_share(arguments: list[str]) -> None:
    """One rank of a distributed evaluation."""
    torch.distributed.init_process_group("gloo")
    found = metrics_of(json.loads(arguments[0]))
    Path(arguments[1]).write_text(json.dumps([torch.distributed.get_world_size(), found]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("cut", [6, 20, None])
def test_two_processes_rank_as_one(tmp_path, cut):
    """Shares of different sizes, and one of none. Those of two that begin without a video leave out three rows each."""
    margins, labels, groups = filmed(7)
    every = list(range(len(margins)))
    shares = [every, []] if cut is None else [every[:cut], every[cut:]]
    (tmp_path / "work").mkdir()
    each = [[json.dumps(rows), str(tmp_path / f"{rank}.json")] for rank, rows in enumerate(shares)]
    for ended in ranks(count_a_share, each, tmp_path / "work"):
        done(ended)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [world for world, _ in results] == [2, 2]
    [(_, one), (_, other)] = results
    assert one == other
    alone = metrics_of(every)
    assert {name: one[name] for name in ("auc", "eer", "roc")} == {name: alone[name] for name in ("auc", "eer", "roc")}
    assert one["ece"] == pytest.approx(alone["ece"], rel=1e-12)
    unnamed = [row for rows in shares for row in rows[:3]]
    groups[unnamed] = 0
    assert one["video_auc"] == float(ranked(margins, labels, groups)["video_auc"])


def test_batches_and_a_reset_change_nothing():
    margins, labels, groups = filmed(1)
    metric = Ranking()
    for _ in range(2):
        for row in range(len(margins)):
            one = slice(row, row + 1)
            metric.update(logits_of(margins[one]), torch.tensor(labels[one]), torch.tensor(groups[one]))
        found = metric.compute()
        for name, value in ranked(margins, labels, groups).items():
            assert torch.equal(found[name], value)
        metric.reset()


def test_only_two_classes_have_these_metrics():
    assert {"ranking"} == set(Classification(2).metrics().keys()) - set(Classification(3).metrics().keys())
