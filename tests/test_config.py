"""kd_dist.config and kd_dist.recipe: what is read, and every sentence about what cannot be."""

import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd_dist import recipe as sections
from kd_dist.checkpoint import save_weights, write_atomic
from kd_dist.config import load, to_dict
from kd_dist.errors import RecipeError, TrainingError

TEXT = """\
# A recipe for tests.
seed: 7
task:
  classes: 10
data:
  source: digits
  workers: 0
teacher:
  model: timm/convnet
  weights: stage:teach
views:
  size: 8
  crop_scale: [0.5, 1]
cache:
  # logits: fp32
student:
  model: timm/mobilenetv3_small_050
  options: {width: 1e1, deep: no}
stages:
  teach:
    model: teacher
    losses:
      cross_entropy:
    epochs: 2
    batch_size: 64
    lr: 3e-4
  pretrain: &pretrain
    losses:
      cross_entropy: {weight: 1}
    epochs: 3
    batch_size: 64
    lr: 1
  again: *pretrain
  distill:
    init: stage:pretrain
    losses:
      cross_entropy: {weight: 0.1}
      kd:
        weight: {step: {values: [.9, .5], every: 2}}
        temperature: 4
    epochs: 5
    batch_size: 64
    accumulate: 2
    lr: .01
    min_lr: 1.e-3
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a recipe as configs/pets.yaml below the working folder, and return that relative path."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()

    def write(text: str, path: str = "configs/pets.yaml") -> str:
        Path(path).write_text(text, encoding="utf-8")
        return path

    return write


def edited(old: str, new: str) -> str:
    assert TEXT.count(old) == 1, f"{old!r} must stand once in the recipe"
    return TEXT.replace(old, new)


def refusal(*arguments, **named) -> str:
    with pytest.raises(RecipeError) as caught:
        load(*arguments, **named)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- what is read


def test_reads_every_section_with_its_types_and_defaults(written):
    pretrain = sections.Stage(losses={"cross_entropy": {"weight": 1}}, epochs=3, batch_size=64, lr=1.0)
    kd = {"weight": {"step": {"values": [0.9, 0.5], "every": 2}}, "temperature": 4}
    expected = sections.Recipe(
        name="pets",
        seed=7,
        task=sections.Task(classes=10),
        data=sections.Data(source="digits", workers=0),
        teacher=sections.Teacher(model="timm/convnet", weights="stage:teach"),
        views=sections.Views(size=8, crop_scale=(0.5, 1.0)),
        cache=sections.Cache(logits="fp16", batch_size=64, threads=1),
        student=sections.Student(model="timm/mobilenetv3_small_050", options={"width": 10.0, "deep": "no"}),
        stages={
            "teach": sections.Stage(model="teacher", losses={"cross_entropy": {}}, epochs=2, batch_size=64, lr=3e-4),
            "pretrain": pretrain,
            "again": pretrain,
            "distill": sections.Stage(
                init="stage:pretrain",
                losses={"cross_entropy": {"weight": 0.1}, "kd": kd},
                epochs=5,
                batch_size=64,
                accumulate=2,
                lr=0.01,
                min_lr=0.001,
            ),
        },
        evaluate=sections.Evaluate(split="test", metric="accuracy"),
    )
    recipe = load(written(TEXT))
    assert recipe == expected
    assert list(recipe.stages) == ["teach", "pretrain", "again", "distill"]
    # Equality does not tell 1 from 1.0; a fingerprint does.
    assert json.dumps(to_dict(recipe)) == json.dumps(to_dict(expected))


def test_defaults_pass_their_own_bounds(written):
    """Writing every default out changes nothing, so no default is of another type or out of its range."""
    recipe = load(written(TEXT))
    text = json.dumps(to_dict(recipe), indent=1)
    assert load(written(text, "configs/again.yaml")) == recipe
    assert json.loads(text) == to_dict(recipe)


@pytest.mark.parametrize(
    "text, value",
    [
        *[("3e-4", 3e-4), ("3E+4", 3e4), ("1.5", 1.5), (".5", 0.5), ("2.", 2.0), ("-1.e3", -1000.0)],
        *[("7", 7), ("-7", -7), ("+7", 7), ("007", 7), ("9" * 18, int("9" * 18)), ("9" * 25, 1e25)],
        *[("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
        *[("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("1_000", "1_000"), ("0x10", "0x10")],
        *[("1:30", "1:30"), ("2026-11-21", "2026-11-21"), (".inf", ".inf"), (".nan", ".nan"), ("1e999", "1e999")],
        *[("e5", "e5"), (".", "."), ("1e", "1e"), ("'3e-4'", "3e-4"), ('"true"', "true"), ("''", "")],
        *[("[1, 2e0, a]", [1, 2.0, "a"]), ("{a: {b: null}, 1: x}", {"a": {"b": None}, "1": "x"}), ("[]", [])],
        *[("|\n      12\n", "12\n"), ("a b", "a b"), ("x#y", "x#y")],
    ],
)
def test_a_value_of_free_type_means_itself(written, text, value):
    found = load(written(edited("{width: 1e1, deep: no}", f"\n    x: {text}")))
    assert found.student.options == {"x": value}
    assert type(found.student.options["x"]) is type(value)


def test_a_plain_scalar_is_read_by_the_type_of_its_key(written):
    recipe = load(written(TEXT), ["name=2026", "data.root=3e-4", "runs=true", "stages.distill.clip=2", "views.flip=1"])
    assert (recipe.name, recipe.data.root, recipe.runs) == ("2026", "3e-4", "true")
    for value in (recipe.stages["distill"].clip, recipe.views.flip):
        assert type(value) is float
    assert load(written(TEXT), ["data.root=null", "stages.distill.clip="]).stages["distill"].clip is None
    assert load(written(TEXT), ["data.root='null'"]).data.root == "null"


def test_view_size_is_a_side_or_height_and_width(written):
    assert load(written(TEXT)).views.shape == (8, 8)
    assert load(written(TEXT), ["views.size=[6, 9]"]).views.shape == (6, 9)


def test_names_that_recipes_may_use(written):
    files = ["teacher.weights=w.bin", "student.weights=pretrained", "stages.distill.init=w.bin"]
    Path("w.bin").touch()
    models = ["timm/hf_hub:timm/resnet18.a1_in1k", "mine:build", "my.nets.small:Net_2"]
    for model in models:
        recipe = load(written(TEXT), [*files, f"student.model={model}", "data.source=my.raw:pets"])
        assert (recipe.student.model, recipe.data.source) == (model, "my.raw:pets")
    assert recipe.teacher.weights == recipe.stages["distill"].init == "w.bin"


# ---------------------------------------------------------------------------------------------- what is refused


SAFE = "is not a safe name; use 1 to 32 of A-Z a-z 0-9 _ -, a letter or digit first"
MODELS = "is not a model; write timm/<name>, torchvision/<name>, kd_dist/<name> or package.module:factory"
NEEDED = "is missing; training needs 'train' and 'val'"
FORMATS = "must be a text, fp32, fp16, uint16, uint8 or, of the largest, such as top20"
NO_CLASSES = "needs `classes`, their number, and has no outputs"
MAPPING = "must be a mapping of keys to values"
PLAIN = "is not allowed; a recipe holds plain values only"
FILE = "give a file, 'pretrained' or 'stage:<name>'"

# What stands in the recipe, what replaces it, how many lines below its first line the mistake is, the sentence.
KEYS = [
    ("  workers: 0", "  shardsize: 3", 0, "data: unknown key 'shardsize'; did you mean 'shard_size'?"),
    ("seed: 7", "sede: 7", 0, "unknown key 'sede'; did you mean 'seed'?"),
    ("    min_lr:", "    minlr:", 0, "stages.distill: unknown key 'minlr'; did you mean 'min_lr'?"),
    ("  classes: 10", "  x: 1", 0, "task: unknown key 'x'; known: classes, name, outputs, range"),
    ("task:\n  classes: 10\n", "", -1, "required key 'task' is missing"),
    ("  classes: 10", "  name: classification", -1, f"task: classification {NO_CLASSES}"),
    ("  classes: 10\n", "", -1, f"task: classification {NO_CLASSES}"),
    ("    lr: .01\n", "", -10, "stages.distill: required key 'lr' is missing"),
    ("  workers: 0", "  workers: 0\n  source: x", 1, "data: key 'source' is given twice; first at configs/pets.yaml:6"),
    ("  workers: 0", "  root: {a: 1, a: 2}", 0, "data.root: key 'a' is given twice; first at configs/pets.yaml:7"),
    ("  workers: 0", "  [a, b]: 0", 0, "data: a key must be a word, not a list or a mapping"),
]
TYPES = [
    ("    lr: .01", "    lr: fast", 0, "stages.distill.lr: must be a number, not 'fast'"),
    ("    lr: .01", "    lr: '0.01'", 0, "stages.distill.lr: must be a number, not '0.01'"),
    ("    lr: .01", "    lr:", 0, "stages.distill.lr: must be a number, not empty"),
    ("    lr: .01", "    lr: null", 0, "stages.distill.lr: must be a number, not 'null'"),
    ("    lr: .01", "    lr:\n      - 1", 0, "stages.distill.lr: must be a number, not [1]"),
    ("    lr: .01", "    lr: .inf", 0, "stages.distill.lr: must be a number, not '.inf'"),
    ("seed: 7", "seed: 1e3", 0, "seed: must be a whole number, not '1e3'"),
    ("seed: 7", "seed: true", 0, "seed: must be a whole number, not 'true'"),
    ("  workers: 0", "  block: x", 0, "data.block: must be a whole number or null, not 'x'"),
    ("  source: digits", "  source:", 0, "data.source: must be a text, not empty"),
    ("  source: digits", "  source: {a: 1}", 0, "data.source: must be a text, not {'a': 1}"),
    ("  # logits: fp32", "  logits: int8", 0, f"cache.logits: {FORMATS}, not 'int8'"),
    ("[0.5, 1]", "1", 0, "views.crop_scale: must be a list of 2 (a number, a number), not '1'"),
    ("[0.5, 1]", "[1]", 0, "views.crop_scale: must be a list of 2 (a number, a number), not [1]"),
    ("  # logits: fp32", "  - fp32", -1, f"cache: {MAPPING}, not ['fp32']"),
    ("  classes: 10", "  10", -1, f"task: {MAPPING}, not '10'"),
    ("task:\n  classes: 10", "task: null", 0, f"task: {MAPPING}, not 'null'"),
    ("{width: 1e1, deep: no}", "[a]", 0, f"student.options: {MAPPING}, not ['a']"),
    ("cross_entropy:\n", "cross_entropy: 0.5\n", 0, f"stages.teach.losses.cross_entropy: {MAPPING}, not '0.5'"),
]
RANGES = [
    ("  workers: 0", "  workers: -1", 0, "data.workers: must be a whole number, at least 0, not -1"),
    ("  workers: 0", "  lanes: 0", 0, "data.lanes: must be a whole number, at least 1, not 0"),
    ("  classes: 10", "  classes: 1", 0, "task.classes: must be a whole number, at least 2, not 1"),
    ("    lr: .01", "    lr: 0", 0, "stages.distill.lr: must be a number, above 0, not 0"),
    ("    min_lr: 1.e-3", "    min_lr: -1e-3", 0, "stages.distill.min_lr: must be a number, at least 0, not -0.001"),
    ("  size: 8", "  size: [8, 0]", 0, "views.size: must be a whole number, at least 1, not 0"),
    ("  size: 8", "  size: 8\n  flip: 1.5", 1, "views.flip: must be a number, between 0 and 1, not 1.5"),
    ("[0.5, 1]", "[0, 1]", 0, "views.crop_scale: must be a number, above 0, not 0"),
    ("  workers: 0", "  splits: {train: 0, val: 1}", 0, "data.splits.train: must be a number, above 0, not 0"),
]
PAIRS = [
    ("[0.5, 1]", "[1, 0.5]", 0, "views.crop_scale: the range must begin with its lower end, not 1 before 0.5"),
    (
        "crop_scale: [0.5, 1]",
        "crop_ratio: [2, 1]",
        0,
        "views.crop_ratio: the range must begin with its lower end, not 2 before 1",
    ),
    ("[0.5, 1]", "[1, 1.5]", 0, "views.crop_scale: a crop cannot cover more than the image: 1.5 is above 1"),
    ("workers: 0", "splits: {train: .8, val: .1, test: .2}", 0, "data.splits: the fractions must sum to 1, not 1.1"),
    ("workers: 0", "splits: {train: .8, test: .2}", 0, f"data.splits: split 'val' {NEEDED}"),
    ("workers: 0", "splits: {val: .8, test: .2}", 0, f"data.splits: split 'train' {NEEDED}"),
    ("workers: 0", "splits: {train: .8, val: .2}", -5, "evaluate.split: unknown split 'test'; known: train, val"),
    ("seed: 7", "evaluate: {split: tests}", 0, "evaluate.split: unknown split 'tests'; did you mean 'test'?"),
    (
        "source: digits",
        "source: digit",
        0,
        "data.source: 'digit' is neither a source nor package.module:factory; did you mean 'digits'?",
    ),
    ("timm/convnet", "convnet", 0, f"teacher.model: 'convnet' {MODELS}"),
    ("timm/mobilenetv3_small_050", "timm/", 0, f"student.model: 'timm/' {MODELS}"),
    ("timm/mobilenetv3_small_050", "my.nets:f()", 0, f"student.model: 'my.nets:f()' {MODELS}"),
    (
        "batch_size: 64\n    accumulate: 2",
        "batch_size: 63\n    accumulate: 2",
        0,
        "stages.distill.batch_size: 63 cannot be divided by accumulate, 2",
    ),
    ("min_lr: 1.e-3", "min_lr: 1", 0, "stages.distill.min_lr: 1 is above lr, 0.01"),
]
WEIGHTS = [
    (
        "init: stage:pretrain",
        "init: stage:pretrained",
        0,
        "stages.distill.init: unknown stage 'pretrained'; did you mean 'pretrain'?",
    ),
    (
        "init: stage:pretrain",
        "init: stage:teach",
        0,
        "stages.distill.init: stage 'teach' trains the teacher, not the student",
    ),
    (
        "init: stage:pretrain",
        "init: stage:distill",
        0,
        "stages.distill.init: stage 'distill' must stand above the stage that starts from it",
    ),
    ("init: stage:pretrain", "init: old.pt", 0, f"stages.distill.init: no file 'old.pt'; {FILE}"),
    (
        "weights: stage:teach",
        "weights: stage:distill",
        0,
        "teacher.weights: stage 'distill' trains the student, not the teacher",
    ),
    ("weights: stage:teach", "weights: old.pt", 0, f"teacher.weights: no file 'old.pt'; {FILE}"),
    ("  options: {width: 1e1, deep: no}", "  weights: old.pt", 0, f"student.weights: no file 'old.pt'; {FILE}"),
]
NAMES = [
    ("seed: 7", "name: pets.v2", 0, f"name: 'pets.v2' {SAFE}"),
    ("seed: 7", f"name: {33 * 'a'}", 0, f"name: '{33 * 'a'}' {SAFE}"),
    ("weights: stage:teach", "name: a/b", 0, f"teacher.name: 'a/b' {SAFE}"),
    ("  again: *pretrain", "  a b: *pretrain", 0, f"stages.a b: 'a b' {SAFE}"),
    ("workers: 0", "splits: {train: .8, val: .1, -x: .1}", 0, f"data.splits.-x: '-x' {SAFE}"),
]
LOSSES = [
    (
        "cross_entropy:\n",
        "cross_entropy: {label_smoothin: 0.1}\n",
        0,
        "stages.teach.losses.cross_entropy: unknown option 'label_smoothin'; did you mean 'label_smoothing'?",
    ),
    (
        "temperature: 4",
        "temperature: hot",
        -2,
        "stages.distill.losses.kd: option 'temperature' must be a number, not 'hot'",
    ),
    ("      kd:\n", "      kdd:\n", 0, "stages.distill.losses.kdd: unknown loss 'kdd'; did you mean 'kd'?"),
    ("    losses:\n      cross_entropy:\n", "    losses:\n", 0, "stages.teach.losses: at least one loss is needed"),
    (
        "cross_entropy:\n",
        "cross_entropy:\n      kd:\n",
        1,
        "stages.teach.losses.kd: needs a teacher's signals, and this stage trains the teacher",
    ),
]
YAML = [
    (
        "workers: 0",
        "workers: !!python/object/apply:os.getpid []",
        0,
        f"data.workers: tag 'tag:yaml.org,2002:python/object/apply:os.getpid' {PLAIN}",
    ),
    ("workers: 0", "options: {a: [1, !mine 2]}", 0, f"data.options.a: tag '!mine' {PLAIN}"),
    (
        "workers: 0",
        "options: &o {a: [*o]}",
        0,
        "data.options.a: an alias stands inside the value it names; write the value out",
    ),
    ("workers: 0", "workers: *nothing", 0, "not valid YAML: found undefined alias 'nothing'"),
    ("workers: 0", "workers: 0: 1", 0, "not valid YAML: mapping values are not allowed here"),
    ("workers: 0", "workers: @", 0, "not valid YAML: found character '@' that cannot start any token"),
    ("workers: 0", "workers: \x07", 0, "not valid YAML: special characters are not allowed"),
    ("workers: 0", "workers: 0\n---\na: 1", 1, "not valid YAML: but found another document"),
]
REFUSED = [*KEYS, *TYPES, *RANGES, *PAIRS, *WEIGHTS, *NAMES, *LOSSES, *YAML]


@pytest.mark.parametrize("old, new, below, sentence", REFUSED)
def test_a_recipe_that_cannot_be_is_refused_with_its_line(written, old, new, below, sentence):
    line = TEXT[: TEXT.index(old)].count("\n") + 1 + below
    assert refusal(written(edited(old, new))) == f"configs/pets.yaml:{line}: {sentence}"


def test_a_loss_for_another_number_of_classes_is_refused(written):
    message = refusal(written(edited("      kd:\n", "      kd_binary:\n")))
    assert message.startswith("configs/pets.yaml:38: stages.distill.losses.kd_binary: is for classification with ")
    assert load("configs/pets.yaml", ["task.classes=2"]).task.classes == 2


def test_two_classes_cannot_be_cached_as_uint8(written):
    path = written(edited("  # logits: fp32", "  logits: uint8"))
    sentence = "cache.logits: two classes store one margin, which 'uint8' cannot hold; use 'fp16' or 'fp32'"
    assert load(path).cache.logits == "uint8"
    assert refusal(path, ["task.classes=2"]) == f"configs/pets.yaml:15: {sentence}"


def test_an_online_teacher_does_not_know_its_largest_error(written):
    words = ["task={name: regression, outputs: [a, b]}", "stages.teach.losses={mse: {}}"]
    words += ["stages.pretrain.losses={mse: {}}", "stages.again.losses={mse: {}}", "stages.distill.losses={ail: {}}"]
    path = written(TEXT)
    assert load(path, words).stages["distill"].losses == {"ail": {}}
    assert load(path, [*words, "stages.distill.teacher=online", "stages.distill.losses.ail.eta=0.5"])
    sentence = (
        "stages.distill.losses.ail: needs `eta`, the teacher's largest squared error on the training set, which only a "
        "cache knows; write it, or train with `teacher: cached`"
    )
    for losses in ("{ail: {}}", "{mse: {}, ail: {eta: null, weight: 0.5}}"):
        online = [*words, "stages.distill.teacher=online", f"stages.distill.losses={losses}"]
        assert refusal(path, online) == f"command line: {sentence}"


IMAGES = "numbers, but images have red, green and blue; give three"
SPECTROGRAMS = "numbers, but spectrograms are grey; give one"


@pytest.mark.parametrize("section", ["teacher", "student"])
@pytest.mark.parametrize(("name", "one"), [("mean", 0), ("std", 0.25)])
def test_a_normalisation_has_a_number_for_each_channel(written, section, name, one):
    path, key, audio = written(TEXT), f"{section}.{name}", ["audio={mels: 8}", "views.crop_scale=[1, 1]"]

    def values(count):
        return f"{key}=[{', '.join([str(one)] * count)}]"

    given = load(path, [values(3)]), load(path, [*audio, values(1)])
    assert [getattr(getattr(recipe, section), name) for recipe in given] == [(one,) * 3, (one,)]
    assert all(type(value) is float for recipe in given for value in getattr(getattr(recipe, section), name))
    for count in (0, 1, 4):
        assert refusal(path, [values(count)]) == f"command line: {key}: has {count} {IMAGES}"
    for count in (0, 2, 3):
        assert refusal(path, [*audio, values(count)]) == f"command line: {key}: has {count} {SPECTROGRAMS}"


OF_AUDIO = ["audio={sample_rate: 8000, mels: 8}", "views.size=[8, 16]", "views.crop_scale=[1, 1]"]
ANOTHER_KIND = {  # of views: option -> a value, for recordings
    **{"gain": ("6", False), "time_mask": ("4", False), "band_mask": ("2", False)},
    **{"crop_scale": ("[0.5, 1]", True), "crop_ratio": ("[0.5, 2]", True), "flip": ("0.5", True)},
    **{"brightness": ("0.1", True), "contrast": ("0.1", True), "saturation": ("0.1", True)},
    **{"hue": ("0.1", True), "operations": ("2", True), "magnitude": ("[0, 1]", True), "blur": ("0.5", True)},
    **{"blur_sigma": ("[1, 2]", True), "erase": ("0.5", True), "erase_scale": ("[0.1, 0.2]", True)},
    **{"mixup": ("0.2", True), "cutmix": ("1", True), "mixed": ("0.5", True)},
}


@pytest.mark.parametrize("option", ANOTHER_KIND)
def test_views_of_another_kind_of_input_are_refused(written, option):
    value, of_images = ANOTHER_KIND[option]
    path, word = written(TEXT), f"views.{option}={value}"
    own, other = ([], OF_AUDIO) if of_images else (OF_AUDIO, [])
    load(path, [*own, word])
    what = "of images; this recipe has `audio`" if of_images else "of audio; this recipe has no `audio`"
    assert refusal(path, [*other, word]) == f"command line: views.{option}: is an option of views {what}"


def test_every_option_of_views_is_of_images_or_of_audio_or_of_both():
    options = {*ANOTHER_KIND, "self_blend", "count", "size", "seed"}
    assert {one.name for one in dataclasses.fields(sections.Views)} == options


def test_a_stage_has_not_the_name_of_a_teacher_that_is_given(written):
    said = refusal(written(TEXT.replace("  again:", "  given:")))
    assert re.search(r"pets.yaml:\d+: stages.given: is the name of a teacher that no stage trains; take another", said)


def test_self_blended_views_are_for_two_classes_of_images(written):
    path, word = written(TEXT), "views.self_blend=0.5"
    needs = "command line: views.self_blend: makes fakes of real faces; it is for a classification of two classes"
    assert refusal(path, [word]) == needs
    assert refusal(path, [*OF_AUDIO, word]) == needs
    assert load(path, [word, "task.classes=2"]).views.self_blend == 0.5


BANDS = "audio.fmax: the bands must lie between 0 and half the sample rate, 4000 Hz"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["views.size=[16, 8]"], "views.size: the first number, 16, must be audio.mels, 8: [mels, frames]"),
        (["views.size=16"], "views.size: the first number, 16, must be audio.mels, 8: [mels, frames]"),
        (["views.gain=0.1"], "views.gain: 0.1 dB is below one step of audio.db, or above its range of 100 dB"),
        (["views.gain=101"], "views.gain: 101 dB is below one step of audio.db, or above its range of 100 dB"),
        (["views.time_mask=17"], "views.time_mask: 17 is more than the 16 of views.size"),
        (["views.band_mask=9"], "views.band_mask: 9 is more than the 8 of views.size"),
        (["audio.db=[40, -60]"], "audio.db: must begin with its lower end, not 40 before -60"),
        (["audio.db=[40, 40]"], "audio.db: must begin with its lower end, not 40 before 40"),
        (["audio.fmax=4001"], BANDS),
        (["audio.fmin=4000"], BANDS),
        (["audio.fmin=500", "audio.fmax=500"], BANDS),
    ],
)
def test_a_front_end_that_cannot_be_is_refused(written, words, sentence):
    path = written(TEXT)
    load(path, [*OF_AUDIO, "views.time_mask=16", "views.band_mask=8", "audio.fmax=4000", "audio.fmin=3999"])
    assert refusal(path, [*OF_AUDIO, *words]) == f"command line: {sentence}"


def test_pretrained_weights_of_a_teacher_that_is_trained_are_its_stages(written):
    assert refusal(written(TEXT), ["teacher.weights=pretrained"]) == (
        "command line: teacher.weights: are what is cached, and the stage 'teach' would start from random ones; write "
        "stages.teach.init: pretrained, and here stage:teach"
    )
    assert load(written(TEXT), ["stages.teach.init=pretrained"]).stages["teach"].init == "pretrained"
    assert load(written(TEXT), ["stages.teach.init=pretrained", "teacher.weights=pretrained"])


def test_a_recipe_without_stages_is_refused(written):
    text = TEXT[: TEXT.index("stages:")].replace("  weights: stage:teach\n", "")
    assert refusal(written(text + "stages: {}")) == "configs/pets.yaml:18: stages: at least one stage is needed"


def test_an_unsafe_file_name_asks_for_a_name(written):
    assert refusal(written(TEXT, "configs/pets.v2.yaml")) == f"configs/pets.v2.yaml:2: name: 'pets.v2' {SAFE}"
    assert load("configs/pets.v2.yaml", ["name=pets"]).name == "pets"


ALL = "required keys 'task', 'data', 'teacher', 'views', 'student', 'stages' are missing"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", f"configs/pets.yaml:1: {ALL}"),
        ("# nothing yet\n", f"configs/pets.yaml:1: {ALL}"),
        ("- a\n", f"configs/pets.yaml:1: {MAPPING}, not ['a']"),
        ("pets", f"configs/pets.yaml:1: {MAPPING}, not 'pets'"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(written, text, sentence):
    assert refusal(written(text)) == sentence


def test_a_file_that_cannot_be_read_is_refused(written):
    assert refusal("configs/none.yaml") == "configs/none.yaml: the recipe cannot be read: No such file or directory"
    assert refusal("configs") == "configs: the recipe cannot be read: Is a directory"
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert refusal("latin.yaml") == "latin.yaml: the recipe cannot be read: not UTF-8 text (invalid continuation byte)"


# ---------------------------------------------------------------------------------------------- overrides


def test_overrides_replace_and_add(written):
    values = ["seed=8", "data.workers=3", "cache.logits=fp32", "monitor.logit_limit=5e2", "views.size=[4, 5]"]
    deeper = ["data.options.deep.a=b=c", "stages.distill.losses.kd.temperature=2", "task={classes: 7}", "seed=9"]
    recipe = load(written(TEXT), values + deeper)
    assert (recipe.seed, recipe.data.workers, recipe.cache.logits) == (9, 3, "fp32")
    assert (recipe.monitor.logit_limit, recipe.views.size, recipe.task.classes) == (500.0, (4, 5), 7)
    assert recipe.data.options == {"deep": {"a": "b=c"}}
    assert recipe.stages["distill"].losses["kd"]["temperature"] == 2
    assert recipe.stages["distill"].losses["kd"]["weight"] == {"step": {"values": [0.9, 0.5], "every": 2}}


def test_train_stands_for_the_chosen_stage(written):
    recipe = load(written(TEXT), ["train.lr=3e-2", "train.losses.kd.temperature=1", "stages.pretrain.lr=2"], "distill")
    before = load("configs/pets.yaml")
    assert recipe.stages["distill"].lr == 3e-2
    assert recipe.stages["distill"].losses["kd"]["temperature"] == 1
    assert recipe.stages["pretrain"].lr == 2.0
    assert recipe.stages["teach"] == before.stages["teach"]


def test_an_override_changes_one_place_of_what_an_alias_shares(written):
    recipe = load(written(TEXT), ["stages.again.losses.cross_entropy.weight=5"])
    assert recipe.stages["again"].losses == {"cross_entropy": {"weight": 5}}
    assert recipe.stages["pretrain"].losses == {"cross_entropy": {"weight": 1}}


EXPORTED = "executorch, executorch_int8, onnx, onnx_dynamic_int8, onnx_int8, safetensors, torch_export, torchscript"


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("data.worker=1", "data: unknown key 'worker'; did you mean 'workers'?"),
        ("dta.workers=1", "unknown key 'dta'; did you mean 'data'?"),
        ("data.workers.x=1", "data.workers: must be a whole number, not {'x': 1}"),
        ("data.workers=many", "data.workers: must be a whole number, not 'many'"),
        ("data.workers=-1", "data.workers: must be a whole number, at least 0, not -1"),
        ("data.splits.train=0.9", f"data.splits: split 'val' {NEEDED}"),
        ("teacher.name=a.b", f"teacher.name: 'a.b' {SAFE}"),
        ("stages.distil.lr=1", "unknown stage 'distil'; did you mean 'distill'?"),
        ("train.lrr=1", "stages.distill: unknown key 'lrr'; did you mean 'lr'?"),
        ("train.lr=", "stages.distill.lr: must be a number, not empty"),
        ("train.losses={kd: {}, kdd: {}}", "stages.distill.losses.kdd: unknown loss 'kdd'; did you mean 'kd'?"),
        ("train.batch_size=3", "stages.distill.batch_size: 3 cannot be divided by accumulate, 2"),
        ("export.stage=distil", "export.stage: unknown stage 'distil'; did you mean 'distill'?"),
        ("export.stage=teach", "export.stage: stage 'teach' trains the teacher, not the student"),
        ("export.formats=[onnx, tflite]", f"export.formats: unknown format 'tflite'; known: {EXPORTED}"),
        ("export.formats=[onx]", "export.formats: unknown format 'onx'; did you mean 'onnx'?"),
        ("export.formats=[onnx, onnx]", "export.formats: names one of them twice: onnx, onnx"),
        ("export.limits.int8=2", "export.limits.int8: must be a number, above 0 and at most 1, not 2"),
        ("seed", "'seed' must have the form section.key=value"),
        ("seed=[1", "seed: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("data.options={a: 1, a: 2}", "data.options: key 'a' is given twice; first at command line"),
        ("seed=!!python/name:os.system 1", f"seed: tag 'tag:yaml.org,2002:python/name:os.system' {PLAIN}"),
    ],
)
def test_an_override_that_cannot_be_is_refused(written, override, sentence):
    assert refusal(written(TEXT), [override], "distill") == f"command line: {sentence}"


def test_the_chosen_stage_must_exist(written):
    path = written(TEXT)
    assert refusal(path, stage="distil") == "command line: unknown stage 'distil'; did you mean 'distill'?"
    message = "command line: train.lr: 'train.' stands for the chosen stage, and none is; write stages.<name>."
    assert refusal(path, ["train.lr=1"]) == message
    assert refusal(written("stages: 3"), stage="distill") == "command line: unknown stage 'distill'"


# ---------------------------------------------------------------------------------------------- a trained teacher


OF_RUN = {
    "model": "timm/vit_tiny_patch16_224",
    "options": {"img_size": [8, 8], "depth": 2},
    "image_size": 8,
    "mean": [0.5, 0.25, 0.125],
    "std": [1.0, 2.0, 4.0],
    "head": {"hidden": [8, 4], "dropout": 0.5},
}
FOLDER = "runs/old/distill/seed-3"
FROM_RUN = TEXT.replace("  model: timm/convnet\n  weights: stage:teach\n", f"  run: {FOLDER}\n")


def trained(which: str = "student", classes: int = 10, **more) -> Path:
    """The folder of a stage that has ended, as training leaves it."""
    folder = Path(FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = save_weights({"weight": torch.ones(3)}, folder / "best.safetensors")
    identity = {
        "stage": {"model": which},
        which: {**OF_RUN, **more},
        "task": {"name": "classification", "classes": classes, "outputs": [], "range": [-1.0, 1.0]},
    }
    write_atomic(folder / "result.json", json.dumps({"identity": identity, "best_sha256": sha256}))
    return folder


@pytest.mark.parametrize("which, more", [("student", {}), ("teacher", {"name": "other", "seed": 5})])
def test_a_trained_stage_is_a_teacher(written, which, more):
    folder, path = trained(which, **more), written(FROM_RUN)
    section = load(path).teacher
    assert section == sections.Teacher(
        model="timm/vit_tiny_patch16_224",
        options={"img_size": [8, 8], "depth": 2},
        weights=str(folder / "best.safetensors"),
        image_size=8,
        mean=(0.5, 0.25, 0.125),
        std=(1.0, 2.0, 4.0),
        head=sections.Head(hidden=(8, 4), dropout=0.5),
    )
    named = load(path, ["teacher.name=again", "teacher.seed=2"]).teacher
    assert named == dataclasses.replace(section, name="again", seed=2)
    text = json.dumps(to_dict(load(path)), indent=1)
    assert load(written(text, "configs/again.yaml")) == load(path)  # ordinary keys by now
    assert load(written(TEXT), [f"teacher={{run: {FOLDER}}}"]).teacher == section


def test_a_trained_stage_without_a_head_or_a_size_of_its_own(written):
    trained(options={}, image_size=None, mean=None, std=None, head=None)
    section = load(written(FROM_RUN)).teacher
    assert (section.image_size, section.mean, section.std, section.head, section.options) == (*[None] * 4, {})


WIDE = "teachers.wide={model: timm/wide}"
LISTENS = "stages.distill.teachers"
FEATURES = ["cache.features={f: {tap: a}}", "student.taps={f: b}", "stages.distill.losses={kd: {}, cosine: {}}"]
TEACHERS = [
    (["teachers.a/b={model: timm/wide}"], f"teachers.a/b: 'a/b' {SAFE}"),
    (["teachers.teacher={model: timm/wide}"], "teachers.teacher: is the name of the first teacher, teacher.name; "),
    (["teachers.again={model: timm/wide}"], "teachers.again: is the name of another row of reports, too; take "),
    (["teachers.given={model: timm/wide}"], "teachers.given: is the name of another row of reports, too; take "),
    (["teachers.wide={model: wide}"], "teachers.wide.model: 'wide' is not a model; write "),
    (["teachers.wide={model: timm/wide, name: x}"], "teachers.wide: unknown key 'name'"),
    (["teachers.wide={model: timm/wide, weights: a.pt}"], "teachers.wide.weights: no file 'a.pt'; "),
    (["teachers.wide={model: timm/wide, mean: [0]}"], "teachers.wide.mean: has 1 numbers, but images have red, "),
    (["teachers.wide={run: nowhere}"], "teachers.wide.run: nowhere has no finished result (result.json); "),
    (
        ["teachers.wide={model: timm/wide, weights: stage:teach}"],
        "teachers.wide.weights: no stage trains a further teacher; in place of model and weights give the folder of a "
        "trained one, such as `run: runs/<recipe>/<stage>/seed-1`",
    ),
    ([WIDE, f"{LISTENS}=[wid]"], f"{LISTENS}: unknown teacher 'wid'; did you mean 'wide'?"),
    ([WIDE, f"{LISTENS}=[wide, wide]"], f"{LISTENS}: names one of them twice: wide, wide"),
    ([WIDE, "stages.pretrain.teachers=[wide]"], "stages.pretrain.teachers: none of the losses listens to a teacher; "),
    ([WIDE, "stages.teach.teachers=[wide]"], "stages.teach.teachers: none of the losses listens to a teacher; "),
    (
        [WIDE, f"{LISTENS}=[wide]", *FEATURES],
        f"{LISTENS}: the losses read features, and only the first teacher's are cached; add 'teacher'",
    ),
    (
        [WIDE, f"{LISTENS}=[teacher, wide]", "task.classes=1000", "cache.logits=top20"],
        f"{LISTENS}: a mean needs the logits of every class, and the cache keeps the 20 largest (cache.logits: top20); "
        f"store them as fp16, or name one teacher",
    ),
]


@pytest.mark.parametrize("words, sentence", TEACHERS, ids=[sentence for _, sentence in TEACHERS])
def test_what_is_wrong_with_several_teachers(written, words, sentence):
    assert refusal(written(TEXT), words).startswith(f"command line: {sentence}")


def test_several_teachers(written):
    """Each by itself is the recipe's only one; features are those of the first, wherever it stands."""
    words = [WIDE, "teachers.deep={model: timm/deep, seed: 3}", f"{LISTENS}=[deep, teacher]", *FEATURES]
    recipe = load(written(TEXT), words)
    assert [recipe.teachers_of(stage) for stage in recipe.stages.values()] == [["teacher"]] * 3 + [["teacher", "deep"]]
    deep = recipe.with_teacher("deep")
    assert deep.teacher == sections.Teacher(name="deep", model="timm/deep", seed=3)
    assert (deep.teachers, deep.cache.features, recipe.with_teacher("teacher").cache) == ({}, {}, recipe.cache)


