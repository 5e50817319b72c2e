"""losses/served.py: what a cache serves, and what is refused before training begins; at the end a cache of top-K logits
from packing to a trained student."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, picture
from processes import done, inside, run, sentence

from kd_dist import assemble, cache_teacher, journey, train
from kd_dist.batch import TopLogits
from kd_dist.config import load
from kd_dist.errors import MismatchError, RecipeError
from kd_dist.losses import LOSSES, suits
from kd_dist.losses.served import KD, codec_problem, error_at, exactly, nearly, refuse_unserved
from kd_dist.signals import codec_of

FINE = {"1": 0.001, "2": 0.01, "4": 0.04, "8": 0.3}


def about(codec="top20", errors=FINE, **more):
    """The part of a manifest that counts."""
    exact = ["cross_entropy", "hard_label"] if codec.startswith("top") else ["cross_entropy", "kd"]
    said = {} if errors is None else {"gradient_error": errors}
    lists = {"exact_losses": exact, "near_losses": ["kd"] if codec.startswith("top") else []}
    return {"codec": {"logits": codec}, "codec_error": {"logits": said}, **lists, **more}


def test_other_largest_logits_and_a_wrong_tail_are_refused_at_every_temperature():
    def measured(codec, **error):
        return about(codec, codec_error={"logits": error})

    refuse_unserved({"hard_label": {}}, measured("uint8", top_class_agreement=0.96), "here")
    refuse_unserved({"kd": {}}, measured("top20", tail_error=0.019), "here")
    with pytest.raises(MismatchError, match="^here.hard_label: the largest logit, stored as uint8, is another class's"):
        refuse_unserved({"hard_label": {}}, measured("uint8", top_class_agreement=0.9), "here")
    with pytest.raises(MismatchError, match="^here.kd: the mass of the classes that top20 leaves out is off by 3.0%; "):
        refuse_unserved({"kd": {}}, measured("top20", tail_error=0.03), "here")
    with pytest.raises(MismatchError, match="^here.dist: at temperature 1 the gradient from logits stored as uint8"):
        refuse_unserved({"dist": {"temperature": 1}}, measured("uint8", gradient_error={"1": 0.1}), "here")


def test_what_a_codec_serves():
    suited = {name: row for name, row in LOSSES.items() if suits(row, "classification", 1000)}
    on_logits = {"cross_entropy", "kd", "logit_mse", "hard_label", "logit_std", "dkd", "dist"}
    assert {name for name, row in suited.items() if exactly(row, "fp16")} == on_logits
    assert {name for name, row in suited.items() if exactly(row, "top20")} == {"cross_entropy", "hard_label"}
    assert {name for name, row in suited.items() if nearly(row, "top20")} == {"kd"}
    assert not any(nearly(row, "uint8") for row in suited.values())


@pytest.mark.parametrize(
    "losses, codec",
    [
        ({"kd": {"temperature": 4}}, "top20"),
        ({"kd": {}}, "top20"),
        ({"kd": {"temperature": 4.1}, "hard_label": {}, "cross_entropy": {}, "cosine": {}}, "top20"),
        ({"dkd": {}, "dist": {}, "kd": {"temperature": 0.5}}, "fp16"),  # newer losses than the manifest
    ],
)
def test_what_is_served_passes(losses, codec):
    refuse_unserved(losses, about(codec), "here")
    if codec == "fp16":
        refuse_unserved(losses, about(codec, errors=None), "here")  # an older manifest


@pytest.mark.parametrize(
    "losses, codec, message",
    [
        (
            {"kd": {"temperature": 8}},
            "top20",
            "here.kd: at temperature 8 the gradient from logits stored as top20 is off by 30%, as measured when they "
            "were cached; 5% may be: take a temperature of 4 or less, keep more of the logits, or store all of them as "
            "fp16",
        ),
        ({"kd": {"temperature": 8}}, "uint8", "here.kd: at temperature 8 the gradient from logits stored as uint8"),
        ({"kd": {"temperature": 16}}, "uint8", "here.kd: at temperature 16 the gradient from logits stored as"),
        ({"kd": {"temperature": 16}}, "top20", "here.kd: at temperature 16 needs the logits of every class: those of "),
        ({"kd": {"temperature": 0.5}}, "top20", "here.kd: at temperature 0.5 needs the logits of every class:"),
        (
            {"hard_label": {}, "dist": {}},
            "top20",
            "here.dist: needs the logits of every class, and the cache keeps the 20 largest (cache.logits: top20); "
            "store them as fp16, or use kd or hard_label",
        ),
        ({"dkd": {}}, "top20", "here.dkd: needs the logits of every class"),
        ({"logit_mse": {}}, "top20", "here.logit_mse: needs the logits of every class"),
    ],
)
def test_what_is_not_is_refused(losses, codec, message):
    with pytest.raises(MismatchError) as caught:
        refuse_unserved(losses, about(codec), "here")
    assert str(caught.value).startswith(message)


def test_a_loss_that_the_manifest_does_not_list_is_refused():
    with pytest.raises(MismatchError, match="here.kd: is not among the losses that this cache serves: cross_entropy$"):
        refuse_unserved({"kd": {}}, about(exact_losses=["cross_entropy"], near_losses=[]), "here")


OUTLIER = -1e13  # of one logit: what the steps of a codec with a scale are spread over
STORED = [("uint8", (20,)), ("uint16", (20,)), ("uint8", (20, 4, 3)), ("uint16", (20, 4, 3))]
EXACT = [("fp32", (20,)), ("fp16", (20,)), ("fp32", (2,)), ("fp16", (2,)), ("fp16", (20, 4, 3)), ("fp16", (2, 4, 3))]


def manifest_of(name: str, shape: tuple[int, ...], outlier: float) -> dict:
    """What a manifest would say of 50 answers of a teacher, one logit of which may lie far below the others."""
    codec = codec_of("classification", name, shape[0], shape[1:] or None)
    logits = 2 * np.random.default_rng(0).normal(size=(50, *shape)).astype(np.float32)
    logits[:, 0] += outlier
    fields, storable = codec.encode(logits)
    assert storable.all()
    rows = np.zeros(50, codec.fields())
    for field, values in fields.items():
        rows[field] = values
    return about(name, codec.report(codec.error(logits, codec.decode(rows)))["gradient_error"])


@pytest.mark.parametrize("name, shape", [*STORED, *EXACT])
def test_what_every_codec_was_measured_to_lose_decides_what_it_serves(name, shape):
    """Of a teacher that says the usual any codec serves every temperature. Where one logit is far off, those with a
    scale have no steps left for the others; those without one still serve."""
    losses = {loss: {} for loss, row in LOSSES.items() if suits(row, "classification", shape[0])}
    if shape[1:]:
        losses = {"kd_pixel": {}, "cross_entropy": {}}
    told = [{loss: losses[loss] | {"temperature": T} for loss in set(losses) & set(KD)} for T in (1, 2, 4, 8)]
    assert all(told)
    for said in (losses, *told):
        refuse_unserved(said, manifest_of(name, shape, 0), "here")
    far = manifest_of(name, shape, -6e4 if "fp16" in name else OUTLIER)
    if (name, shape) in EXACT:
        refuse_unserved(told[3], far, "here")
        return
    for said in told:
        with pytest.raises(MismatchError, match=rf"the gradient from logits stored as {name} is off by \d+%, as meas"):
            refuse_unserved(said, far, "here")
    refuse_unserved({"cross_entropy": {}}, far, "here")


def test_the_error_between_two_temperatures_is_on_a_line():
    assert error_at(FINE, 3) == pytest.approx(0.025) and error_at(FINE, 6) == pytest.approx(0.17)
    assert (error_at(FINE, 0.5), error_at(FINE, 20)) == (0.001, 0.3)


def test_a_recipe_is_judged_before_there_is_a_cache():
    assert codec_problem(LOSSES["kd"], {}, "top20") is None and codec_problem(LOSSES["kd"], {}, "fp16") is None
    assert "those of cache.logits: top20 are known from 1 to 8" in codec_problem(
        LOSSES["kd"], {"temperature": 9}, "top20"
    )
    assert codec_problem(LOSSES["cosine"], {}, "top20") is None


# ------------------------------------------------------------------------------- from pictures to a trained student

CLASSES, KEPT = 60, 8
SHARP = '''

class Sharp(nn.Sequential):
    """A network that is sure of a few classes."""

    def forward(self, images):
        return 80 * super().forward(images)


def sharp(classes, width=8):
    return Sharp(*network(classes, width))
'''
RECIPE = f"""\
task: {{classes: {CLASSES}}}
data: {{source: image_folder, root: pictures, splits: {{train: 0.6, val: 0.2, test: 0.2}}, shard_size: 64, workers: 0}}
views: {{count: 2, size: 8, crop_scale: [0.5, 1], flip: 0.5, mixup: 1.0, cutmix: 1.0, mixed: 0.5}}
teacher: {{model: "tiny_model:sharp", weights: null}}
cache: {{logits: top{KEPT}}}
student: {{model: "tiny_model:network", options: {{width: 2}}}}
stages:
  distill:
    losses: {{cross_entropy: {{weight: 0.1}}, kd: {{temperature: 1}}, hard_label: {{weight: 0.1}}}}
    epochs: 1
    batch_size: 32
    lr: 0.05
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A user's folder with 60 classes of 4 pictures, packed and cached."""
    folder = tmp_path_factory.mktemp("many")
    for label in range(CLASSES):
        place = folder / "pictures" / f"class-{label:02d}"
        place.mkdir(parents=True)
        for number in range(4):
            picture(label % 3, 100 * label + number).save(place / f"{number}.png")
    (folder / "tiny_model.py").write_text(MODEL + SHARP)
    (folder / "tiny.yaml").write_text(RECIPE)
    done(run(prepare, folder=folder))
    return folder


