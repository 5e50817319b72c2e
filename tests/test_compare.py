"""Teacher and students side by side: what the page and the table show, and what the command does."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RECIPE
from PIL import Image
from processes import done, inside, kd_dist, laboratory, run, sentence
from rich.console import Console
from sklearn.metrics import confusion_matrix, roc_auc_score
from test_page import Reader, read

from kd_dist import assemble, cache_teacher, compare, journey, train
from kd_dist.batch import Batch
from kd_dist.config import load
from kd_dist.disk import file_digest
from kd_dist.errors import MismatchError
from kd_dist.evaluation import evaluate
from kd_dist.report import interval, summarise
from kd_dist.tasks import Classification, Regression, Segmentation
from kd_dist.tasks.binary import POINTS
from kd_dist.tasks.classification import LISTED


def model(role: str, stage: str, seed: int, **metrics: float | None) -> dict:
    about = {"role": role, "stage": stage, "seed": seed, "metric": "auc", "value": metrics["auc"], "parts": []}
    cost = {"name": f"timm/{role}", "parameters": 2_500_000, "macs": 7_000_000, "latency_ms": 1.5, "memory_mb": 12.345}
    return {**about, "metrics": metrics, **cost, "roc": [[0.0, 0.0], [0.1, 0.8], [1.0, 1.0]]}


SUBJECT = compare.Subject("faces", "test", "segmentation", ("real", "fake"), "kd-dist compare faces.yaml")
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
    content = compare.write(tmp_path, SUBJECT, MODELS)
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
    compare.write(tmp_path, SUBJECT, plain)
    assert "roc-test.png" not in (tmp_path / "compare.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.md"]


def judged(task, *batches: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict, dict]:
    """The metrics of batches of logits and targets, and the outcomes that are recorded with them."""
    outcomes, place = compare.Outcomes(task), iter(batches)
    predict = outcomes.counting(lambda images: images)
    stream = [
        Batch(("k",) * len(z), z, targets, None, torch.arange(len(z)) != 1, len(z), None) for z, targets in place
    ]
    return evaluate(predict, stream, task, torch.device("cpu")), outcomes.record()


def test_outcomes_of_classes_add_up_to_the_metrics():
    """One row of each batch is of no example."""
    random = torch.Generator().manual_seed(0)
    batches = [
        (2 * torch.randn(n, 5, generator=random), torch.randint(0, 5, (n,), generator=random)) for n in (30, 7)
    ]
    metrics, record = judged(Classification(5), *batches)
    z, targets = (torch.cat([torch.cat([one[:1], one[2:]]) for one in of]) for of in zip(*batches, strict=True))
    matrix = confusion_matrix(targets, z.argmax(dim=1), labels=range(5))
    assert record["confusion"] == matrix.tolist() and record["right"] == matrix.diagonal().tolist()
    assert (record["labelled"], record["predicted"]) == (matrix.sum(1).tolist(), matrix.sum(0).tolist())
    rows, right, p = np.array(record["reliability"]).T
    assert rows.sum() == 35 and right.sum() / 35 == pytest.approx(metrics["accuracy"])
    assert abs(right - p).sum() / 35 == pytest.approx(metrics["ece"], rel=1e-4)


def test_outcomes_are_bounded():
    _, record = judged(Classification(LISTED + 1), (torch.eye(LISTED + 1), torch.arange(LISTED + 1)))
    assert record["confusion"] == [] and record["right"] == [1, 0] + [1] * (LISTED - 1)
    task = Regression(("warm", "bright"))
    truth = torch.linspace(-1, 1, 3001)[:, None].expand(-1, 2).contiguous()
    truth[5] = torch.nan
    _, record = judged(task, (truth.nan_to_num() + torch.tensor([0.123456789, 0.0]), truth))
    pairs = np.array(record["pairs"])
    assert pairs.shape == (compare.KEPT, 4) and pairs[0].tolist() == [-1, -1, -0.87654, -1] and pairs[-1, 0] == 1
    assert np.diff(pairs[:, 0]).max() < 4.5 * 2 / 3000 and not np.isnan(pairs).any()
    np.testing.assert_allclose(pairs[:, 2] - pairs[:, 0], 0.123457, atol=6e-5)
    assert compare.Outcomes(Segmentation(3)).record() == {}


def test_students_of_a_further_recipe_are_held_to_its_own_teacher():
    own = [{**one, "recipe": "faces"} for one in MODELS]
    other = [model("teacher", "teacher", 0, auc=0.5, eer=0.5, video_auc=None), MODELS[0]]
    further = compare.named_after("others", [{**one, "recipe": "others", "taught_by": None} for one in other])
    heard = compare.named_after("others", [{**other[1], "stage": "b", "taught_by": "teacher", "recipe": "others"}])
    rows = {row["stage"]: row for row in summarise([*own, *further, *heard])}
    assert list(rows) == ["teacher", "others/teacher", "distill", "others/distill", "others/b"]
    kept = {stage: row["metrics"]["auc"]["retention"] for stage, row in rows.items()}
    assert kept["distill"] == pytest.approx(0.75 / 0.9)
    assert kept["others/distill"] == kept["others/b"] == pytest.approx(0.7 / 0.5)


def test_recipes_that_differ_are_refused():
    paths = [Path(name) for name in ("a.yaml", "b.yaml", "c.yaml")]
    said = [{"name": name, "task": {"name": "classification", "classes": 2}, "examples": "1"} for name in "abc"]
    compare.refuse_incomparable(paths, said)
    said[2] = {**said[2], "examples": "2"}
    with pytest.raises(MismatchError) as caught:
        compare.refuse_incomparable(paths, said)
    assert str(caught.value) == (
        "c.yaml: has examples = '2', a.yaml has '1'; compare recipes of one task that are judged by one metric on the "
        "same examples, packed alike"
    )
    with pytest.raises(MismatchError, match=r"^b.yaml: is called 'a', as a.yaml is; give each recipe a name"):
        compare.refuse_incomparable(paths[:2], [said[0], said[0]])


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


def page_of(folder: Path, name: str) -> Reader:
    return read(folder / "runs" / name / "compare.html")


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
    first, found = (runs / "compare.html").read_bytes(), page_of(made, "faces")
    assert len([one for one in found.images if one["alt"].startswith("ROC")]) == 1
    assert [line[-1] for line in found.tables[0][1:]] == ["seed 0", "seed 0, seed 1", "seed 0, seed 1, seed 4"]
    for one, line in zip(content["models"], found.tables[-1][1:], strict=True):
        steps = json.loads((made / one["folder"] / "result.json").read_text())
        assert line[4] == f"{steps['history'][steps['best_epoch']]['step']} of {steps['steps']}"
        assert line[3] == file_digest(made / one["folder"] / "best.safetensors") and line[5] == one["examples"]
    again = run(kd_dist, "compare", "tiny.yaml", *WORDS, "--json", folder=made)
    assert done(again) and json.loads(again.stdout) == content  # not measured twice, latency included
    assert (runs / "compare.html").read_bytes() == first
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


# ------------------------------------------------------------------------------------------------ several recipes


@pytest.fixture
def two(made, tmp_path) -> Path:
    """A folder with two recipes of the same examples, the second with seeds 0 and 1 of one student."""
    shutil.copytree(made, tmp_path / "home")
    folder = tmp_path / "home"
    shutil.copytree(folder / "shards/faces", folder / "shards/others")
    for stage, seeds in (("teacher", (0,)), ("distill", (0, 1))):
        for seed in seeds:
            shutil.copytree(folder / f"runs/faces/{stage}/seed-{seed}", folder / f"runs/others/{stage}/seed-{seed}")
    (folder / "faces.yaml").write_text(recipe_text("faces"))
    (folder / "others.yaml").write_text(recipe_text("others"))
    return folder


def recipe_text(name: str) -> str:
    text = RECIPE.replace("task: {classes: 3}", f"name: {name}\ntask: {{classes: 2}}")
    return text.replace("source: image_folder\n  root: pictures", "source: my_source:faces")


@pytest.mark.slow
def test_several_recipes_are_one_table(two):
    done(run(kd_dist, "compare", "faces.yaml", "views.count=2", "others.yaml", folder=two))
    content = json.loads((two / "runs/faces/compare.json").read_text())
    stages = ["teacher", "others/teacher", "pretrain", "distill", "others/distill"]
    assert [row["stage"] for row in content["summary"]] == stages
    assert [row["seeds"] for row in content["summary"]] == [1, 1, 2, 3, 2]
    assert content["title"] == "faces and others" and not (two / "runs/others/compare.html").exists()
    assert content["command"] == "kd-dist compare faces.yaml others.yaml views.count=2"
    found = page_of(two, "faces")
    assert [line[0] for line in found.tables[0][1:]] == stages
    assert [line[1] for line in found.tables[-1][1:]] == ["faces"] * 6 + ["others"] * 3
    said = sentence(run(kd_dist, "compare", "faces.yaml", "faces.yaml", folder=two))
    assert said == "faces.yaml: is called 'faces', as faces.yaml is; give each recipe a name of its own"
    (two / "others.yaml").write_text(recipe_text("others") + "evaluate: {split: val}\n")
    said = sentence(run(kd_dist, "compare", "faces.yaml", "others.yaml", folder=two))
    assert said.startswith("others.yaml: has evaluate.split = 'val', faces.yaml has 'test'; ")
    assert sentence(run(kd_dist, "compare", "seed=1", folder=two)).startswith("compare: no recipe is named")


# ------------------------------------------------------------------------------------------------ other tasks


@pytest.mark.slow
def test_maps_have_their_classes_and_their_picture(scenery):
    done(run(train.main, ["scenes.yaml", "--stage", "pretrain"], folder=scenery))
    done(run(kd_dist, "compare", "scenes.yaml", folder=scenery))
    content, found = json.loads(Path("runs/scenes/compare.json").read_text()), page_of(scenery, "scenes")
    parts = content["by_part"]["IoU"]
    assert [one["name"] for one in parts] == ["ground", "left", "right"]
    assert [line[0] for line in found.tables[2][1:]] == ["ground", "left", "right"]
    assert [line[1] for line in found.tables[0][1:]] == ["teacher", "student alone"]  # the teacher is given
    assert [line[4] == "-" for line in found.tables[-1][1:]] == [True, False]
    [sheet] = [one["alt"] for one in found.images if one["alt"].startswith("Examples")]
    assert "scenes, seed 0" in sheet


NUMBERS = """\
name: numbers
task: {name: regression, outputs: [warm, bright]}
data: {source: "my_numbers:coloured", splits: {train: 0.7, val: 0.3}, shard_size: 8, workers: 0}
views: {count: 2, size: 8, flip: 0.5}
teacher: {model: "tiny_model:network", options: {width: 8}, seed: 1}
student: {model: "tiny_model:network"}
stages:
  pretrain: {losses: {ccc: {}}, epochs: 1, batch_size: 8, lr: 1e-3}