def test_a_trained_stage_is_a_further_teacher(written):
    folder = trained()
    path = written(edited("views:", f"teachers:\n  second: {{run: {folder}}}\nviews:"))
    second = load(path).with_teacher("second").teacher
    assert second == dataclasses.replace(load(written(FROM_RUN, "configs/one.yaml")).teacher, name="second")
    keys = "teachers.second"
    given = f"{keys}.run: says what {keys}.model is, which is given too; leave one of them out"
    assert refusal(path, [f"{keys}.model=timm/convnet"]) == f"configs/pets.yaml:12: {given}"
    other = f"{keys}.run: was trained for task.classes = 10, the recipe says 9; give a run of the same task"
    assert refusal(path, ["task.classes=9"]) == f"configs/pets.yaml:12: {other}"


@pytest.mark.parametrize(
    "name, value", [("model", "timm/convnet"), ("weights", "pretrained"), ("options", "{}"), ("head", "null")]
)
def test_a_trained_stage_and_a_key_that_it_brings(written, name, value):
    trained()
    path = written(FROM_RUN.replace("  run:", f"  {name}: {value}\n  run:"))
    sentence = f"teacher.run: says what teacher.{name} is, which is given too; leave one of them out"
    assert refusal(path) == f"configs/pets.yaml:10: {sentence}"
    assert refusal(written(FROM_RUN), [f"teacher.{name}={value}"]).endswith(sentence)


