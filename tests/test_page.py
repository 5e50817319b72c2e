"""The page of a comparison: it needs nothing beside it, says what compare.json says, and where each figure is from."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from kd_dist import compare, page
from kd_dist.errors import TrainingError
from kd_dist.page import plots
from kd_dist.tasks.binary import POINTS

VOID = {"meta", "img", "br"}
HOSTILE = ('<b>&"', "$x_1$ \\frac", "_hidden\n\0", "漢字 'ü'")
MEGA = 1e6


class Reader(HTMLParser):
    """What a page holds; fails on tags that do not close in order."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids, self.links, self.images, self.tables, self.figures = [], [], [], [], []
        self.words = ""
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        if tag == "a":
            self.links.append(given["href"])
        else:
            assert "href" not in given and tag not in ("script", "link", "iframe", "object")
        if tag == "img":
            self.images.append(given)
            self.figures[-1]["images"] += 1
        if tag == "figure":
            self.figures.append({"images": 0, "source": "", "items": 0})
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "li" and "figure" in self.open:
            self.figures[-1]["items"] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            assert "url(" not in data and "@import" not in data
            return
        self.words += data
        if self.open[-1:] == ["summary"] and "figure" in self.open and data.startswith("Source"):
            self.figures[-1]["source"] = data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def read(path: Path) -> Reader:
    """The page at a path, which stands alone."""
    found = Reader(path.read_text())
    assert len(found.ids) == len(set(found.ids))
    assert found.links and all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert found.images and all(re.match(r"data:image/(svg\+xml|png);base64,", one["src"]) for one in found.images)
    assert all(len(one["alt"]) > 20 for one in found.images)
    assert found.figures and all(one["images"] and one["source"] and one["items"] for one in found.figures)
    for data in vectors(found):
        for node in ElementTree.fromstring(data).iter():
            for name, value in node.attrib.items():
                assert not name.endswith("href") or value.startswith(("#", "data:")), value
    return found


def vectors(found: Reader) -> list[str]:
    """The SVG pictures of a page."""
    sources = [one["src"].partition(",") for one in found.images]
    return [base64.b64decode(data).decode() for kind, _, data in sources if "svg" in kind]


def model(folder: Path, stage: str, seed: int, outcomes: dict, metrics: dict, **more) -> dict:
    """A model as `journey.evaluate_recipe` gives it, with its record, its result and its weights in a folder."""
    role = {"teacher": "teacher", "pretrain": "student_alone"}.get(stage, "student_kd")
    metric, value = next(iter(metrics.items()))
    home = folder / stage / f"seed-{seed}"
    home.mkdir(parents=True)
    losses = {"cross_entropy": {}, **({"kd": {}} if role == "student_kd" else {})}
    history = [
        {"epoch": n, "step": 5 * (n + 1), "loss": 2 / (n + 1), f"val_{metric}": None if n == 1 else n / 5, "lr": 1e-5}
        | {name: 1 / (n + 1) for name in losses}
        for n in range(more.pop("epochs", 4))
    ]
    (home / "result.json").write_text(json.dumps({"history": history, "identity": {"stage": {"losses": losses}}}))
    (home / "best.safetensors").write_bytes(bytes(4000 if role == "teacher" else 400))
    record = home / "evaluation-test.json"
    record.write_text(json.dumps({"outcomes": outcomes}))
    cost = {"name": f"timm/{role}", "parameters": 1000 if role == "teacher" else 90, "macs": 7_000, "memory_mb": 12.345}
    origin = {"recipe": "tiny", "folder": str(home), "record": str(record), "weights": f"{seed}{stage}".ljust(64, "0")}
    origin |= {"examples": "e" * 64, "best_step": 15, "steps": 20, "latency_ms": 1.5 + seed}
    about = {"role": role, "stage": stage, "seed": seed, "metric": metric, "value": value, "parts": []}
    return {**about, "metrics": metrics, **cost, **origin, **more}


