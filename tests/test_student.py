"""The one module that is trained: what it gives, what it holds, and where gradients go."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from kd_dist import assemble, cache_teacher
from kd_dist.config import load
from kd_dist.errors import ModelError
from kd_dist.loader import batches, on_device, to_device
from kd_dist.losses import LOSSES, Objective
from kd_dist.losses.grid import on_grid
from kd_dist.models import Built, Network
from kd_dist.student import Student, projection

SIZE = (16, 24)
TAPS = {"a": "map", "b": "tokens", "c": "vector"}
ALL_FEATURE_LOSSES = {name: {} for name, row in LOSSES.items() if row.against == "features"}


class Maps(nn.Module):
    """A map, tokens and a vector on the way to the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.tokens = nn.Linear(4, 6)
        self.vector = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, images):
        tokens = self.tokens(self.map(images).relu().flatten(2).transpose(1, 2))
        return self.head(self.vector(tokens.mean(dim=1)))


def network() -> Network:
    torch.manual_seed(0)
    return Network(Built(Maps(), (0.0,) * 3, (1.0,) * 3), 3, None, "maps")


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_without_taps_it_is_its_network():
    student = Student(network())
    output = student(images())
    assert torch.equal(output.logits, network()(images()))
    assert (output.features, output.projected) == ({}, {})
    assert sum(value.numel() for value in student.parameters()) == sum(v.numel() for v in network().parameters())


def test_every_kind_of_feature_is_projected_to_the_teachers_channels():
    student = Student(network(), TAPS, {"cosine": {"a": 7, "b": 8}, "hint": {"a": 9, "c": 10}}, SIZE)
    output = student(images())
    assert {name: tuple(value.shape) for name, value in output.features.items()} == {
        "a": (2, 4, 4, 6),
        "b": (2, 6, 24),
        "c": (2, 5),
    }
    assert {loss: {name: tuple(v.shape) for name, v in one.items()} for loss, one in output.projected.items()} == {
        "cosine": {"a": (2, 7, 4, 6), "b": (2, 8, 24)},
        "hint": {"a": (2, 9, 4, 6), "c": (2, 10)},
    }
    # By hand: one linear map of the channels at every position, with its bias.
    for (loss, name), layer in zip(student.pairs, student.projections.values(), strict=True):
        feature = output.features[name].movedim(1, -1)
        expected = feature @ layer.weight.flatten(1).T + layer.bias
        torch.testing.assert_close(output.projected[loss][name].movedim(1, -1), expected)


@pytest.mark.parametrize("grid", [(2, 3), (4, 6), (3, 4), (8, 3), (9, 13)])
def test_a_map_is_projected_at_the_coarser_grid_and_the_losses_see_no_difference(grid):
    """Against the projection of the whole map: exactly that where no side is longer, else the same but for rounding."""
    wanted = {"cosine": {"a": 7, "b": 7, "c": 7}}
    early, late = (Student(network(), TAPS, wanted, SIZE, grids).train() for grids in ({"a": grid, "b": grid}, None))
    late.load_state_dict(early.state_dict())
    teacher = torch.randn(2, 7, *grid, generator=torch.Generator().manual_seed(2))
    found = []
    for student in (early, late):
        output = student(images())
        projected = output.projected["cosine"]["a"]
        LOSSES["cosine"].function(projected, teacher).sum().backward()
        gradients = [value.grad for value in student.parameters() if value.grad is not None]
        found.append((on_grid(projected, grid), *gradients, output.projected["cosine"]["b"]))
        assert projected.shape[2:] == (tuple(map(min, grid, (4, 6))) if student is early else (4, 6))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert len(found[0]) == 6 and found[1][1].abs().max() > 1e-4


def test_a_projection_belongs_to_the_module_and_not_to_the_weights_that_are_kept():
    student = Student(network(), {"a": "map"}, {"cosine": {"a": 7}}, SIZE)
    own = {name for name, _ in student.named_parameters()}
    assert {"projections.cosine-a.weight", "projections.cosine-a.bias"} <= own
    assert not any("projection" in name for name in student.network.backbone.state_dict())


def test_a_feature_that_cannot_be_tapped_is_refused_when_the_student_is_made():
    with pytest.raises(ModelError, match="maps: feature 'a': there is no module 'mop'; did you mean 'map'"):
        Student(network(), {"a": "mop"}, None, SIZE)


def test_projections_of_other_dimensions_do_not_exist():
    assert [type(projection((4, *grid), 5)) for grid in ((), (6,), (2, 3))] == [nn.Linear, nn.Conv1d, nn.Conv2d]