def test_a_stage_that_has_not_ended(written):
    path = written(FROM_RUN)
    sentence = (
        f"configs/pets.yaml:9: teacher.run: {FOLDER} has no finished result (result.json); train that stage to its "
        "end, or give the folder of one that is, such as runs/<recipe>/<stage>/seed-0"
    )
    assert refusal(path) == sentence
    (trained() / "result.json").unlink()
    assert refusal(path) == sentence
    assert refusal(path, ["teacher.run=[a]"]) == "command line: teacher.run: must be a text or null, not ['a']"
    assert refusal(path, ["teacher.run=null"]) == "configs/pets.yaml:8: teacher: required key 'model' is missing"


def test_a_stage_of_another_task(written):
    trained(classes=3)
    sentence = "teacher.run: was trained for task.classes = 3, the recipe says 10; give a run of the same task"
    assert refusal(written(FROM_RUN)) == f"configs/pets.yaml:9: {sentence}"


def test_what_a_trained_stage_has_left_is_damaged(written):
    path, folder = written(FROM_RUN), trained()
    best, result = folder / "best.safetensors", folder / "result.json"
    whole, said = best.read_bytes(), json.loads(result.read_text())
    advice = "delete its folder and train the stage again"

    def damaged() -> str:
        with pytest.raises(TrainingError) as caught:
            load(path)
        return str(caught.value)

    best.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert damaged() == f"{best}: is damaged, its sha256 has changed; {advice}"
    best.unlink()
    assert damaged() == f"{best}: is lost; {advice}"
    best.write_bytes(whole)
    load(path)
    result.write_text(result.read_text()[:40])
    assert damaged().startswith(f"{result}: is damaged (")
    for broken in ({"stage": {}}, {"stage": 3}, 3, {**said["identity"], "student": None}):
        result.write_text(json.dumps({**said, "identity": broken}))
        assert damaged().startswith(f"{result}: does not say what was trained (")


