"""Teacher and students side by side: what the page and the table show, and what the command does."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import done, inside, kd_dist, laboratory, run, sentence
from rich.console import Console
from sklearn.metrics import roc_auc_score

from kd_dist import assemble, cache_teacher, compare, journey, train
from kd_dist.config import load
from kd_dist.report import interval, summarise
from kd_dist.tasks.binary import POINTS


def model(role: str, stage: str, seed: int, **metrics: float | None) -> dict:
    about = {"role": role, "stage": stage, "seed": seed, "metric": "auc", "value": metrics["auc"], "parts": []}
    cost = {"name": f"timm/{role}", "parameters": 2_500_000, "macs": 7_000_000, "latency_ms": 1.5, "memory_mb": 12.345}
    return {**about, "metrics": metrics, **cost, "roc": [[0.0, 0.0], [0.1, 0.8], [1.0, 1.0]]}


MODELS = [
    model("student_kd", "distill", 0, auc=0.7, eer=0.3, video_auc=None),
    model("student_kd", "distill", 1, auc=0.8, eer=0.2, video_auc=None),
    model("teacher", "teacher", 0, auc=0.9, eer=0.1, video_auc=None),
]


def test_a_column_a_stage_and_a_line_a_quantity():
    found = compare.lines(summarise(MODELS))
    assert found[:4] == [
        ["", "teacher", "distill"],
        ["role", "teacher", "student + KD"],
        ["model", "timm/teacher", "timm/student_kd"],
        ["seeds", "1", "2"],
    ]
    half = interval([0.7, 0.8])[1]
    assert found[4:7] == [
        ["auc", "0.9000", f"0.7500 ± {half:.4f} [83.3%]"],
        ["eer (lower is better)", "0.1000", f"0.2500 ± {half:.4f} [40.0%]"],
        ["video_auc", "-", "-"],
    ]
    assert found[7:] == [
        ["parameters", "2.500 M", "2.500 M"],
        ["MACs", "7.00 M", "7.00 M"],
        ["latency ms", "1.50", "1.50"],
        ["memory MB", "12.35", "12.35"],
    ]


def test_the_page_and_the_table_hold_every_cell(tmp_path):
    content = compare.write(tmp_path, "faces", "test", MODELS)
    rows = content["summary"]
    assert json.loads((tmp_path / "compare.json").read_text()) == content and content["models"] == MODELS
    page = (tmp_path / "compare.md").read_text()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(compare.table(rows, "faces"))
    shown = console.export_text()
    cells = [cell for line in compare.lines(rows) for cell in line]
    assert len(cells) == 3 * 11 and all(f" {cell} " in page or not cell for cell in cells)
    assert all(cell in shown for cell in cells)
    assert "Measured on the `test` split" in page and page.endswith("![roc-test](roc-test.png)\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.md", "roc-test.png"]


def test_without_curves_there_is_no_picture(tmp_path):
    plain = [{name: value for name, value in one.items() if name != "roc"} for one in MODELS]
    compare.write(tmp_path, "faces", "test", plain)
    assert "roc-test.png" not in (tmp_path / "compare.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.md"]


# ------------------------------------------------------------------------------------------------ the command

SOURCE = '''\
"""A user's own source: pictures of two classes, each a face of a frame of a video."""

import functools
import io

from conftest import picture
from kd_dist.sources import Item, Listing


def read(label, number):
    buffer = io.BytesIO()
    picture(label, number).save(buffer, format="PNG")
    return buffer.getvalue()


def faces(named=True):
    items = []
    for split, videos in (("train", 6), ("val", 6), ("test", 8)):
        for video in range(videos):
            for frame in range(3):
                for face in range(1 + (frame == 1)):
                    name, label = f"{split}/{video}/{frame}-{face}", video % 2
                    about = {"video": f"{split}-{video}", "frame": frame} if named else {}
                    number = 1000 * len(split) + 100 * video + 10 * frame + face
                    items.append(Item(name, split, "png", label, functools.partial(read, label, number), about=about))
    return Listing(("real", "fake"), items)
