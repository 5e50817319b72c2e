"""A package is held to the recipe's limits; one that was changed, or is not this student's, does not pass."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from processes import contents, done, inside, kd_dist, run, sentence
from safetensors.torch import load_file, save_file

from kd_dist import check, export, train
from kd_dist.config import load
from kd_dist.disk import file_digest
from kd_dist.errors import DataError, ExportError, MismatchError, TrainingError
from kd_dist.recipe import Limits

PACKAGE = Path("runs/tiny/distill/seed-0/package")
FORMATS = "export.formats=[safetensors, onnx, onnx_dynamic_int8]"
CHECKS = ("retention", "size", "parity", "range", "latency", "memory", "golden")  # of each file


@pytest.fixture(scope="module")
def made(lab, tmp_path_factory) -> Path:
    """A user's folder with a package of three files."""
    folder = tmp_path_factory.mktemp("made") / "home"
    shutil.copytree(lab, folder)
    done(run(train.main, ["tiny.yaml", "--stage", "distill"], folder=folder))
    done(run(kd_dist, "export", "tiny.yaml", FORMATS, folder=folder))
    return folder


@pytest.fixture
def home(made, tmp_path, monkeypatch) -> Path:
    """A copy of it to damage; the test itself works there, too."""
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.syspath_prepend(tmp_path / "home")
    return tmp_path / "home"


def checked(*words: str) -> dict[tuple[str, str], check.Check]:
    lines = check.check(load("tiny.yaml", [FORMATS, "export.limits.retention=0.1", *words]))
    found = {(one.subject, one.what): one for one in lines}
    assert len(found) == len(lines)
    return found


def failed(*words: str) -> dict[tuple[str, str], str]:
    return {where: one.says for where, one in checked(*words).items() if not one.ok}


def edit(**more) -> None:
    """Change what deployment_info.json says of the file onnx, as if it had been written so."""
    path = PACKAGE / "deployment_info.json"
    info = json.loads(path.read_text())
    info["files"]["onnx"] |= more
    path.write_text(json.dumps(info))
    sum_again()


def sum_again() -> None:
    (PACKAGE / "SHA256SUMS").unlink()
    export.list_sums(PACKAGE)


@pytest.mark.slow
def test_the_command_says_it_line_by_line(made):
    words = ["tiny.yaml", FORMATS, "export.limits.retention=0.1"]
    before = contents(made)
    lines = done(run(kd_dist, "check", *words, folder=made)).splitlines()
    assert len(lines) == 2 + 3 * len(CHECKS) + 1 and lines[-1] == "23 checks, 0 failed"
    assert all(line.startswith("pass  ") for line in lines[:-1])
    ended = run(kd_dist, "check", *words, "export.limits.size_mb=0.001", "--json", folder=made)
    found = [check.Check(**one) for one in json.loads(ended.stdout)]
    large = [(one.subject, one.what, one.limit) for one in found if not one.ok]
    assert large == [(name, "size", 0.001) for name in ("onnx", "onnx_dynamic_int8")]
    assert ended.status == 1
    said = run(kd_dist, "check", *words, "export.limits.size_mb=0.001", folder=made)
    assert said.status == 1 and said.stdout.splitlines()[-1] == "23 checks, 2 failed"
    assert said.stdout.count("FAIL  ") == 2 and contents(made) == before


@pytest.mark.slow
def test_each_limit_fails_what_passes_it_by(home):
    """Every figure is known: a limit is met exactly, and missed by a hair."""
    info = json.loads((PACKAGE / "deployment_info.json").read_text())
    one = info["files"]["onnx"]
    values = {
        "retention": (one["retention"], 1.001),
        "size_mb": (one["bytes"] / 1e6, 0.999),
        "latency_ms": (one["latency_ms"]["one_thread"]["median"], 0.999),
        "memory_mb": (one["memory_mb"], 0.999),
    }
    for key, (value, worse) in values.items():
        what = key.partition("_")[0]
        for limit, ok in ((value, True), (value * worse, False), (None, True)):
            limits = Limits(**{"retention": None, "size_mb": None, "latency_ms": None, "memory_mb": None, key: limit})
            found = {line.what: line for line in check.measured("onnx", info, limits)}
            assert {name for name, line in found.items() if not line.ok} == (set() if ok else {what}), key
            assert found[what].limit == limit and found[what].measured == value
            assert limit is not None or found[what].says.endswith(", no limit")
    tighter = failed("export.limits.parity=1e-12")
    assert tighter.keys() == {("onnx", "parity"), ("onnx", "golden")} and "at most 1e-12" in tighter["onnx", "parity"]
    unknown = {**info, "files": {"onnx": {**one, "retention": None}}}
    [line] = [line for line in check.measured("onnx", unknown, Limits()) if line.what == "retention"]
    assert not line.ok
    assert line.says == (
        "unknown, at least 0.9; train the teacher and export again, or set export.limits.retention=null"
    )