def prepare() -> None:
    journey.pack_recipe(load("tiny.yaml"))
    cache_teacher.main(["tiny.yaml"])


@pytest.mark.slow
def test_a_cache_of_the_largest_logits_says_what_the_teacher_says_of_them(many):
    with inside(many):
        recipe = load("tiny.yaml")
        corridor = assemble.training_corridor(recipe, "distill", 0, 1)
        about, teacher = corridor.signals.manifest, assemble.teacher(recipe)
        assert about["codec"]["logits"] == "top8" and about["row_bytes"] == 72 + 48 + 4 * KEPT
        assert (about["exact_losses"], about["near_losses"]) == (["cross_entropy", "hard_label"], ["kd"])
        report, labels, seconds = about["codec_error"]["logits"], 0, 0
        assert report["tail_error"] < 0.01 and report["max_abs"] < 0.05 and report["top_class_agreement"] == 1
        for step in range(len(corridor)):
            batch = corridor[step]
            top, live = batch.signals.logits, teacher(batch.images).logits
            assert isinstance(top, TopLogits) and top.ids.shape == (len(batch.keys), KEPT)
            below = live - live.max(dim=1, keepdim=True).values
            torch.testing.assert_close(below.gather(1, top.ids), top.logits, rtol=1e-3, atol=1e-3)
            assert (top.ids == batch.targets[:, None]).any(dim=1).all()
            assert (top.ids == batch.mixture.targets[:, None]).any(dim=1)[batch.mixture.share > 0].all()
            labels += int((top.ids[:, -1] == batch.targets).sum())
            seconds += int((top.ids[:, -2] == batch.mixture.targets).sum())
        assert labels > 20 and seconds > 10  # of classes that are not among the largest