# ---------------------------------------------------------------------------------------------- gradients


def step(losses: dict) -> Student:
    """One backward pass of a student of the tiny segmentation experiment with an online teacher."""
    recipe = load("scenes.yaml")
    stage = dataclasses.replace(recipe.stages["distill"], losses=losses, teacher="online")
    recipe = dataclasses.replace(recipe, stages={**recipe.stages, "distill": stage})
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    teacher = assemble.teacher(recipe, assemble.stage_features(recipe, "distill"))
    student = assemble.module(recipe, "distill", corridor, teacher)
    batch = to_device(next(batches(corridor, 0, 1, 0, pin=False)), torch.device("cpu"))
    batch = batch._replace(signals=teacher(batch.images))
    loss, _ = Objective(losses, 1)(student(batch.images), batch, 0.0)
    loss.backward()
    said = [batch.signals.logits, *batch.signals.features.values(), *teacher.parameters()]
    assert len(said) == 3 + 6 and all(value.grad is None and not value.requires_grad for value in said)
    return student


def test_there_are_losses_on_features():
    assert len(ALL_FEATURE_LOSSES) >= 7


@pytest.mark.parametrize("name", ALL_FEATURE_LOSSES)
def test_the_student_and_its_projections_receive_a_gradient(scenery, name):
    student = step({name: {}})
    reached = {key: value.grad for key, value in student.named_parameters() if value.grad is not None}
    assert {key for key in reached if "projections" in key} == {
        key for key, _ in student.named_parameters() if "projections" in key
    }
    assert bool(student.projections) == (LOSSES[name].student == "projected")
    early = reached["network.backbone.low.weight"]
    assert early.isfinite().all() and early.abs().max() > 0
    for key, gradient in reached.items():
        if key.startswith("projections") and key.endswith("weight"):
            assert gradient.abs().max() > 0, key


@pytest.mark.parametrize(
    "losses, width", [({"cosine": {}}, 7), ({"cosine": {}, "cwd_features": {}}, 16), ({"hint": {}, "sp": {}}, 7)]
)
def test_projections_are_as_wide_as_what_is_delivered(scenery, losses, width):
    """6 components and the mean, unless a loss looks at each of the 16 channels; `low` has no components."""
    recipe = load("scenes.yaml", [f"stages.distill.losses={losses}"])
    teacher = assemble.teacher(recipe, recipe.cache.features)
    cache_teacher.cache_split(recipe, "train", teacher, Accelerator(cpu=True))
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    codecs = assemble.stage_codecs(recipe, "distill", corridor)
    student = assemble.module(recipe, "distill", corridor, None)
    batch = to_device(corridor[0], torch.device("cpu"), codecs)
    shapes = {name: tuple(value.shape[1:]) for name, value in batch.signals.features.items()}
    assert shapes == {"low": (8, 4, 6), "high": (width, 4, 6)}
    for projected in student(batch.images).projected.values():
        assert {name: tuple(value.shape[1:]) for name, value in projected.items()} == shapes
    loss, _ = Objective(losses, 1)(student(batch.images), batch, 0.0)
    assert loss.isfinite()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_features_from_shards_reach_the_student_as_the_teacher_gave_them(scenery, batch_size):
    """Stored exactly, the decoded features are the live ones, and so is every gradient of the student."""
    exact = [
        "cache.logits=fp32",
        "cache.features.low={tap: low, store: fp32}",
        "cache.features.high={tap: high, store: fp32}",
    ]
    recipe = load("scenes.yaml", exact)
    teacher = assemble.teacher(recipe, recipe.cache.features)
    cache_teacher.cache_split(recipe, "train", teacher, Accelerator(cpu=True))
    corridor = assemble.training_corridor(recipe, "distill", 0, 1)
    corridor = dataclasses.replace(corridor, plan=dataclasses.replace(corridor.plan, batch_size=batch_size))
    device = torch.device("cpu")
    seen = 0
    for batch in batches(corridor, 0, len(corridor), 0, pin=False):
        batch = to_device(batch, device, on_device(corridor.codecs, device))
        live = teacher(batch.images)
        assert set(batch.signals.features) == {"low", "high"} == set(live.features)
        for name, value in live.features.items():
            np.testing.assert_allclose(batch.signals.features[name], value, rtol=1e-5, atol=1e-6)
            seen += len(value)
    assert seen == 2 * 10 * recipe.stages["distill"].epochs