# ---------------------------------------------------------------------------------------------- over every key


def every_key(cls: type = sections.Recipe, keys: tuple[str, ...] = ()):
    """(keys, type with bounds) of every value a recipe can hold; the stage is `distill`."""
    for name, wanted in typing.get_type_hints(cls, include_extras=True).items():
        if wanted == dict[str, sections.Stage]:
            yield from every_key(sections.Stage, (*keys, name, "distill"))
        elif dataclasses.is_dataclass(wanted):
            yield from every_key(wanted, (*keys, name))
        elif wanted in (sections.Head | None, sections.Audio | None, sections.Gan | None):
            yield from every_key(typing.get_args(wanted)[0], (*keys, name))
        else:
            yield (*keys, name), wanted


def test_every_key_refuses_a_value_of_another_type(written):
    path, seen = written(TEXT), 0
    for keys, wanted in every_key():
        free = typing.get_origin(wanted) is dict
        name, wrong = ".".join(keys), "3" if free else "{no: 1}"
        assert refusal(path, [f"{name}={wrong}"]).startswith(f"command line: {name}: must be "), name
        seen += 1
    assert seen == 142


def test_every_bounded_value_refuses_what_is_below_it(written):
    path, seen = written(TEXT), 0
    for keys, wanted in every_key():
        name = ".".join(keys)
        if "Bound(" not in str(wanted) or typing.get_origin(wanted) is dict:
            continue
        lists = {
            "labels": "[-1, 1]",
            "noise": "[-1, 1]",
            "crop_scale": "[-1, 1]",
            "crop_ratio": "[-1, 1]",
            **dict.fromkeys(("magnitude", "blur_sigma", "erase_scale"), "[-1, 1]"),
            "std": "[1, 1, -1]",
            "hidden": "[8, -1]",
        }
        wrong = lists.get(keys[-1], "-1")
        assert re.fullmatch(
            rf"command line: {name}: must be (a (whole )?number, (at least (0.1|\d)|above [01]|between 0 and (0.5|1)|"
            "above 0 and (below|at most) 1|from 0 to 3|a multiple of 8), not -1|a text, "
            "(a size such as 20GB|fp32, .* such as top20), not '-1')",
            refusal(path, [f"{name}={wrong}"]),
        ), name
        seen += 1
    assert seen == 95


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["layer_decay=0.5", "backbone_lr=0.1"], "layer_decay: gives every block a factor of its own"),
        (["cycle_factor=2"], "cycle_factor: is the growth of cycles; give cycle_epochs, the length of the first"),
        (["cycle_epochs=9", "epochs=10", "warmup_epochs=1"], "cycle_epochs: 9 leaves no restart within the 9 epochs"),
        (["compile=true", "gradient_checkpointing=true"], "compile: decides itself what is computed again"),
        (["unfreeze={1: 2}"], "unfreeze: says what learns later; give train_last"),
        (["unfreeze={0: 2}", "train_last=0"], "unfreeze.0: must be an epoch after 0 and before 10, counted from 0"),
        (["unfreeze={2: 2, 1: 3}", "train_last=0"], "unfreeze.1: must be an epoch after 2 and before 10"),
        (["unfreeze={10: 2}", "train_last=0"], "unfreeze.10: must be an epoch after 0 and before 10"),
        (["unfreeze={late: 2}", "train_last=0"], "unfreeze.late: must be an epoch after 0 and before 10"),
        (["unfreeze={1: 2, 2: 2}", "train_last=0"], "unfreeze.2: must let more blocks learn than the 2 before it"),
        (["unfreeze={1: null, 2: 2}", "train_last=0"], "unfreeze.2: must let more blocks learn than the all before it"),
    ],
)
def test_options_of_training_that_do_not_go_together_are_refused(written, words, said):
    given = [f"stages.distill.{word}" for word in ("epochs=10", "warmup_epochs=0", *words)]
    assert refusal(written(TEXT), given).removeprefix("command line: ").startswith(f"stages.distill.{said}")


