"""A trained student becomes a package: every file proven, everything said of it true, whole or not there."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import contents, done, kd_dist, run, sentence, start, wait_until
from safetensors.torch import load_file, save_file

from kd_dist import assemble, export, places, train
from kd_dist.config import load, to_dict
from kd_dist.disk import file_digest
from kd_dist.errors import ExportError, RecipeError, TrainingError
from kd_dist.formats import FORMATS
from kd_dist.manifest import plain

PACKAGE = Path("runs/tiny/distill/seed-0/package")
QUICK = "export.formats=[safetensors]"


@pytest.fixture(scope="module")
def made(lab, tmp_path_factory) -> Path:
    """A user's folder with a distilled student."""
    folder = tmp_path_factory.mktemp("made") / "home"
    shutil.copytree(lab, folder)
    done(run(train.main, ["tiny.yaml", "--stage", "distill"], folder=folder))
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch) -> Path:
    """A copy of it to work on and to damage, without a package; the test itself works there, too."""
    shutil.copytree(made, tmp_path / "home", ignore=shutil.ignore_patterns("package*"))
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.syspath_prepend(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def exported(made) -> dict:
    """What `kd-dist export --json` says when it has written every format."""
    ended = run(kd_dist, "export", "tiny.yaml", "--json", "export.license=Apache-2.0", folder=made)
    said = done(ended)
    assert all(said.count(f"export {name}: ") == 2 for name in FORMATS)  # written, measured
    return json.loads(ended.stdout)  # nothing but JSON there


# ---------------------------------------------------------------------------------------------- what is written


@pytest.mark.slow
def test_every_format_is_written_and_is_the_student(made, exported):
    package = made / PACKAGE
    assert json.loads((package / "deployment_info.json").read_text()) == exported
    assert list(exported["files"]) == list(FORMATS) and len(FORMATS) == 8 and exported["not_written"] == {}
    evaluated = json.loads((made / "runs/tiny/distill/seed-0/evaluation-test.json").read_text())
    teacher = json.loads((made / "runs/tiny/teacher/seed-0/evaluation-test.json").read_text())
    assert exported["metrics"]["student"] == pytest.approx(evaluated["metrics"], rel=1e-6)
    assert exported["metrics"]["teacher"] == teacher["metrics"]
    assert (exported["metrics"]["split"], exported["metrics"]["examples"]) == ("test", 12)
    for name, one in exported["files"].items():
        assert (one["file"], one["int8"]) == (FORMATS[name].file, FORMATS[name].int8)
        assert one["sha256"] == file_digest(package / one["file"])
        alike = one["metrics"]["accuracy"] / teacher["metrics"]["accuracy"]
        assert one["retention"] == pytest.approx(alike) and one["kept"] >= 0.95
        assert one["memory_mb"] < 100
        for which in ("one_thread", "all_threads"):
            assert 0 < one["latency_ms"][which]["median"] <= one["latency_ms"][which]["p95"]
        if not one["int8"]:
            assert one["max_difference"] <= 1e-5 * max(1, one["largest_output"])
            assert one["metrics"] == pytest.approx(exported["metrics"]["student"], abs=1e-5)
    weights = (package / "model.safetensors").stat().st_size
    assert exported["files"]["safetensors"]["bytes"] == weights and (package / "config.json").is_file()
    assert {"MODEL_CARD.md", "SHA256SUMS"} <= {path.name for path in package.iterdir()}
    assert not list(package.parent.glob("package.*"))


@pytest.mark.slow
def test_what_is_said_of_a_student_is_so(made, exported, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(made)
    recipe = load("tiny.yaml", ["export.license=Apache-2.0"])
    assert exported["recipe"] == plain(to_dict(recipe))
    assert (exported["version"], exported["name"], exported["stage"], exported["seed"]) == (1, "tiny", "distill", 0)
    network = assemble.network(recipe, "student", "stage:distill", 0)
    parameters = sum(value.numel() for value in network.parameters())
    assert exported["model"]["parameters"] == parameters and exported["model"]["macs"] > 100
    given = exported["input"]
    assert (given["name"], given["shape"], given["view"]) == ("image", [1, 3, 8, 8], "centre")
    assert given["normalisation"] == {"mean": [0.0] * 3, "std": [1.0] * 3, "in_graph": True}
    assert given["resized_in_graph_to"] is None and exported["front_end"] is None
    assert exported["output"] == {"name": "logits", "shape": [1, 3], "range": None}
    assert exported["class_names"] == ["blue", "green", "red"] and exported["outputs"] is None
    assert exported["licences"] == {"weights": "Apache-2.0", "teacher": None, "data": None}
    assert exported["student"]["weights_sha256"] == file_digest(Path("runs/tiny/distill/seed-0/best.safetensors"))
    teacher = exported["teacher"]
    assert teacher["weights_sha256"] == file_digest(Path("runs/tiny/teacher/seed-0/best.safetensors"))
    assert (teacher["name"], teacher["model"]) == ("teacher", "tiny_model:network")
    assert teacher["cache"].keys() == exported["examples"].keys() == {"train", "val", "test"}
    result = json.loads(Path("runs/tiny/distill/seed-0/result.json").read_text())["identity"]
    assert (teacher["cache"]["train"], exported["examples"]["train"]) == (result["signals"], result["examples"])
    assert exported["made_with"].keys() >= {"kd_dist", "python", "torch", "onnxruntime", "executorch"}
    assert exported["machine"]["processor"] and exported["machine"]["threads"] >= 1


@pytest.mark.slow
def test_sha256sum_finds_every_file_as_it_was(made, exported):
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=made / PACKAGE, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    there = {name.removeprefix("./") for name in contents(made / PACKAGE)} - {"SHA256SUMS"}
    assert {line.removesuffix(": OK") for line in checked.stdout.splitlines()} == there and len(there) > 15


@pytest.mark.slow
def test_a_runtime_by_itself_says_what_the_student_says(made, exported, monkeypatch):
    """And what the golden examples say, which are those of the evaluation split."""
    import onnxruntime

    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(made)
    recipe = load("tiny.yaml")
    corridor = assemble.evaluation_corridor(recipe, "test", 0, 1, cached=False)
    [batch] = [corridor[number] for number in range(len(corridor))]
    images = (batch.images.float() / 255).numpy()
    with torch.no_grad():
        expected = assemble.network(recipe, "student", "stage:distill", 0).eval()(batch.images).numpy()
    session = onnxruntime.InferenceSession(PACKAGE / "model.onnx", providers=["CPUExecutionProvider"])
    said = session.run(None, {"image": images})[0]
    assert np.abs(said - expected).max() == pytest.approx(exported["files"]["onnx"]["max_difference"], abs=1e-7)
    assert exported["files"]["onnx"]["range"] == pytest.approx([said.min(), said.max()], abs=1e-6)
    cases = json.loads((PACKAGE / "golden/golden.json").read_text())["cases"]
    assert len(cases) == export.CASES
    for case in cases:
        given = np.fromfile(PACKAGE / "golden" / case["input"]["file"], "<f4").reshape(case["input"]["shape"])
        output = np.fromfile(PACKAGE / "golden" / case["output"]["file"], "<f4")
        [place] = [row for row, one in enumerate(images) if np.array_equal(one, given)]
        assert np.allclose(output, expected[place], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_what_calibrates_is_what_the_student_learnt_from(made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(made)
    recipe = load("tiny.yaml", ["export.calibration=12"])
    examples = export.calibration(recipe, export.trained(recipe))
    assert examples.shape == (12, 3, 8, 8) and examples.dtype == torch.float32
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    seen = torch.cat([corridor[step].images for step in range(3)])  # of the first epoch
    assert torch.equal((examples * 255).round().to(torch.uint8), seen[:12]) and len(seen) == 21
    every = export.calibration(load("tiny.yaml", ["export.calibration=1000"]), export.trained(recipe))
    assert len(every) == 2 * 21  # its epochs, no more


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.slow
def test_a_file_that_is_not_the_student_is_not_written(home):
    words = ["tiny.yaml", "export.formats=[onnx, safetensors]", "export.limits.parity=1e-12"]
    ended = run(kd_dist, "export", *words, folder=home)
    said = sentence(ended)
    assert said.startswith("not written: onnx: differs from the student by ") and ended.status == 1
    assert said.endswith("e-08, and export.limits.parity 1e-12 allows 1.0e-12")
    info = json.loads((PACKAGE / "deployment_info.json").read_text())
    assert list(info["files"]) == ["safetensors"] and said == f"not written: onnx: {info['not_written']['onnx']}"
    assert not (PACKAGE / "model.onnx").exists() and (PACKAGE / "model.safetensors").is_file()
    assert "safetensors" in ended.stdout and "onnx" not in ended.stdout  # the table
    # Where nothing is left there is no package, and that of before stays.
    before = contents(PACKAGE)
    nothing = run(kd_dist, "export", *words, "export.formats=[onnx]", folder=home)
    assert sentence(nothing) == said
    assert contents(PACKAGE) == before and not list(PACKAGE.parent.glob("package.*"))


@pytest.mark.slow
def test_a_student_that_cannot_be_written_in_a_format(home):
    """One whose path through its layers depends on the values that it sees."""
    with open("tiny_model.py", "a") as file:
        file.write(
            "\n\nclass Moody(nn.Sequential):\n"
            "    def forward(self, images):\n"
            "        values = super().forward(images)\n"
            "        return values if values.sum() > 0 else 2 * values\n"
            "\n\ndef moody(classes, width=4):\n    return Moody(*network(classes, width))\n"
        )
    words = ["tiny.yaml", "student.model=tiny_model:moody", "name=moody", "data.shards=others"]
    shutil.copytree("shards/tiny", "others/moody")
    shutil.copytree("runs/tiny/teacher", "runs/moody/teacher")
    done(run(train.main, [*words, "--stage", "pretrain"], folder=home))
    words += ["export.stage=pretrain", "export.formats=[safetensors, torchscript]"]
    said = sentence(run(kd_dist, "export", *words, folder=home))
    assert said.startswith("not written: torchscript: this model cannot be written as torchscript (")
    info = json.loads(Path("runs/moody/pretrain/seed-0/package/deployment_info.json").read_text())
    assert list(info["files"]) == ["safetensors"] and "package." not in said


@pytest.mark.slow
def test_a_model_that_prints_spoils_neither_the_figures_nor_the_json(home):
    """Without ends of lines, too."""
    with open("tiny_model.py", "a") as file:
        file.write(
            "\n\nplain = network\n\n\ndef network(classes, width=4):\n    made = plain(classes, width)\n"
            "    made.register_forward_pre_hook(lambda *_: print('.', end=''))\n    return made\n"
        )
    ended = run(kd_dist, "export", "tiny.yaml", "export.formats=[safetensors]", "--json", folder=home)
    done(ended)
    assert list(json.loads(ended.stdout)["files"]) == ["safetensors"]


@pytest.mark.slow
def test_weights_that_are_not_finite_are_one_sentence(home):
    best = Path("runs/tiny/distill/seed-0/best.safetensors")
    save_file({name: value * np.nan for name, value in load_file(best).items()}, best)
    result = best.with_name("result.json")
    content = {**json.loads(result.read_text()), "best_sha256": file_digest(best)}  # as if it had ended so
    result.write_text(json.dumps(content))
    said = sentence(run(kd_dist, "export", "tiny.yaml", folder=home))
    assert said.startswith("the student's output for example '") and "is not finite, so there is nothing to" in said
    assert not list(best.parent.glob("package*"))


def test_what_cannot_be_exported_is_refused_before_anything_is_done(home, monkeypatch):
    before = contents(home)
    with pytest.raises(TrainingError) as refused:
        export.export(load("tiny.yaml", ["export.stage=pretrain"]))
    assert str(refused.value) == (
        "runs/tiny/pretrain/seed-0: the stage has not been trained to its end; run `kd-dist train RECIPE --stage "
        "pretrain` first"
    )
    with pytest.raises(TrainingError, match="runs/tiny/distill/seed-1: the stage has not been trained to its end"):
        export.export(load("tiny.yaml", ["seed=1"]))
    stage = "{model: teacher, losses: {cross_entropy: {}}, epochs: 2, batch_size: 8, lr: 1e-2}"
    with pytest.raises(RecipeError, match="stages: none trains a student, which could be exported; add one"):
        export.export(load("tiny.yaml", [f"stages={{teacher: {stage}}}"]))
    for name in ("onnxruntime", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ExportError) as refused:
        export.export(load("tiny.yaml"))
    assert str(refused.value) == (
        "export.formats: onnx, onnx_int8, onnx_dynamic_int8, executorch_int8 cannot be written without onnxruntime, "
        "torchao; run pip install 'kd_dist[export]', or choose other formats"
    )
    assert list(export.chosen(load("tiny.yaml", ["export.formats=[torchscript, safetensors]"]))) == [
        "safetensors",
        "torchscript",
    ]
    assert contents(home) == before


def test_the_last_stage_that_trains_a_student_is_exported(home):
    assert places.exported_stage(load("tiny.yaml")) == "distill"
    recipe = load("tiny.yaml", ["export.stage=pretrain", "seed=3"])
    assert places.package_folder(recipe, places.exported_stage(recipe)) == Path("runs/tiny/pretrain/seed-3/package")


# ---------------------------------------------------------------------------------------------- whole, or not there


@pytest.mark.slow
def test_a_kill_leaves_the_package_of_before(home):
    """Killed when files lie in the new folder; the next export clears it away."""
    done(run(kd_dist, "export", "tiny.yaml", QUICK, folder=home))
    before = contents(PACKAGE)
    child = start(kd_dist, "export", "tiny.yaml", "export.formats=[safetensors, onnx]", folder=home)
    wait_until(lambda: list(PACKAGE.parent.glob("package.*.tmp/model.*")), "that a file has been written")
    child.kill()
    assert contents(PACKAGE) == before and len(list(PACKAGE.parent.glob("package.*.tmp"))) == 1
    done(run(kd_dist, "export", "tiny.yaml", QUICK, "export.license=MIT", folder=home))
    assert not list(PACKAGE.parent.glob("package.*"))
    after = contents(PACKAGE)
    assert after.keys() == before.keys() and b'"weights": "MIT"' in after["deployment_info.json"]


@pytest.mark.slow
def test_a_signal_while_a_format_is_written_is_no_fault_of_the_format(home):
    child = start(kd_dist, "export", "tiny.yaml", "export.formats=[onnx, safetensors]", folder=home)
    wait_until(lambda: list(PACKAGE.parent.glob("package.*.tmp/model.onnx.*")), "that a file is being written")
    os.kill(child.process.pid, signal.SIGTERM)
    ended = child.wait()
    assert ended.status == 128 + signal.SIGTERM and ended.stdout == "" and "Traceback" not in ended.stderr
    said = "kd-dist export: stopped by SIGTERM before it had a result; run it again"
    assert ended.stderr.splitlines()[-1] == said
    assert not list(PACKAGE.parent.glob("package*"))


# ---------------------------------------------------------------------------------------------- other tasks


@pytest.mark.slow
def test_a_student_of_maps(scenery):
    done(run(train.main, ["scenes.yaml", "--stage", "pretrain"], folder=scenery))
    words = ["scenes.yaml", "export.stage=pretrain", "export.formats=[torchscript]"]
    done(run(kd_dist, "export", *words, folder=scenery))
    info = json.loads((scenery / "runs/scenes/pretrain/seed-0/package/deployment_info.json").read_text())
    assert (info["input"]["view"], info["input"]["shape"]) == ("whole", [1, 3, 16, 24])
    assert info["output"] == {"name": "logits", "shape": [1, 3, 4, 6], "range": None}
    assert info["class_names"] == ["ground", "left", "right"]
    assert {"miou", "pixel_accuracy"} <= info["files"]["torchscript"]["metrics"].keys()
    evaluated = json.loads((scenery / "runs/scenes/pretrain/seed-0/evaluation-val.json").read_text())["metrics"]
    assert info["files"]["torchscript"]["metrics"]["miou"] == pytest.approx(evaluated["miou"], abs=1e-6)
    best = scenery / "runs/scenes/pretrain/seed-0/best.safetensors"
    assert info["student"]["weights_sha256"] == file_digest(best)