def classes(folder: Path, count: int, seeds: int = 1, **more) -> list[dict]:
    """A teacher, a student alone and one that was taught with several seeds, of so many classes of ten examples."""
    models, bins = [], [[0, 0, 0.0]] * 13 + [[4 * count, 2 * count, 3.5 * count], [6 * count, 5 * count, 5.9 * count]]
    for stage, right, number in (("teacher", 9, 1), ("pretrain", 6, 1), ("distill", 7, seeds)):
        for seed in range(number):
            good = [right + (place + seed) % 2 for place in range(count)]
            said = {"labelled": [10] * count, "predicted": [10] * count, "right": good, "reliability": bins}
            matrix = np.diag(good) + np.roll(np.diag(10 - np.array(good)), 1, axis=1)
            said["confusion"] = matrix.tolist() if count <= 20 else []
            metrics = {"accuracy": sum(good) / 10 / count, "nll": 1.2345 + seed}
            if count == 2:
                metrics["auc"] = 0.8125
                more["roc"] = [[0.0, 0.0], [0.1, 0.8], [1.0, 1.0]]
            models.append(model(folder, stage, seed, said, metrics, **more))
    return models


def written(folder: Path, models: list[dict], task: str, names: tuple[str, ...], **sheets) -> tuple[dict, Reader]:
    """The comparison of models, and the page of it."""
    subject = compare.Subject("tiny", "test", task, names, "kd-dist compare tiny.yaml name='a b'")
    content = compare.write(folder, subject, models)
    page.write(folder / "compare.html", content, sheets)
    return content, read(folder / "compare.html")


def test_the_page_says_what_the_json_says(tmp_path):
    models = classes(tmp_path, 3, seeds=3)
    content, found = written(tmp_path, models, "classification", ("cat", "dog", "owl"))
    assert content == json.loads((tmp_path / "compare.json").read_text())
    stages, each, recall, runs = found.tables
    assert [line[:-1] for line in stages[1:]] == [list(line) for line in list(zip(*content["table"], strict=True))[1:]]
    assert [line[-1] for line in stages[1:]] == ["seed 0", "seed 0", "seed 0, seed 1, seed 2"]
    assert "±" in stages[3][4] and "±" not in stages[2][4]
    assert len(each) == len(runs) == 1 + len(models) == 6
    for line, origin, one in zip(each[1:], runs[1:], models, strict=True):
        name = f"{one['stage']}, seed {one['seed']}"
        assert line[:3] == [name, f"{one['metrics']['accuracy']:.4f}", f"{one['metrics']['nll']:.4f}"]
        assert line[3:] == [one["folder"], one["weights"][:12], "15", "e" * 12]
        assert origin[:2] == [name, "tiny"] and origin[3:6] == [one["weights"], "15 of 20", "e" * 64]
        assert origin[6:] == [f"{one['folder']}/result.json", one["record"]]
    parts = content["by_part"]["recall"]
    assert recall[0] == ["recall", "teacher", "pretrain", "distill"] and len(recall) == 4
    for line, one in zip(recall[1:], parts, strict=True):
        assert line == [one["name"], *(compare.spread(*one["stages"][stage]) for stage in recall[0][1:])]
    assert parts[1]["stages"]["teacher"] == [1.0, None] and parts[1]["stages"]["distill"][0] == pytest.approx(23 / 30)
    assert "Made by kd-dist compare tiny.yaml name='a b'" in found.words
    every = [one["alt"] for one in found.images]
    assert f"distill {content['summary'][2]['mean']:.4f} at 90" not in every[0] and "at 9e-05" in every[0]
    assert "teacher, seed 0 0.5000; pretrain, seed 0 0.5000; distill, seed 0 0.5000" in " ".join(every)
    assert not [one for one in every if one.startswith("ROC")]
    assert [one["items"] for one in found.figures] == [5] * len(found.figures)
    assert "files" not in found.ids and {"table", "parts", "outcomes", "training", "losses"} <= set(found.ids)


def test_every_name_is_escaped(tmp_path):
    folder = tmp_path / '<i>&"'
    folder.mkdir()
    content, found = written(folder, classes(folder, 4), "classification", HOSTILE)
    assert [line[0] for line in found.tables[2][1:]] == ['<b>&"', "$x_1$ \\frac", "_hidden\ufffd\ufffd", "漢字 'ü'"]
    assert "<b>" not in (folder / "compare.html").read_text().replace("data:", "")
    nodes = [node for data in vectors(found) for node in ElementTree.fromstring(data).iter()]
    words = {node.text for node in nodes if node.tag.endswith("}text")}
    assert {'<b>&"', "$x_1$ \\frac", "_hidden\ufffd\ufffd", "漢字 'ü'"} <= words
    assert [one["name"] for one in content["by_part"]["recall"]] == list(HOSTILE)
    assert str(folder) in found.words


