"""A student that learns from shards gets the loss and the gradient that it would get from the live teacher."""

from pathlib import Path

import pytest
import torch
from conftest import MODEL
from oracles import frame
from processes import done, run
from safetensors.torch import load_file
from scenes import scenes

from kd_dist import assemble, cache_teacher, journey, train
from kd_dist.config import load
from kd_dist.recipe import Recipe
from kd_dist.stage import Run
from kd_dist.step import forward

pytestmark = pytest.mark.slow

STEPS = 6
CODECS = ("fp32", "fp16", "uint8")
RECIPE = """\
name: tiny
task: {classes: 10}
data: {source: digits, splits: {train: 0.2, val: 0.1, test: 0.7}, shard_size: 128, workers: 0}
evaluate: {split: val}
views: {count: 3, size: 12, crop_scale: [0.5, 1], brightness: 0.3, contrast: 0.3}
teacher: {model: "tiny_model:network", options: {width: 24}, weights: stage:teacher}
student: {model: "tiny_model:network", options: {width: 6}}
stages:
  teacher: {model: teacher, losses: {cross_entropy: {}}, epochs: 12, batch_size: 16, lr: 1e-2}
  distill: {losses: {kd: {temperature: 4}}, epochs: 1, batch_size: 64, lr: 0.1, optimizer: sgd, momentum: 0,
            weight_decay: 0, clip: null}
"""


# What is kept of both features of the tiny segmentation experiment, and how far loss and gradient may be off by it.
STORES = {
    "fp32": ("fp32", "{tap: low, store: fp32}", "{tap: high, store: fp32}", 1e-5, 1e-4, 0.999999),
    "fp16": ("fp16", "{tap: low, store: fp16}", "{tap: high, store: fp16}", 1e-4, 1e-3, 0.99999),
    "int8": ("uint8", "{tap: low, store: int8}", "{tap: high, store: int8}", 2e-3, 1e-2, 0.9999),
    "dither": ("uint8", "{tap: low, dither: true}", "{tap: high, dither: true}", 2e-3, 1e-2, 0.9999),
    "pca": ("uint8", "{tap: low, pca: 6}", "{tap: high, pca: 12}", 1e-2, 5e-2, 0.999),
}


def prepare(*overrides: str) -> None:
    """Pack, and run the teacher once for each codec, each time under another name."""
    journey.pack_recipe(load("tiny.yaml", overrides))
    train.main(["tiny.yaml", "--stage", "teacher"])
    for codec in CODECS:
        cache_teacher.main(["tiny.yaml", f"teacher.name=teacher-{codec}", f"cache.logits={codec}"])


def gradients(to: str, overrides: list[str], recipe: str = "tiny.yaml") -> None:
    """Save the loss and the gradient of the first steps of a stage, made by the loop's own parts."""
    run = train.prepare(load(recipe, overrides, "distill"), "distill")
    frames = projected_alike(run, load(recipe, [*overrides, "train.teacher=cached"], "distill"))
    stream, kept = train.read_ahead(run, 0), {}
    run.student.train()
    for step in range(STEPS):
        batch, _ = next(stream)
        _, loss, _ = forward(run, batch, epoch=0.0)
        run.engine.clear()
        run.engine.backward(loss, 1.0)
        found = {name: value.grad.clone() for name, value in run.student.named_parameters()}
        found |= {name: torch.tensordot(axes.T, found[name], 1) for name, axes in frames.items()}
        kept[step] = loss.detach(), torch.cat([value.flatten() for value in found.values()])
    torch.save(kept, to)


@torch.no_grad()
def projected_alike(run: Run, cached: Recipe) -> dict[str, torch.Tensor]:
    """Give projections to components the same weights whether the teacher speaks in coordinates, as the cache lets it,
    or live in all its channels; of the latter, the frame of the coordinates by the weight's name."""
    frames, weights = {}, dict(run.student.named_parameters())
    if not run.student.pairs:
        return frames
    codecs = assemble.training_corridor(cached, "distill", 0, 1).codecs
    known = {feature: frame(codec.basis) for feature, codec in codecs.items() if codec.basis is not None}
    for (_, feature), (path, layer) in zip(run.student.pairs, run.student.projections.items(), strict=True):
        for part in layer.state_dict() if feature in known else ():
            name, axes = f"projections.{path}.{part}", known[feature]
            shape = axes.shape[1], *weights[name].shape[1:]
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
            weights[name].copy_(weight if run.teacher is None else torch.tensordot(axes, weight, 1))
            frames |= {} if run.teacher is None else {name: axes}
    return frames


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    (folder / "tiny_model.py").write_text(MODEL)
    (folder / "tiny.yaml").write_text(RECIPE)
    done(run(prepare, folder=folder))
    return folder


