"""Regression from sound: students and losses on batches of packed recordings, with a cached teacher's signals."""

import functools

import numpy as np
import pytest
import torch
from conftest import pack_examples
from recordings import encoded, tones

from kd_dist import assemble, cache_teacher, journey
from kd_dist.batch import Batch, StudentOutput
from kd_dist.config import load
from kd_dist.errors import DataError
from kd_dist.loader import on_device, to_device
from kd_dist.losses import LOSSES, Objective
from kd_dist.losses.outputs import labelled
from kd_dist.recipe import Recipe
from kd_dist.sources import Item, Listing
from kd_dist.student import Student

pytestmark = pytest.mark.slow  # recordings are decoded, in processes of their own

RATE, COUNT = 8000, 16
NAMES = sorted(name for name, row in LOSSES.items() if "regression" in row.tasks)
LABEL_LOSSES = [name for name in NAMES if LOSSES[name].against == "targets"]
ALL = {name: {"features": ["tokens"]} if name == "cosine" else {} for name in NAMES}  # `looks` has one channel
IMITATIONS = [name for name in NAMES if LOSSES[name].against != "targets" or LOSSES[name].with_teacher]
TAPS = "{tokens: 'grid(blocks.1)', looks: 'saliency(blocks.1, 2x4)'}"
STAGES = "{tokens: stages.3, looks: 'saliency(stages.3, 2x4)'}"
VIT = "{model: timm/vit_tiny_patch16_224, options: {img_size: [32, 64], embed_dim: 24, depth: 2, num_heads: 2}"
STUDENTS = {
    "kd_dist/mobile_vit": f"{{model: kd_dist/mobile_vit, taps: {TAPS}}}",
    "timm/mobilevit_xxs": f"{{model: timm/mobilevit_xxs, taps: {STAGES}}}",
    "timm/mobilevitv2_050": f"{{model: timm/mobilevitv2_050, taps: {STAGES}}}",
    "timm/vit_tiny_patch16_224": f"{VIT}, head: {{hidden: [32, 8], dropout: 0.1}}, taps: {TAPS}}}",
}
RECIPE = f"""\
name: sound
task: {{name: regression, outputs: [valence, arousal]}}
audio: {{sample_rate: {RATE}, n_fft: 512, hop: 128, mels: 32}}
data: {{source: "{__name__}:sounds", splits: {{train: 0.7, val: 0.3}}, shard_size: 8, workers: 0}}
views: {{count: 2, size: [32, 64], gain: 6, time_mask: 8, band_mask: 4}}
teacher: {VIT}, head: {{hidden: [32, 8]}}, seed: 1}}
cache:
  batch_size: 8
  features:
    tokens: {{tap: "grid(blocks.1)", store: fp32}}
    looks: {{tap: "attention(blocks.1.attn, 2x4)", store: fp32}}
student: {STUDENTS["kd_dist/mobile_vit"]}
stages:
  distill: {{losses: {{huber: {{}}}}, epochs: 1, batch_size: 8, lr: 1e-3}}
evaluate: {{split: val}}
"""


def sounds() -> Listing:
    """Tones of 1.5 s whose pitch and loudness are their labels; every fourth has none. A source of the user's own."""
    items = []
    for number in range(COUNT):
        first, second = number / COUNT * 2 - 1, (number % 5) / 4
        read = functools.partial(_sound, 200 + 100 * number, 0.2 + 0.6 * second)
        label = None if number % 4 == 0 else (first, second)
        items.append(Item(f"{number:02d}", "val" if number % 8 == 7 else "train", "wav", label, read))
    return Listing(("valence", "arousal"), items)


def mute() -> Listing:
    """The same, none of val labelled."""
    listing = sounds()
    return listing._replace(items=[one._replace(label=None) if one.split == "val" else one for one in listing.items])