evaluate: {split: val}
"""
COLOURED = '''\
import functools

from my_source import read
from kd_dist.sources import Item, Listing


def coloured():
    each = [(n, "val" if n % 4 == 3 else "train", functools.partial(read, n % 3, n)) for n in range(12)]
    return Listing(("warm", "bright"), [Item(f"{n:02d}", s, "png", (n / 12, -n / 20), get) for n, s, get in each])
'''


@pytest.mark.slow
def test_numbers_have_their_outputs_and_their_scatter(experiment):
    Path("numbers.yaml").write_text(NUMBERS)
    Path("my_source.py").write_text(SOURCE)
    Path("my_numbers.py").write_text(COLOURED)
    done(run(kd_dist, "pack", "numbers.yaml", folder=experiment))
    done(run(train.main, ["numbers.yaml", "--stage", "pretrain"], folder=experiment))
    done(run(kd_dist, "compare", "numbers.yaml", folder=experiment))
    content, found = json.loads(Path("runs/numbers/compare.json").read_text()), page_of(experiment, "numbers")
    assert list(content["by_part"]) == ["ccc", "mae"]
    assert [one["name"] for one in content["by_part"]["mae"]] == ["warm", "bright"]
    scattered = [one["alt"] for one in found.images if "predictions of" in one["alt"]]
    assert len(scattered) == 4
    for one in content["models"]:
        gaps = dict(one["parts"])
        for output in ("warm", "bright"):
            alt = f"{output}: 3 predictions of {one['stage']} against the truth, {gaps[f'mae/{output}']:.4f} apart"
            assert any(shown.startswith(alt) for shown in scattered), (alt, scattered)
