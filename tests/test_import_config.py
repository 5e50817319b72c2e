"""An older configuration becomes a recipe that can be read, or one sentence says why not."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kd_dist.cli import app
from kd_dist.config import load
from kd_dist.errors import RecipeError
from kd_dist.import_config import Old, import_config
from kd_dist.losses import Objective
from kd_dist.losses.schedules import weight_at

OLD = {
    "image_size": 380,
    "batch_size": 32,
    "epoch": 25,
    "teacher_weights": "weights/FFc23.tar",
    "pretrained_student_weights": "output/mobilevit_*/weights/*.tar",
    "lr": 1e-3,
    "temperature": 3.0,
    "use_progressive_distillation": True,
    "alpha_start": 0.95,
    "alpha_end": 0.5,
    "progressive_epochs": 20,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with a teacher's weights and two files of a student, the second modified last."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["weights/FFc23.tar", "output/mobilevit_b/weights/3.tar"]):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
        os.utime(name, ns=(number, number))
    Path("output/mobilevit_a/weights/9.tar").mkdir(parents=True)  # a folder that matches is no file
    Path("output/mobilevit_a/weights/5.tar").touch()
    return tmp_path


def written(path: str = "config_SBI.json", **changed) -> Path:
    """The configuration, with these keys changed; `...` takes one out."""
    values = {name: value for name, value in {**OLD, **changed}.items() if value is not ...}
    Path(path).write_text(json.dumps(values))
    return Path(path)


def refusal(path: Path, out: Path | None = None) -> str:
    before = sorted(Path().rglob("*"))
    with pytest.raises(RecipeError) as caught:
        import_config(path, out)
    assert sorted(Path().rglob("*")) == before  # nothing is written
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- what it becomes


def test_a_student_that_is_pretrained_first(folder):
    out = import_config(written(pretrained_student_weights=...))
    assert out == Path("config_SBI.yaml")
    recipe = load(out)
    assert "source: face_frames\n" in out.read_text()
    assert (recipe.name, recipe.task.classes, recipe.views.size) == ("config_SBI", 2, 380)
    teacher = recipe.teacher
    assert (teacher.model, teacher.weights) == ("timm/tf_efficientnet_b4", OLD["teacher_weights"])
    assert (teacher.image_size, teacher.mean, teacher.std) == (380, (0.0,) * 3, (1.0,) * 3)
    assert (recipe.student.model, recipe.student.weights) == ("timm/mobilevitv2_200", "pretrained")
    assert list(recipe.stages) == ["pretrain", "distill"]
    pretrain, distill = recipe.stages.values()
    assert (pretrain.losses, pretrain.init) == ({"cross_entropy": {}}, None)
    assert (pretrain.lr, distill.lr, distill.init) == (1e-3, 5e-4, "stage:pretrain")
    assert all((one.epochs, one.batch_size) == (25, 32) for one in (pretrain, distill))


def test_a_student_that_was_pretrained_elsewhere(folder, capsys):
    out = import_config(written(), Path("sbi.yaml"))
    recipe = load(out)
    [distill] = recipe.stages.values()
    assert (recipe.name, recipe.student.weights) == ("sbi", None)
    assert (distill.init, distill.lr) == ("output/mobilevit_a/weights/5.tar", 1e-3)  # modified last
    assert capsys.readouterr().err == (
        "config_SBI.json: pretrained_student_weights: 2 files match, of which output/mobilevit_a/weights/5.tar was "
        "modified last\n"
    )
    assert "Which stage lr, 0.001, is for: the distillation, the only one." in out.read_text()


def test_the_label_gives_way_to_the_teacher(folder):
    stage = load(import_config(written())).stages["distill"]
    hard, soft = stage.losses["cross_entropy"]["weight"], stage.losses["kd_binary"]["weight"]
    assert hard == {"linear": {"start": 0.95, "end": 0.5, "over": 20}}
    assert soft == {"linear": {"start": 0.05, "end": 0.5, "over": 20}}  # not 0.050000000000000044
    assert stage.losses["kd_binary"]["temperature"] == 3
    for epoch, a in ((0.0, 0.95), (10.0, 0.725), (20.0, 0.5), (24.9, 0.5)):
        assert weight_at(hard, epoch, stage.epochs) == pytest.approx(a)
        assert weight_at(hard, epoch, stage.epochs) + weight_at(soft, epoch, stage.epochs) == pytest.approx(1)
    Objective(stage.losses, stage.epochs)


def test_without_progress_the_share_is_constant(folder):
    path = written(use_progressive_distillation=False, alpha_start=0.7, alpha_end=..., progressive_epochs=...)
    out = import_config(path)
    losses = load(out).stages["distill"].losses
    assert losses == {"cross_entropy": {"weight": 0.7}, "kd_binary": {"weight": 0.3, "temperature": 3}}
    assert "# * What a is without progress: alpha_start, all the time." in out.read_text()


def test_the_header_says_where_it_comes_from_and_what_is_not_known(folder, capsys):
    text = import_config(written(device="cuda:0\n", workers=8), Path("my sbi (1).yaml")).read_text()
    header = text[: text.index("name:")].splitlines()
    assert all(line.startswith("#") for line in header)
    said = "\n".join(header)
    for words in ("from config_SBI.json", "data.root", '"device": "cuda:0\\n"\n', '"workers": 8', "(adamw)", "T^2"):
        assert words in f"{said}\n", words
    assert capsys.readouterr().err.count("unknown key '") == 2
    assert load("my sbi (1).yaml").name == "my_sbi_1_"


@pytest.mark.parametrize("name", ["w: #1 {a}.tar", 'quo"te.tar', "[0-9].tar", "ünï 🙂.tar", f"{'long ' * 30}.tar"])
def test_a_path_of_any_kind(folder, name):
    Path(name).touch()
    recipe = load(import_config(written(teacher_weights=name, pretrained_student_weights=name)))
    assert recipe.teacher.weights == recipe.stages["distill"].init == name


# ---------------------------------------------------------------------------------------------- what cannot be

WRONG = [
    ({"teacher_weights": "no/*.tar"}, "teacher_weights: 'no/*.tar' matches no file; run where the path begins, or"),
    ({"teacher_weights": "weights"}, "teacher_weights: 'weights' matches no file; run where"),
    ({"teacher_weights": ""}, "teacher_weights: '' matches no file; run where"),
    ({"pretrained_student_weights": "o/**/*.pt"}, "pretrained_student_weights: 'o/**/*.pt' matches no file; run where"),
    ({"tempature": 3}, "unknown key 'tempature'; did you mean 'temperature'?"),
    ({"epochs": 3}, "unknown key 'epochs'; did you mean 'epoch'?"),
    ({"alpha_end": ...}, "key 'alpha_end' is missing; use_progressive_distillation needs it"),
    ({"progressive_epochs": None}, "key 'progressive_epochs' is missing; use_progressive_distillation needs it"),
    ({"lr": 0}, "lr: must be a number, above 0, not 0"),
    ({"lr": "1e-3"}, "lr: must be a number, not '1e-3'"),
    ({"epoch": 2.5}, "epoch: must be a whole number, not 2.5"),
    ({"image_size": 0}, "image_size: must be a whole number, at least 1, not 0"),
    ({"temperature": 0.01}, "temperature: must be a number, between 0.1 and 100, not 0.01"),
    ({"alpha_start": 1.5}, "alpha_start: must be a number, between 0 and 1, not 1.5"),
    ({"use_progressive_distillation": 1}, "use_progressive_distillation: must be true or false, not 1"),
    ({"teacher_weights": 3}, "teacher_weights: must be a text, not 3"),
]


@pytest.mark.parametrize(("changed", "sentence"), WRONG, ids=[sentence[:45] for _, sentence in WRONG])
def test_what_cannot_be_meant_is_one_sentence(folder, changed, sentence):
    assert refusal(written(**changed)).startswith(f"config_SBI.json: {sentence}")


OPTIONAL = {"pretrained_student_weights", "alpha_end", "progressive_epochs"}


def test_every_other_key_is_required(folder):
    assert OLD.keys() == Old.__dataclass_fields__.keys()
    required = OLD.keys() - OPTIONAL
    assert len(required) == 8
    for name in required:
        assert refusal(written(**{name: ...})) == f"config_SBI.json: required key '{name}' is missing"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no JSON (Expecting property name"),
        ('{"lr": NaN}', "is no JSON (NaN is no number); correct it"),
        ('{"lr": 1, "lr": 2}', "is no JSON (key 'lr' is given twice); correct it"),
        ("[1]", "must be an object of keys and values, not a list"),
        (b"\xff\xfe", "is no JSON ("),
        ("[" * 100_000, "is no JSON ("),
    ],
)
def test_a_file_that_is_no_configuration(folder, text, sentence):
    path = Path("config_SBI.json")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert refusal(path).startswith(f"config_SBI.json: {sentence}")


def test_a_file_that_is_not_there_and_one_that_is(folder):
    assert refusal(Path("none.json")) == "none.json: cannot be read: No such file or directory"
    path, out = written(), Path("config_SBI.yaml")
    out.write_text("mine")
    sentence = "config_SBI.yaml: is there already; give another file with --out, or move it away"
    assert refusal(path) == refusal(path, out) == sentence
    assert out.read_text() == "mine"


def test_the_command(folder):
    written(pretrained_student_weights="")
    ended = CliRunner().invoke(app, ["import-config", "config_SBI.json", "--out", "recipes/sbi.yaml"])
    assert ended.exit_code == 0, ended.output
    assert ended.stdout == "recipes/sbi.yaml: written; its first lines say what config_SBI.json does not\n"
    assert list(load("recipes/sbi.yaml").stages) == ["pretrain", "distill"]