def test_views_side_by_side_that_do_not_fit_a_stage_are_refused(written):
    """Fresh views, of a stage without a teacher, are as many as are asked for."""

    def said(stage, *words):
        given = ["views.count=4", *(f"stages.{stage}.{word}" for word in ("warmup_epochs=0", *words))]
        return refusal(written(TEXT), given).removeprefix(f"command line: stages.{stage}.views_per_decode: ")

    words = ["epochs=10", "batch_size=10", "views_per_decode=5"]
    assert said("distill", *words) == "5 views side by side, of 4 that an example has (views.count); take no more"
    load(written(TEXT), ["views.count=4", *(f"stages.teach.{word}" for word in words)])
    assert said("distill", "epochs=9", "batch_size=10", "views_per_decode=3") == (
        "3 views side by side, and an example has 4 (views.count), no multiple of it: often one would stand beside "
        "itself; change one of the two"
    )
    assert said("distill", *words[:2], "views_per_decode=4") == (
        "the examples pass once in 4 epochs, which 10 are no multiple of: some would be shown more often than others; "
        "change one of the two"
    )
    assert said("teach", words[0], "batch_size=9", words[2]) == (
        "5 leaves fewer than two examples in a batch of 9; take larger batches"
    )
    words = ["epochs=8", "batch_size=8", "views_per_decode=4"]
    load(written(TEXT), ["views.count=4", *(f"stages.distill.{word}" for word in words)])


