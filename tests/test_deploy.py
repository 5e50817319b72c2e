"""What lies beside the model files of a package: deployment_info.json, the model card, golden vectors."""

import io
import json
import re

import numpy as np
import pytest
from deployments import deployment
from PIL import Image

from kd_dist import deploy
from kd_dist.deploy.card import cell, model_card, table
from kd_dist.errors import KdError

PACKAGES = {
    "classification": deployment("classification"),
    "segmentation": deployment("segmentation", view="whole"),
    "regression": deployment("regression"),
    "sound": deployment("regression", (16, 30), sound=True),
}


def cases() -> list[deploy.Case]:
    chance = np.random.default_rng(0)
    picture = chance.integers(0, 256, (5, 4, 3), np.uint8)
    levels = chance.integers(0, 256, (3, 9), np.uint8)
    return [
        deploy.Case("case-0", picture, chance.random((3, 2, 2), np.float32), np.float32([0.5, -1.25])),
        deploy.Case("case-1", levels, chance.random((1, 3, 4), np.float32), np.float32([[[1e-9]]])),
    ]


def tables(card: str) -> list[list[list[str]]]:
    """The cells of each table of a page, by row."""
    found, rows = [], []
    for line in [*card.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([one.strip() for one in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            found.append(rows)
            rows = []
    return found


def figures(value: object) -> list[str]:
    """Every number and text in what JSON holds, numbers as the card shows them."""
    if isinstance(value, dict):
        return [one for child in value.values() for one in figures(child)]
    if isinstance(value, list):
        return [one for child in value for one in figures(child)]
    if value is None or isinstance(value, bool):
        return []
    if isinstance(value, float):
        return [f"{value:.4g}" if value < 1000 else f"{value:,.0f}"]
    return [f"{value:,}" if isinstance(value, int) else value]


@pytest.mark.parametrize("name", PACKAGES)
def test_the_card_has_every_figure(name):
    info = PACKAGES[name]
    card = model_card(info)
    told = {key: value for key, value in info.items() if key not in ("version", "recipe", "front_end", "input", "task")}
    told["input"] = {key: one for key, one in info["input"].items() if key not in ("shape", "view")}
    told["front_end"] = {key: one for key, one in (info["front_end"] or {}).items() if key != "sample_rate"}
    found = figures(told)
    assert len(found) >= 130
    assert [one for one in found if one not in card and cell(one) not in card] == []
    assert str(info["input"]["shape"]) in card
    assert str(info["output"]["shape"]) in card


@pytest.mark.parametrize("name", PACKAGES)
def test_every_table_of_the_card_is_one(name):
    found = tables(model_card(PACKAGES[name]))
    assert len(found) >= 9
    for rows in found:
        assert set(rows[1]) == {"---"}
        assert len({len(row) for row in rows}) == 1, rows


def test_a_figure_stands_under_its_heading():
    info = PACKAGES["classification"]
    found = {tuple(rows[0]): rows[2:] for rows in tables(model_card(info))}
    files = [f"`{one['file']}`" for one in info["files"].values()]
    metrics = found["metric", *files]
    assert metrics[0] == ["accuracy", "0.8125", "0.8115", "0.8105", "0.8095", "0.8085", "0.8075"]
    assert metrics[1][0] == "nll (lower is better)"
    assert metrics[-2][:2] == ["accuracy, share of the teacher's", "0.91"]
    speed = found["file", "one thread, ms", "p95", "all threads, ms", "p95", "memory, MB"]
    assert speed[1] == ["`model.torchscript`", "2.11", "3.22", "4.33", "5.44", "32.5"]
    judged = found["metric", "student", "teacher", "retention"]
    assert judged[0] == ["accuracy", "0.8125", "0.875", "0.9286"]
    assert judged[1] == ["nll (lower is better)", "0.4321", "0.3888", "0.8998"]


def test_a_metric_that_is_undefined_is_a_dash():
    found = [rows for rows in tables(model_card(PACKAGES["segmentation"])) if rows[0][:2] == ["metric", "student"]]
    assert found[0][-1] == ["iou/1", "-", "0.1", "-"]


def test_a_missing_licence_is_said_to_be_missing():
    card = model_card(PACKAGES["classification"])
    assert "| these weights | CC-BY-4.0 |" in card
    assert "| the teacher's weights | not stated: ask before you ship |" in card
    assert "| the training data | not stated: ask before you ship |" in card


def test_what_was_not_written_is_told_with_its_reason():
    card = model_card(PACKAGES["sound"])
    assert "| torch_export | the graph \\| breaks |" in card
    assert "| onnx_dynamic_int8 | keeps 0.61 of accuracy |" in card
    assert "| executorch | too \\| far |" in card
    assert "Not written" not in model_card({**PACKAGES["classification"], "not_written": {}})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("classification", "says which of 3 classes an image is of"),
        ("segmentation", "says of each pixel of an image which of 3 classes it is of"),
        ("regression", "says valence and arousal of an image"),
        ("sound", "says valence and arousal of a recording"),
    ],
)
def test_the_card_says_what_the_model_does(name, words):
    assert f"multiply-adds an input: it {words}." in model_card(PACKAGES[name])


def test_the_card_says_how_the_student_was_made():
    info = deployment()
    assert "distilled from first (timm/big_model), whose outputs were kept beforehand" in model_card(info)
    stage = info["recipe"]["stages"]["distill"]
    assert "| kd | 0.75 | temperature: 4.0 |" in model_card(info)
    assert "read by the source `camera`." in model_card(info)
    assert f"weights of first (timm/big_model): sha256 `{'t' * 64}`" in model_card(info)
    info["teacher"]["weights_sha256"] = None
    assert "weights of first (timm/big_model): random, it was given none" in model_card(info)
    stage |= {"teacher": "online", "generated": True}
    assert "read by the source `camera`, and generated ones without labels." in model_card(info)
    assert "distilled from first (timm/big_model), which was asked in every step" in model_card(info)
    stage["losses"] = {"cross_entropy": {"weight": {"start": 1.0, "end": 0.5}}}
    assert "trained on labels alone; no loss asks a teacher" in model_card(info)
    assert "| cross_entropy | start: 1.0, end: 0.5 |  |" in model_card(info)


def test_a_student_without_a_teachers_figures_or_class_names():
    info = deployment()
    info["metrics"] |= {"teacher": {}, "retention": None}
    info["class_names"] = None
    card = model_card(info)
    assert "Main metric: accuracy." in card
    assert "| accuracy | 0.8125 | - | - |" in card
    assert "The data give the classes no names; they are numbered from 0." in card


@pytest.mark.parametrize("text", ["a|b", "a\\", "\\|", "two\nlines", "<script>"])
def test_no_text_breaks_a_table(text):
    [rows] = tables(table(("one", "two"), [(text, "b")]))
    assert [len(row) for row in rows] == [2, 2, 2]
    assert rows[2][1] == "b"
    assert re.sub(r"\\(.)", r"\1", rows[2][0]) == text.replace("\n", " ")


def test_everything_is_written(tmp_path):
    info = PACKAGES["classification"]
    deploy.write(tmp_path, info, cases())
    assert json.loads((tmp_path / "deployment_info.json").read_text()) == info
    assert (tmp_path / "MODEL_CARD.md").read_text() == model_card(info)
    assert {path.name for path in tmp_path.iterdir()} == {"MODEL_CARD.md", "android", "deployment_info.json", "golden"}
    assert "public final class StudentInfo" in (tmp_path / "android" / "StudentInfo.java").read_text()


def test_a_class_whose_folder_has_no_utf8_name(tmp_path):
    info = {**deployment(), "class_names": ["caf\udce9", "\N{GRINNING FACE}", "c"]}
    deploy.write(tmp_path, info, [])
    assert json.loads((tmp_path / deploy.INFO).read_bytes())["class_names"] == info["class_names"]
    assert "| 0 | caf\\udce9 |\n| 1 | \N{GRINNING FACE} |" in (tmp_path / deploy.CARD).read_text("utf-8")


def test_golden_vectors_are_what_they_were(tmp_path):
    deploy.write(tmp_path, PACKAGES["classification"], cases())
    folder = tmp_path / "golden"
    listed = json.loads((folder / "golden.json").read_text())["cases"]
    assert [one["name"] for one in listed] == ["case-0", "case-1"]
    read = {"golden.json"}
    for one, case in zip(listed, cases(), strict=True):
        for step, values, dtype in (("input", case.input, "<f4"), ("output", case.output, "<f4")):
            assert one[step]["dtype"] == "float32"
            kept = np.frombuffer((folder / one[step]["file"]).read_bytes(), dtype).reshape(one[step]["shape"])
            assert np.array_equal(kept, values)
        original = (folder / one["original"]["file"]).read_bytes()
        if case.image.ndim == 3:
            kept = np.asarray(Image.open(io.BytesIO(original)))
        else:
            kept = np.frombuffer(original, np.uint8).reshape(one["original"]["shape"])
        assert np.array_equal(kept, case.image)
        read |= {one[step]["file"] for step in ("original", "input", "output")}
    assert {path.name for path in folder.iterdir()} == read
    assert {"case-0.png", "case-1.u8", "case-1.output.f32"} < read


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a b", "case-1"])
def test_a_case_whose_files_could_not_be_told_apart_is_refused(tmp_path, name):
    first, second = cases()
    with pytest.raises(KdError, match=f"no golden case can be called {re.escape(repr(name))}; give each case a name"):
        deploy.write(tmp_path, PACKAGES["classification"], [first._replace(name=name), second])
    assert not (tmp_path / "golden").exists()