@pytest.mark.slow
def test_files_that_are_not_as_they_were_written(home):
    model = PACKAGE / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    (PACKAGE / "golden/golden.json").unlink()
    (PACKAGE / "android/virus.sh").write_text("")
    found = failed()
    assert found["package", "files"] == (
        "android/virus.sh is foreign, golden/golden.json is missing, model.onnx is changed; run `kd-dist export` again"
    )
    assert found["package", "complete"] == "lacks golden/golden.json"
    assert found["onnx", "golden"].startswith("not run: ") and len(found) == 5
    info = PACKAGE / "deployment_info.json"
    info.write_text(info.read_text().replace("1", "2", 1))
    found = failed()
    assert found.keys() == {("package", "files")}  # what it says means nothing
    assert "deployment_info.json is changed, " in found["package", "files"]
    assert found["package", "files"].endswith("is missing, and 1 more; run `kd-dist export` again")
    shutil.rmtree(PACKAGE / "android")
    (PACKAGE / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(ExportError, match="package/SHA256SUMS: is damaged; run `kd-dist export` again"):
        checked()


@pytest.mark.slow
def test_what_a_package_lacks(home):
    shutil.rmtree(PACKAGE / "android")
    (PACKAGE / "MODEL_CARD.md").unlink()
    sum_again()
    assert failed() == {("package", "complete"): "lacks MODEL_CARD.md, android/"}
    wanted = failed("export.formats=[onnx, torchscript]")
    why = "was not asked for when the package was made; export it again"
    assert wanted.items() >= {("torchscript", "written"): why}.items() and len(wanted) == 2


@pytest.mark.slow
def test_golden_examples_are_run_now(home):
    """A file that was swapped for another student's, and all digests with it."""
    edit(max_difference=0.0)
    assert failed() == {}
    config = json.loads((PACKAGE / "config.json").read_text())
    other = {name: value * 1.01 for name, value in load_file(PACKAGE / "model.safetensors").items()}
    save_file(other, PACKAGE / "model.safetensors")
    sum_again()
    found = failed()
    assert found.keys() == {("safetensors", "golden")} and "4 examples run again: " in found["safetensors", "golden"]
    save_file({name: value * np.nan for name, value in other.items()}, PACKAGE / "model.safetensors")
    sum_again()
    assert failed()["safetensors", "golden"] == "4 examples run again: outputs are not finite"
    (PACKAGE / "config.json").write_text(json.dumps({**config, "model": "tiny_model:gone"}))
    sum_again()
    assert failed()["safetensors", "golden"].startswith("not run: ")


@pytest.mark.slow
def test_outputs_outside_the_range(home):
    info = json.loads((PACKAGE / "deployment_info.json").read_text())
    for bounds, lowest, highest, ok in (
        (None, -50.0, 50.0, True),
        (None, -50.0, float("inf"), False),
        ([-1, 1], -1.0, 1.00001, True),
        ([-1, 1], -1.0, 1.001, False),
        ([-1, 1], -1.001, 0.0, False),
    ):
        one = {**info["files"]["onnx"], "range": [lowest, highest]}
        made = {**info, "files": {"onnx": one}, "output": {**info["output"], "range": bounds}}
        [line] = [line for line in check.measured("onnx", made, Limits(retention=None)) if line.what == "range"]
        assert line.ok == ok, (bounds, lowest, highest)


@pytest.mark.slow
def test_a_package_of_another_student_is_refused(home):
    again = "run `kd-dist export` again, or restore the recipe"
    for word, place, its, ours in (
        ("evaluate.split=val", "evaluate.split", "'test'", "'val'"),
        ("student.options={width: 3}", "student.options.width", "2", "3"),
        ("views.size=9", "views.size.0", "8", "9"),
    ):
        with pytest.raises(MismatchError) as refused:
            checked(word)
        assert str(refused.value) == f"{PACKAGE}: was made with {place} = {its}, the recipe says {ours}; {again}"
    assert failed("student.taps={}", "views.flip=0.1", "export.license=MIT", "stages.distill.lr=1") == {}
    best = Path("runs/tiny/distill/seed-0/best.safetensors")
    before = file_digest(best)
    save_file({name: value + 1 for name, value in load_file(best).items()}, best)
    result = best.with_name("result.json")
    result.write_text(json.dumps({**json.loads(result.read_text()), "best_sha256": file_digest(best)}))
    with pytest.raises(MismatchError) as refused:
        checked()
    assert str(refused.value) == (
        f"{PACKAGE}: was made of weights with sha256 {before[:12]}, the stage has ended with "
        f"{file_digest(best)[:12]}; run `kd-dist export` again"
    )
    result.unlink()
    with pytest.raises(TrainingError, match="runs/tiny/distill/seed-0: the stage has not been trained to its end, so"):
        checked()


@pytest.mark.slow
def test_another_teacher_and_other_examples_are_refused(home):
    """Retention and metrics would be of what is no more. Where neither is at hand the package speaks for itself."""
    teacher = Path("runs/tiny/teacher/seed-0")
    best, result = teacher / "best.safetensors", teacher / "result.json"
    before, record = best.read_bytes(), result.read_text()
    save_file({name: value + 1 for name, value in load_file(best).items()}, best)
    result.write_text(json.dumps({**json.loads(record), "best_sha256": file_digest(best)}))
    with pytest.raises(MismatchError, match="package: was held to a teacher with sha256 .*; cache it, train distill"):
        checked()
    best.write_bytes(before)
    result.write_text(record)
    assert failed() == {}
    shutil.copytree("shards/tiny/val", "other")
    shutil.move("shards/tiny/test", "kept")
    shutil.move("other", "shards/tiny/test")
    with pytest.raises((MismatchError, DataError)):
        checked()
    shutil.rmtree("shards")
    shutil.rmtree(teacher)
    assert failed() == {}


@pytest.mark.slow
def test_without_a_package_there_is_nothing_to_check(made):
    said = sentence(run(kd_dist, "check", "tiny.yaml", "export.stage=pretrain", folder=made))
    assert said == "runs/tiny/pretrain/seed-0/package: holds no finished package; run `kd-dist export` first"
    with inside(made), pytest.raises(ExportError, match="seed-7/package: holds no finished package"):
        checked("seed=7")