def test_options_of_training_that_go_together_are_taken(written):
    words = ["epochs=10", "warmup_epochs=1", "train_last=0", "unfreeze={2: 1, 5: null}", "layer_decay=0.75", "ema=0.99"]
    words += ["cycle_epochs=3", "cycle_factor=2", "gradient_checkpointing=true", "channels_last=true"]
    stage = load(written(TEXT), [f"stages.distill.{word}" for word in words]).stages["distill"]
    assert [stage.learning(epoch) for epoch in range(7)] == [0, 0, 1, 1, 1, None, None]


def test_a_section_that_may_be_null(written):
    def head(*words):
        return load(written(TEXT), words).teacher.head

    assert head() is None and head("teacher.head=null") is None
    assert head("teacher.head={}") == head("teacher.head=") == sections.Head(hidden=(512, 128), dropout=0.0)
    assert head("teacher.head={hidden: [8], dropout: 1}") == sections.Head(hidden=(8,), dropout=1.0)
    assert head("teacher.head.hidden=[4, 3, 2]").hidden == (4, 3, 2)
    for words, sentence in {
        "teacher.head=3": "teacher.head: must be a mapping of keys to values, not '3'",
        "teacher.head={hiden: [3]}": "teacher.head: unknown key 'hiden'; did you mean 'hidden'?",
        "teacher.head.hidden=[]": "teacher.head.hidden: must be a list, each a whole number, at least one, not []",
        "teacher.head.hidden=[8, 2.5]": "teacher.head.hidden: must be a list, each a whole number, not [8, 2.5]",
        "teacher.head.hidden=[8, 0]": "teacher.head.hidden: must be a whole number, at least 1, not 0",
    }.items():
        assert refusal(written(TEXT), [words]) == f"command line: {sentence}"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_recipe_is_read_or_refused_in_one_sentence(written, data):
    """Any piece cut out or put in: never another exception, and always a place."""
    at = data.draw(st.integers(0, len(TEXT)))
    cut = data.draw(st.integers(0, 20))
    put = data.draw(st.text("abe019.-:[]{}&*!|>'\"#, \n\t", max_size=6))
    path = written(TEXT[:at] + put + TEXT[at + cut :])
    try:
        load(path)
    except RecipeError as error:
        assert re.match(r"configs/pets\.yaml:\d+: ", str(error))