def _sound(pitch: float, loudness: float) -> bytes:
    return encoded(loudness * tones(1.5, RATE, pitch), RATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the recipe, its examples packed and its teacher cached, a random one. Not to be changed."""
    made = tmp_path_factory.mktemp("sound")
    (made / "sound.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        recipe = load("sound.yaml")
        manifests = pack_examples(recipe)
        assert {split: one["examples"] for split, one in manifests.items()} == {"train": 14, "val": 2}
        cache_teacher.cache_teacher(recipe)
    return made


@pytest.fixture
def home(folder, monkeypatch):
    monkeypatch.chdir(folder)


def distilling(name: str, losses: dict) -> tuple[Recipe, Student, Batch, Objective]:
    """A student in training on the first batch of an epoch, with `eta` as the cache says it."""
    words = [f"student={STUDENTS[name]}", f"stages.distill.losses={losses}"]
    recipe = load("sound.yaml", words)
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    student = assemble.module(recipe, "distill", corridor, None).train()
    cpu = torch.device("cpu")
    batch = to_device(corridor[0], cpu, on_device(corridor.codecs, cpu))
    assert batch.valid.all() and batch.images.shape == (8, 1, 32, 64) and batch.images.float().std() > 20
    assert 0 < int(labelled(batch.targets).sum()) < 8
    return recipe, student, batch, Objective(assemble.stage_losses(recipe, "distill", corridor), 1)


def test_these_are_all():
    assert len(NAMES) == 15 and len(LABEL_LOSSES) == 5 and len(IMITATIONS) == 12 and len(STUDENTS) == 4


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize(("limits", "rounding"), [((-1.0, 1.0), 0), ((-0.45, 1.7), 2e-7)])
def test_outputs_are_in_the_range_whatever_is_heard(home, name, limits, rounding):
    """To the last bit in -1 to 1; limits that float32 does not have are rounded."""
    _, student, batch, _ = distilling(name, {"huber": {}})
    network = student.network
    network.bounds = limits
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    heard = [batch.images, torch.zeros_like(batch.images), torch.full_like(batch.images, 255)]
    outputs = []
    for training in (True, False):
        network.train(training)
        with torch.no_grad():
            outputs += [network(images) for images in heard]
            assert len(outputs[-3].unique(dim=0)) == 8  # it hears which recording it is
    with torch.no_grad():
        last.weight *= 1e6  # as far as a head can go
        last.bias.copy_(torch.tensor([-1e6, 1e6]))
        outputs += [network(images) for images in heard]
    assert len(outputs) == 9 and last.out_features == 2
    for output in outputs:
        assert output.shape == (8, 2) and output.dtype == torch.float32
        exact = output.double()
        assert exact.min() >= limits[0] - rounding and exact.max() <= limits[1] + rounding
    assert all(output.min() > limits[0] and output.max() < limits[1] for output in outputs[:6])
    assert (outputs[-2].double() - torch.tensor(limits)).abs().max() < 1e-6


@pytest.mark.parametrize("name", STUDENTS)
def test_a_gradient_reaches_every_part_in_training(home, name):
    """In the second step: timm's MobileViTs begin with branches that are multiplied by 0."""
    for losses, count in (({"kd_huber": {}}, 0), (ALL, 2 * (1 + 2 + 2))):
        _, student, batch, objective = distilling(name, losses)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad()
            loss, terms = objective(student(batch.images), batch, 0.0)
            loss.backward()
        parameters = dict(student.named_parameters())
        assert terms.keys() == losses.keys() and loss.isfinite() and len(parameters) > 30
        # Weight and bias for one feature of cosine, two of hint and of cwd_features.
        assert sum(one.startswith("projections.") for one in parameters) == count
        assert all(value.requires_grad and value.grad is not None for value in parameters.values())
        assert not [one for one, value in parameters.items() if not value.grad.isfinite().all()]
        assert not [one for one, value in parameters.items() if not value.grad.any()]


@pytest.mark.parametrize("student_name", STUDENTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_a_cost_and_unlabelled_rows_have_none(home, student_name, name):
    _, student, batch, objective = distilling(student_name, {name: ALL[name]})
    output = student(batch.images)
    leaves = [output.logits, *output.features.values()]
    loss, terms = objective(output, batch, 0.0)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    reached = [gradient for gradient in gradients if gradient is not None]
    assert loss.shape == () and loss.isfinite() and loss > 0 and terms[name] == loss
    assert reached and all(gradient.isfinite().all() and gradient.any() for gradient in reached)
    if name in LABEL_LOSSES:
        unlabelled = ~labelled(batch.targets)
        assert len(reached) == 1 and unlabelled.any() and not gradients[0][unlabelled].any()


@pytest.mark.parametrize("name", IMITATIONS)
def test_saying_what_the_teacher_says_costs_nothing(home, name):
    _, student, batch, objective = distilling("kd_dist/mobile_vit", {name: ALL[name]})
    said = batch.signals
    features = {feature: value.clone() for feature, value in said.features.items()}
    match = StudentOutput(said.logits.clone(), features, {name: features})
    loss, _ = objective(match, batch, 0.0)
    assert loss == 0
    assert objective(student(batch.images), batch, 0.0)[0] > 0


def test_the_cached_signals_are_what_the_live_teacher_says_of_these_views(home):
    recipe, _, batch, _ = distilling("kd_dist/mobile_vit", ALL)
    teacher = assemble.teacher(recipe, recipe.cache.features)
    live = teacher(batch.images)
    assert live.logits.abs().max() < 1 and len(np.unique(live.logits.numpy())) == 16
    torch.testing.assert_close(batch.signals.logits, live.logits, atol=1e-6, rtol=0)
    for feature, value in live.features.items():
        torch.testing.assert_close(batch.signals.features[feature], value, atol=1e-5, rtol=1e-5)


def test_a_split_without_labels_has_no_metric(home, tmp_path):
    recipe = load("sound.yaml", [f"data.source={__name__}:mute", f"data.shards={tmp_path}"])
    pack_examples(recipe)
    build = functools.partial(assemble.network, recipe, "student", None, 0)
    with pytest.raises(DataError, match=r"/sound/val: ccc is undefined there; label its examples, or choose another"):
        journey.measured(recipe, tmp_path / "out", "student", "", build)
    assert not (tmp_path / "out").exists()