def test_the_same_runs_give_the_same_bytes(tmp_path, monkeypatch):
    content, _ = written(tmp_path, classes(tmp_path, 2)[:1], "classification", ("no", "yes"))
    first = (tmp_path / "compare.html").read_bytes()
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 31)
    monkeypatch.setitem(matplotlib.rcParams, "xtick.labelsize", 31)
    page.write(tmp_path / "compare.html", content, {})
    assert (tmp_path / "compare.html").read_bytes() == first
    assert matplotlib.rcParams["lines.linewidth"] == 31
    assert not re.search(rb"20\d\d-\d\d-\d\d", first)


def test_two_classes_have_their_curves(tmp_path):
    models = classes(tmp_path, 2)
    del models[0]["roc"]
    _, found = written(tmp_path, models, "classification", ("no", "yes"))
    [roc] = [one["alt"] for one in found.images if one["alt"].startswith("ROC")]
    assert roc == "ROC curves. Area under each: pretrain, seed 0 0.8125; distill, seed 0 0.8125."
    confused = [one["alt"] for one in found.images if one["alt"].startswith("Confusion")]
    assert confused[1] == (
        "Confusion matrix of pretrain: 13 of 20 on the diagonal; most often mistaken, 4 times: no for yes."
    )


FILE = {
    "file": "model.onnx", "bytes": 1_234_000, "sha256": "0" * 64, "int8": False, "note": "", "max_difference": 1.5e-6,
    "largest_output": 3.0, "metrics": {"accuracy": 0.7125}, "retention": 0.875, "kept": None, "memory_mb": 45.67,
    "latency_ms": {"one_thread": {"median": 1.2344, "p95": 2}, "all_threads": {"median": 0.5, "p95": 1, "threads": 4}},
}  # fmt: skip


def test_exported_files_are_shown_where_there_are_some(tmp_path):
    models = classes(tmp_path, 2, seeds=3)[1:]  # no teacher has been trained
    small = {**FILE, "file": "model.int8.onnx", "bytes": 400_000, "metrics": {"accuracy": 0.7}}
    refused = {"executorch": "<no> runtime & no hope"}
    for number, one in enumerate(models[1:]):
        weights, examples = "f" * 64 if number == 1 else one["weights"], "d" * 64 if number == 2 else "e" * 64
        info = {"files": {"onnx": FILE, "onnx_int8": small}, "not_written": refused, "metrics": {"split": "val"}}
        info |= {"student": {"weights_sha256": weights}, "examples": {"val": examples, "test": "e" * 64}}
        (Path(one["folder"]) / "package").mkdir()
        (Path(one["folder"]) / "package/deployment_info.json").write_text(json.dumps(info))
    _, found = written(tmp_path, models, "classification", ("no", "yes"))
    assert "files" in found.ids and found.words.count("<no> runtime & no hope") == 3
    assert found.words.count("Of other weights, ffffffffffff: export the stage again.") == 1
    assert found.words.count("Judged on other examples, dddddddddddd of the val split: export the stage again.") == 1
    line = ["onnx", "model.onnx", "1.234", "1.50e-06", "0.7125", "87.5%", "-", "1.234", "0.500 (4)", "45.7"]
    tables = [one for one in found.tables if one[0][0] == "format"]
    assert len(tables) == 3 and [one[1] for one in tables] == [line] * 3
    alts = [one["alt"] for one in found.images][-2:]
    assert alts == [
        "accuracy against size, MB: distill, seed 0 as onnx 0.7125 at 1.234; "
        "distill, seed 0 as onnx_int8 0.7000 at 0.4.",
        "accuracy against latency on one thread, ms: distill, seed 0 as onnx 0.7125 at 1.234; "
        "distill, seed 0 as onnx_int8 0.7000 at 1.234.",
    ]  # of what is old nothing is drawn
    (Path(models[1]["folder"]) / "package/deployment_info.json").write_text("{}")
    with pytest.raises(TrainingError, match="package/deployment_info.json: is damaged"):
        written(tmp_path, models, "classification", ("no", "yes"))