# ---------------------------------------------------------------------------------------------- features and metrics


@pytest.mark.parametrize(
    "words, sentence",
    [
        (
            ["cache.features={mid: {tap: a}}", "student.taps={mdi: b}"],
            "student.taps.mdi: cache.features keeps no feature 'mdi' to compare it with; did you mean 'mid'?",
        ),
        (
            ["cache.features={low_scale: {tap: a}}"],
            "cache.features.low_scale: 'low_scale' cannot name a feature; use 1 to 32 of a-z 0-9 _, a letter first, no "
            "'_scale' at the end",
        ),
        (["cache.features={logits: {tap: a}}"], "cache.features.logits: 'logits' cannot name a feature; use"),
        (
            ["cache.features={f: {tap: a, store: fp16, dither: true}}"],
            "cache.features.f.dither: is for int8, not for fp16",
        ),
        (["cache.features={f: {tap: a, pool: 0}}"], "cache.features.f.pool: must be a whole number, at least 1, not 0"),
        (
            ["cache.features={f: {tap: 'saliency(a.1)', pool: 2}}"],
            "cache.features.f.pool: 'saliency(a.1)' reads shares of places, which are none when pooled; leave `pool` "
            "out and name a smaller grid in the tap, as in saliency(PATH, 4x8)",
        ),
        (
            ["cache.features={f: {tap: 'attention(a.attn, 8x16)', pool: 2}}"],
            "cache.features.f.pool: 'attention(a.attn, 8x16)' reads shares of places, which are none when pooled; "
            "leave `pool` out and name a smaller grid in the tap, as in saliency(PATH, 4x8)",
        ),
        (
            ["evaluate.metric=miou"],
            "evaluate.metric: unknown metric 'miou' of classification; known: accuracy, ece, nll",
        ),
        (
            ["evaluate.metric=auc"],
            "evaluate.metric: 'auc' is for two classes, the task has 10; choose one of accuracy, nll, ece",
        ),
        (
            ["task={name: segmentation, classes: 256}", "evaluate.metric=miou"],
            "task.classes: a mask has room for 255 classes, not for 256",
        ),
        (
            [
                "stages.distill.losses={sp: {}}",
                "stages.distill.find_batch_size=true",
                "cache.features={f: {tap: a}}",
                "student.taps={f: b}",
            ],
            "stages.distill.find_batch_size: would change the result: 'sp' compares the rows of a micro-batch; leave "
            "it out, and give `accumulate`",
        ),
        (
            ["stages.distill.losses={cosine: {}}"],
            "stages.distill.losses.cosine: needs features: name them in cache.features and student.taps alike",
        ),
    ],
)
def test_features_and_metrics_that_cannot_be_are_refused(written, words, sentence):
    assert refusal(written(TEXT), words).startswith(f"command line: {sentence}")


def test_maps_may_be_pooled(written):
    for tap in ("a.1", "grid(a.1)", "saliency"):
        feature = load(written(TEXT), [f"cache.features={{f: {{tap: {tap}, pool: 2}}}}"]).cache.features["f"]
        assert (feature.tap, feature.pool) == (tap, 2)
    shares = load(written(TEXT), ["cache.features={f: {tap: 'saliency(a.1, 4x8)', pool: 1}}"]).cache.features["f"]
    assert shares.pool == 1