'''
WORDS = ["task.classes=2", "data.source=my_source:faces", "data.root=null", "name=faces"]
STAGES = ("teacher", "pretrain", "distill")
SEEDS = {"teacher": (0,), "pretrain": (0, 1), "distill": (0, 1, 4)}  # what has been trained


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A user's folder in which a teacher, and students with some seeds, have been trained on faces of videos."""
    folder = laboratory(tmp_path_factory.mktemp("made") / "home")
    (folder / "my_source.py").write_text(SOURCE)
    done(run(kd_dist, "pack", "tiny.yaml", *WORDS, folder=folder))
    for stage in STAGES:
        for seed in SEEDS[stage]:
            done(run(train.main, ["tiny.yaml", "--stage", stage, *WORDS, f"seed={seed}"], folder=folder))
        if stage == "teacher":
            done(run(cache_teacher.main, ["tiny.yaml", *WORDS], folder=folder))
    return folder


@pytest.mark.slow
def test_all_that_has_been_trained_is_compared(made):
    said = done(run(kd_dist, "compare", "tiny.yaml", *WORDS, folder=made))
    runs = made / "runs" / "faces"
    content = json.loads((runs / "compare.json").read_text())
    assert [(row["stage"], row["seeds"]) for row in content["summary"]] == [(one, len(SEEDS[one])) for one in STAGES]
    assert {(one["stage"], one["seed"]) for one in content["models"]} == {(s, n) for s in STAGES for n in SEEDS[s]}
    for one in content["models"]:
        assert list(one["metrics"]) == sorted(["accuracy", "nll", "ece", "auc", "eer", "video_auc"])
        assert all(0 <= value < 10 for value in one["metrics"].values())
        assert 2 <= len(one["roc"]) <= POINTS and one["roc"][-1] == [1, 1]
        points = np.array(one["roc"])
        assert np.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(one["metrics"]["auc"], abs=1e-5)
    page = (runs / "compare.md").read_text()
    assert "|  | teacher | pretrain | distill |" in page and "![roc-test](roc-test.png)" in page
    assert "video_auc" in said and "eer (lower is better)" in said and "memory MB" in said
    with Image.open(runs / "roc-test.png") as image:
        assert image.size == (600, 600)
    again = run(kd_dist, "compare", "tiny.yaml", *WORDS, "--json", folder=made)
    assert done(again) and json.loads(again.stdout) == content  # not measured twice, latency included
    shown = done(run(kd_dist, "evaluate", "tiny.yaml", *WORDS, folder=made))
    assert all(word in shown for word in ("all metrics", "video_auc", "eer", "ece", "memory MB"))


@pytest.mark.slow
def test_what_is_measured_is_what_the_scores_say(made, monkeypatch):
    """The teacher's scores by hand, over frames and over videos: the faces of frame 1 are two."""
    done(run(kd_dist, "evaluate", "tiny.yaml", *WORDS, folder=made))
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(made)
    recipe = load("tiny.yaml", WORDS)
    corridor = assemble.evaluation_corridor(recipe, "test", 0, 1, cached=False)
    [batch] = [corridor[number] for number in range(len(corridor))]
    assert (len(batch.keys), len(batch.groups.unique(dim=0)), len(batch.groups[:, 0].unique())) == (32, 24, 8)
    with torch.no_grad():
        z = assemble.teacher(recipe).network.eval()(batch.images).double()
    margin, labels = (z[:, 1] - z[:, 0]).numpy(), batch.targets.numpy()
    record = json.loads(Path("runs/faces/teacher/seed-0/evaluation-test.json").read_text())
    assert record["metrics"]["auc"] == pytest.approx(roc_auc_score(labels, margin), rel=1e-12)
    p = 1 / (1 + np.exp(-margin))
    scores = {}
    for place, (video, frame) in enumerate(batch.groups.tolist()):
        scores.setdefault(video, {}).setdefault(frame, []).append(p[place])
    means = {video: np.mean([max(faces) for faces in frames.values()]) for video, frames in scores.items()}
    truth = {video: label for (video, _), label in zip(batch.groups.tolist(), labels.tolist(), strict=True)}
    by_video = roc_auc_score(list(truth.values()), [means[video] for video in truth])
    assert record["metrics"]["video_auc"] == pytest.approx(by_video, rel=1e-12)


@pytest.mark.slow
def test_seeds_that_were_trained_otherwise_have_no_mean(made, tmp_path):
    shutil.copytree(made, tmp_path / "home")
    result = tmp_path / "home/runs/faces/distill/seed-4/result.json"
    content = json.loads(result.read_text())
    content["identity"]["stage"]["lr"] = 0.5
    result.write_text(json.dumps(content))
    said = sentence(run(kd_dist, "compare", "tiny.yaml", *WORDS, folder=tmp_path / "home"))
    assert said.startswith("runs/faces/distill/seed-4: was trained with stage.lr = 0.5, runs/faces/distill/seed-0 with")
    assert said.endswith("train them alike, or delete one of the two")


@pytest.mark.slow
def test_a_record_of_an_older_version_is_measured_anew(made):
    record = made / "runs/faces/teacher/seed-0/evaluation-test.json"
    done(run(kd_dist, "evaluate", "tiny.yaml", *WORDS, folder=made))
    known = json.loads(record.read_text())
    old = {name: value for name, value in known.items() if name not in ("memory_mb", "roc")}
    old["identity"] = {name: value for name, value in known["identity"].items() if name != "version"}
    old["metrics"] = {name: known["metrics"][name] for name in ("accuracy", "nll")}
    record.write_text(json.dumps(old))
    done(run(kd_dist, "compare", "tiny.yaml", *WORDS, folder=made))
    new = json.loads(record.read_text())
    assert new["metrics"] == known["metrics"] and new["roc"] == known["roc"] and new["memory_mb"] == known["memory_mb"]


@pytest.mark.slow
def test_a_metric_that_the_data_does_not_define_is_one_sentence(made, tmp_path):
    """Without named videos there is no video_auc: said after the first epoch, and by what evaluates."""
    words = [*WORDS, "name=nameless", "data.options={named: false}"]
    done(run(kd_dist, "pack", "tiny.yaml", *words, folder=made))
    judged = [*words, "evaluate.metric=video_auc"]
    said = sentence(run(train.main, ["tiny.yaml", "--stage", "teacher", *judged], folder=made))
    remedy = "video_auc is undefined there; give it videos of both classes, named by its source, or choose another"
    assert said == f"shards/nameless/val: {remedy} evaluate.metric"
    runs = f"runs={tmp_path}"
    done(run(train.main, ["tiny.yaml", "--stage", "teacher", *words, runs], folder=made))
    ended = run(kd_dist, "evaluate", "tiny.yaml", *words, "--json", runs, folder=made)
    done(ended)
    [row] = json.loads(ended.stdout)
    assert row["metrics"]["video_auc"] is None and 0 <= row["metrics"]["auc"] <= 1
    assert sentence(run(kd_dist, "evaluate", "tiny.yaml", *judged, runs, folder=made)) == (
        f"shards/nameless/test: {remedy} evaluate.split"
    )


@pytest.mark.slow
def test_nothing_trained_is_one_sentence(made, tmp_path):
    said = sentence(run(kd_dist, "compare", "tiny.yaml", *WORDS, f"runs={tmp_path}", folder=made))
    assert said == f"{tmp_path}/faces: no stage has been trained yet; run `kd-dist run` or `kd-dist train` first"
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_run_of_two_classes_shows_its_curves(made):
    """Its report, written from what has been trained."""
    with inside(made):
        recipe = load("tiny.yaml", WORDS)
        journey.write_report([recipe], journey.evaluate_recipe(recipe))
    page = (made / "runs/faces/report.md").read_text()
    assert "![curves](curves.png)" in page and "![roc-test](roc-test.png)" in page