@pytest.mark.slow
def test_a_student_learns_from_it_as_from_the_live_teacher(many):
    with inside(many):
        corridor = assemble.training_corridor(load("tiny.yaml"), "distill", 0, 1)
        error = corridor.signals.manifest["codec_error"]["logits"]["gradient_error"]["1"]
        teacher, found = assemble.teacher(load("tiny.yaml")), []
        for step in range(len(corridor)):
            batch, slopes = corridor[step], []
            for said in (batch.signals.logits, teacher(batch.images).logits):
                student = torch.zeros(len(batch.keys), CLASSES, requires_grad=True)
                LOSSES["kd"].function(student, said, temperature=1.0).sum().backward()
                slopes.append(student.grad)
            found.append([(slopes[0] - slopes[1]).square().sum().item(), slopes[1].square().sum().item()])
        gap, size = np.sum(found, axis=0)
        # Half of the views are seen in an epoch, so it is not quite what the manifest has measured over all.
        assert error < 0.05 and (gap / size) ** 0.5 == pytest.approx(error, rel=0.3)
    done(run(train.main, ["tiny.yaml", "--stage", "distill"], folder=many))
    [epoch] = json.loads((many / "runs/tiny/distill/seed-0/result.json").read_text())["history"]
    assert np.isfinite([epoch["loss"], epoch["kd"], epoch["hard_label"]]).all() and "teacher_accuracy" in epoch


@pytest.mark.slow
def test_a_temperature_at_which_it_is_not_faithful_is_refused_when_training_starts(many):
    ended = run(train.main, ["tiny.yaml", "--stage", "distill", "train.losses={kd: {temperature: 8}}"], folder=many)
    said = sentence(ended)
    assert ": stages.distill.losses.kd: at temperature 8 the gradient from logits stored as top8 is off by " in said
    assert said.endswith("keep more of the logits, or store all of them as fp16")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["train.losses={dkd: {}}"],
            "stages.distill.losses.dkd: needs the logits of every class, and the cache keeps the 8",
        ),
        (
            ["train.losses={kd: {temperature: 9}}"],
            "stages.distill.losses.kd: at temperature 9 needs the logits of every",
        ),
        (["cache.logits=top20"], "cache.logits: 'top20' takes no less than all 60 classes as 'fp16', which are exact"),
        (["cache.logits=top60"], "cache.logits: 'top60' takes no less than all 60 classes"),
        (
            ["cache.logits=top1"],
            "cache.logits: must be a text, fp32, fp16, uint16, uint8 or, of the largest, such as top20",
        ),
        (
            ["task.name=segmentation", "evaluate.metric=miou"],
            "cache.logits: 'top8' is for classification, not for segm",
        ),
    ],
)
def test_a_recipe_for_which_it_makes_no_sense_is_refused_before_anything_is_built(tmp_path, overrides, message):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "tiny.yaml", overrides, "distill")
    assert message in str(caught.value)


def test_a_live_teacher_serves_every_loss(tmp_path):
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    words = ["train.teacher=online", "train.losses={dkd: {}, kd: {temperature: 20}}"]
    assert load(tmp_path / "tiny.yaml", words, "distill").cache.logits == "top8"