def compare(
    lab: Path, to: Path, codec: str, *overrides: str, recipe: str = "tiny.yaml"
) -> tuple[float, float, float]:
    """Worst over the steps: relative difference of the loss and of the gradient, and the gradients' cosine."""
    found = []
    for source in ("cached", "online"):
        words = [f"teacher.name=teacher-{codec}", f"cache.logits={codec}", f"train.teacher={source}", *overrides]
        done(run(gradients, str(to / source), words, recipe, folder=lab))
        found.append(torch.load(to / source, weights_only=True))
    cached, online = found
    losses, differences, cosines = [], [], []
    for step in range(STEPS):
        (mine, gradient), (exact, reference) = cached[step], online[step]
        assert reference.norm() > 1e-3 and exact > 1e-3  # there is something to compare
        losses.append(float(abs(mine - exact) / exact))
        differences.append(float((gradient - reference).norm() / reference.norm()))
        cosines.append(float(torch.cosine_similarity(gradient.double(), reference.double(), dim=0)))
    return max(losses), max(differences), min(cosines)


LIMITS = {"fp32": (1e-5, 1e-5, 0.999999), "fp16": (1e-3, 2e-3, 0.9999), "uint8": (5e-3, 2e-2, 0.999)}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("temperature", [1, 4])
def test_loss_and_gradient_from_shards_are_those_of_the_live_teacher(lab, tmp_path, codec, temperature):
    loss, gradient, cosine = compare(lab, tmp_path, codec, f"train.losses.kd.temperature={temperature}")
    print(f"{codec} T={temperature}: loss {loss:.1e}, gradient {gradient:.1e}, 1 - cosine {1 - cosine:.1e}")
    most_loss, most_gradient, least_cosine = LIMITS[codec]
    assert loss < most_loss and gradient < most_gradient and cosine > least_cosine
    if codec != "fp32":
        assert gradient > 1e-7  # it is lossy: had the teacher answered both times, nothing would differ


def test_another_view_would_not_pass(lab, tmp_path):
    """The same comparison with an online teacher that sees other views: what a mistake in the replay would measure."""
    words = ["teacher.name=teacher-fp32", "cache.logits=fp32"]
    for source, seed in (("cached", 0), ("online", 1)):
        more = [f"train.teacher={source}", f"views.seed={seed}"]
        done(run(gradients, str(tmp_path / source), [*words, *more], folder=lab))
    (_, mine), (_, other) = (torch.load(tmp_path / one, weights_only=True)[0] for one in ("cached", "online"))
    assert torch.cosine_similarity(mine, other, dim=0) < 0.999


def test_whole_runs_end_with_the_same_weights(lab, tmp_path):
    teacher = lab / "runs" / "tiny" / "teacher" / "seed-0" / "best.safetensors"
    words = ["teacher.name=teacher-fp32", "cache.logits=fp32", f"teacher.weights={teacher}", "train.epochs=3"]
    ends = {}
    for source in ("cached", "online"):
        more = [f"train.teacher={source}", f"runs={tmp_path / source}"]
        done(run(train.main, ["tiny.yaml", "--stage", "distill", *words, *more], folder=lab))
        [last] = (tmp_path / source / "tiny" / "distill" / "seed-0").glob("checkpoint-*")
        ends[source] = load_file(last / "model.safetensors")
    assert len(ends["cached"]) == 4
    for name, value in ends["cached"].items():
        assert (value - ends["online"][name]).norm() / value.norm() < 1e-5, name


# ------------------------------------------------------------------------------------------------ features


def stored(name: str) -> list[str]:
    logits, low, high, *_ = STORES[name]
    words = [f"teacher.name=teacher-{name}", f"cache.logits={logits}"]
    return [*words, f"cache.features.low={low}", f"cache.features.high={high}"]


def prepare_scenes() -> None:
    """Pack, and run the teacher once for each way to store its features."""
    journey.pack_recipe(load("scenes.yaml"))
    for name in STORES:
        cache_teacher.main(["scenes.yaml", *stored(name)])


@pytest.fixture(scope="module")
def scene_lab(tmp_path_factory) -> Path:
    folder = scenes(tmp_path_factory.mktemp("scenes"))
    done(run(prepare_scenes, folder=folder))
    return folder


@pytest.mark.parametrize("name", STORES)
def test_features_from_shards_give_the_loss_and_the_gradient_of_the_live_teacher(scene_lab, tmp_path, name):
    """All terms together: kd_pixel on maps of logits, cosine with its projections, sp with nothing of its own."""
    losses = "{kd_pixel: {temperature: 4}, cosine: {}, sp: {}, at: {}}"
    words = [*stored(name), f"train.losses={losses}", f"train.epochs={STEPS}", "train.batch_size=10"]
    loss, gradient, cosine = compare(scene_lab, tmp_path, name, *words, recipe="scenes.yaml")
    print(f"{name}: loss {loss:.1e}, gradient {gradient:.1e}, 1 - cosine {1 - cosine:.1e}")
    *_, most_loss, most_gradient, least_cosine = STORES[name]
    assert loss < most_loss and gradient < most_gradient and cosine > least_cosine
    if name != "fp32":
        assert gradient > 1e-7