def test_marks_of_several_packages_are_told_apart():
    found = [
        {"package": f"{stage}, seed 0", "format": "onnx", "x": 1.0, "y": 0.5} for stage in ("distill", "tiny/distill")
    ]
    for marks, names in ((found, {"onnx", "distill, seed 0", "tiny/distill, seed 0"}), (found[:1], {"onnx"})):
        with plots.settled():
            drawn = plots.files(marks, "accuracy", "size, MB", ["onnx"]).data.decode()
        words = set(re.findall(r"<text[^>]*>([^<]*)</text>", drawn))
        assert {one for one in words if "onnx" in one or "seed" in one} == names


def test_numbers_are_drawn_against_the_truth(tmp_path):
    pairs = [[n / 10, 0.5, n / 10 + 0.05, None if n else 0.25] for n in range(10)]
    metrics = {"ccc": 0.5, "mae": 0.05, "ccc/warm": 0.7, "mae/warm": 0.05}
    models = [
        model(tmp_path, stage, 0, {"pairs": pairs}, {"ccc": 0.5, "mae": 0.05}, parts=list(metrics.items()))
        for stage in ("teacher", "distill")
    ]
    content, found = written(tmp_path, models, "regression", ("warm", "bright"))
    assert content["by_part"] == {
        "ccc": [{"name": "warm", "stages": {"teacher": [0.7, None], "distill": [0.7, None]}}],
        "mae": [{"name": "warm", "stages": {"teacher": [0.05, None], "distill": [0.05, None]}}],
    }
    drawn = [one for one in found.images if "predictions of" in one["alt"]]
    assert [one["alt"] for one in drawn[::2]] == [
        "warm: 10 predictions of teacher against the truth, 0.0500 apart in the mean.",
        "bright: 1 predictions of teacher against the truth, 0.2500 apart in the mean.",
    ]
    assert len(drawn) == 4 and all(one["src"].startswith("data:image/png") for one in drawn)


def test_maps_are_shown_by_class_and_in_a_picture_of_bounded_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 1000, 3), np.uint8)
    parts = [("road", 0.9), ("sky", 0.4)]
    models = [
        model(tmp_path, stage, 0, {}, {"miou": 0.65, "pixel_accuracy": 0.9}, parts=parts)
        for stage in ("teacher", "distill")
    ]
    content, found = written(tmp_path, models, "segmentation", ("road", "sky"), **{"tiny, seed 0": noise})
    assert [one["name"] for one in content["by_part"]["IoU"]] == ["road", "sky"]
    [sheet] = [one for one in found.images if one["alt"].startswith("Examples")]
    data = base64.b64decode(sheet["src"].partition(",")[2])
    assert len(data) <= page.SHEET_BYTES and Image.open(io.BytesIO(data)).size == (500, 350)


def test_a_large_comparison_stays_small(tmp_path):
    models = classes(tmp_path, 1000, epochs=5000)[1:]
    _, found = written(tmp_path, models, "classification", tuple(f"class {n}" for n in range(1000)))
    assert (tmp_path / "compare.html").stat().st_size < 3 * MEGA
    assert "drawn are the 40 of 1000 that come out lowest" in found.words
    assert not [one for one in found.images if one["alt"].startswith("Confusion")]


def test_curves_are_thinned_to_their_own_points():
    points = [(float(n), n**0.5) for n in range(1001)]
    kept = plots.thinned(points)
    assert len(kept) == POINTS and kept[0] == points[0] and kept[-1] == points[-1] and set(kept) <= set(points)
    steps = np.diff([x for x, _ in kept])
    assert steps.min() >= 5 and steps.max() <= 6
    assert plots.thinned(points[:POINTS]) == points[:POINTS]


def test_long_names_that_differ_at_one_end_are_told_apart(tmp_path):
    models = compare.named_after("emotion_of_music", classes(tmp_path, 2, seeds=1))
    _, found = written(tmp_path, models, "classification", ("no", "yes"))
    whole = {f"emotion_of_music/{stage}" for stage in ("teacher", "pretrain", "distill")}
    drawn = [set(re.findall(r"<text[^>]*>([^<]*)</text>", one)) for one in vectors(found)]
    legends = [one for one in drawn if "false positive rate" in one or "training loss" in one]
    assert len(legends) == 2 and all(whole <= one for one in legends)
    assert [plots.short(name, 9) for name in ("abcdefghi", "abcdefghij")] == ["abcdefghi", "abcd…ghij"]
